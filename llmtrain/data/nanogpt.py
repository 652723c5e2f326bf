"""nanoGPT's data folders: `train.bin` and `val.bin`, uint16 tokens and nothing else.

Why: whoever has prepared OpenWebText for nanoGPT need not do it again. The files name no tokenizer,
so GPT-2's is assumed and said; a folder with a vocabulary of its own (`meta.pkl`) is refused.

    token_files(Path("nanoGPT/data/openwebtext"))["train"]
"""

import hashlib
from pathlib import Path

from llmtrain.data.manifest import SPLITS
from llmtrain.data.token_files import TokenFile
from llmtrain.errors import UserError

_SAMPLE_BYTES = 1 << 20


def is_nanogpt(folder: Path) -> bool:
    """Whether `folder` holds nanoGPT's token files."""
    return (folder / "train.bin").is_file() or (folder / "val.bin").is_file()


def token_files(folder: Path) -> dict[str, tuple[TokenFile, ...]]:
    """The files of each split; a missing one is an empty split.

    Raises:
        UserError: the tokens are not GPT-2's, or a file is not a whole number of tokens.
    """
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} has its own vocabulary (meta.pkl), and pickles are never read",
            hint="prepare the text itself: llmtrain prepare FILE --tokenizer byte",
        )
    return {split: _token_file(folder / f"{split}.bin") for split in SPLITS}


def _token_file(path: Path) -> tuple[TokenFile, ...]:
    if not path.is_file():
        return ()
    size = path.stat().st_size
    if size % 2:
        raise UserError(
            f"{path} has {size:,} bytes, which is no whole number of uint16 tokens",
            hint="the file was cut short or is no token file: write it again",
        )
    return (TokenFile(path, size // 2, 0),)


def identity(files: dict[str, tuple[TokenFile, ...]]) -> str:
    """Hex hash of the files' sizes and of the first and last MiB of each."""
    # Hashing all of 18 GB each time a command starts would take longer than most evaluations.
    digest = hashlib.sha256()
    for split, split_files in files.items():
        for token_file in split_files:
            digest.update(f"{split} {token_file.tokens} ".encode())
            with token_file.path.open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, 2 * token_file.tokens - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
