"""nanoGPT's data preparation: `datasets.map` with tiktoken, then a memmap.

Source: nanoGPT's data/openwebtext/prepare.py with a .jsonl file instead of the hub's data set, one
process per core, and GPT-2's ranks from the package (no download).

    python plain_prepare.py SOURCE FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from llmtrain.model.tokenizer import load_tokenizer

PROCESSES = os.cpu_count() or 1


def encoding() -> tiktoken.Encoding:
    """Return tiktoken's "gpt2" encoding."""
    *pieces, _ = load_tokenizer("gpt2").vocabulary
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def main(source: str, folder: str) -> None:
    """Write train.bin and val.bin."""
    enc = encoding()

    def process(example: dict[str, Any]) -> dict[str, Any]:
        ids = enc.encode_ordinary(example["text"])
        ids.append(enc.eot_token)
        return {"ids": ids, "len": len(ids)}

    cache = str(Path(folder) / "cache")
    whole = datasets.load_dataset("json", data_files=source, cache_dir=cache)["train"]
    splits = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits["val"] = splits.pop("test")
    tokenized = splits.map(process, remove_columns=whole.column_names, num_proc=PROCESSES)
    for split, documents in tokenized.items():
        length = np.sum(documents["len"], dtype=np.uint64)
        tokens = np.memmap(
            Path(folder) / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(length,)
        )
        start, batches = 0, min(1024, len(documents))
        for index in range(batches):
            batch = documents.shard(num_shards=batches, index=index, contiguous=True).with_format(
                "numpy"
            )
            ids = np.concatenate(batch["ids"])
            tokens[start : start + len(ids)] = ids
            start += len(ids)
        tokens.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
