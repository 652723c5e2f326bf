"""Loss and perplexity of a text compared with transformers; other models and tokenizers."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, write_neox, write_ours, write_tokenizer
from transformers import AutoModelForCausalLM

from llmtrain.checkpoints.resolve import Target, find_targets
from llmtrain.config.schema import RunConfig
from llmtrain.data.token_data import open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.evaluation.text import TextResult, measure_text
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.training.run import pretrain

TEXT = (
    "It was the best of times, it was the wörst of times.\r\n\n"
    "It was the age of wisdom … of foolishness.\n"
)


def targets(folder: Path) -> list[Target]:
    return find_targets(folder, every_snapshot=False)


def measured(
    folder: Path, tmp_path: Path, stride: int | None = None, text: str = TEXT
) -> TextResult:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    (result,) = measure_text(
        targets(folder), path, EvalOptions(stride=stride), lambda *progress: None
    )
    return result


@torch.no_grad()
def nats_by_hand(folder: Path, ids: list[int], stride: int) -> float:
    """Sum the loss of each token but the first; windows of CONTEXT tokens end every `stride`."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (CONTEXT if done == 1 else stride))
        begin = done - 1 if stride == CONTEXT else max(0, end - 1 - CONTEXT)
        logits = model(torch.tensor([ids[begin : end - 1]])).logits[0].double().log_softmax(-1)
        total -= sum(logits[i - begin - 1, ids[i]].item() for i in range(done, end))
        done = end
    return total


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use float32 also on a CPU that supports bfloat16."""
    for module in ("loss", "text"):
        monkeypatch.setattr(f"llmtrain.evaluation.{module}.resolve_precision", lambda *_: "float32")


@pytest.mark.parametrize("stride", [None, 1, 5, CONTEXT])
@pytest.mark.parametrize("model", ["ours", "neox"])
def test_perplexities_equal_transformers(model: str, stride: int | None, tmp_path: Path) -> None:
    folder = tmp_path / model
    if model == "ours":
        write_ours(folder)
        ids = [256, *TEXT.encode()]
    else:
        write_neox(folder)
        tokenizer = write_tokenizer(folder, TEXT)
        ids = [tokenizer.eos_token_id, *tokenizer.encode(TEXT)]
    result = measured(folder, tmp_path, stride)
    nats = nats_by_hand(folder, ids, stride or CONTEXT)
    words, n_bytes = len(TEXT.split()), len(TEXT.encode())
    assert (result.tokens, result.words, result.bytes) == (len(ids) - 1, words, n_bytes)
    assert result.windows == ("strided" if stride in (1, 5) else "disjoint")
    assert result.loss == pytest.approx(nats / result.tokens, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(nats / result.tokens), rel=1e-3)
    assert result.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-3)
    assert result.byte_perplexity == pytest.approx(math.exp(nats / n_bytes), rel=1e-3)
    assert result.bits_per_byte == pytest.approx(nats / n_bytes / math.log(2), rel=1e-4)


def test_invalid_texts_and_strides_raise(tmp_path: Path) -> None:
    write_ours(tmp_path / "ours")
    for content, problem in ((b"", "is empty"), (b"ab\xff", r"not UTF-8 \(byte 2\)")):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            measure_text(targets(tmp_path / "ours"), path, EvalOptions(), lambda *progress: None)
    with pytest.raises(UserError, match="cannot read"):
        measure_text(targets(tmp_path / "ours"), tmp_path, EvalOptions(), lambda *progress: None)
    with pytest.raises(UserError, match=r"--stride 17 is longer than a window of .*, 16 tokens"):
        measured(tmp_path / "ours", tmp_path, stride=17)


def test_an_hf_model_without_a_tokenizer(data_folder: Path, tmp_path: Path) -> None:
    """Shards are evaluated without re-encoding; text cannot be encoded."""
    write_neox(tmp_path / "neox")
    (row,) = measure_losses(
        targets(tmp_path / "neox"),
        EvalOptions(data=data_folder, tokens=200),
        lambda *progress: None,
    )
    ids = open_data(data_folder).reader("val").read(0, 200).tolist()
    assert row.loss == pytest.approx(nats_by_hand(tmp_path / "neox", ids, CONTEXT) / 199, abs=1e-4)
    assert row.bits_per_byte is not None
    with pytest.raises(UserError, match="no tokenizer files"):
        measured(tmp_path / "neox", tmp_path)


@pytest.mark.parametrize(
    "write", [write_neox, write_ours]
)  # ours has the end-of-text id of the data
def test_shards_of_another_tokenizer_are_reencoded(
    write: Callable[[Path], object], data_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "neox")
    ids = open_data(data_folder).reader("val").read(0, 1000)
    documents = [
        load_tokenizer("byte").decode(part) for part in np.split(ids, np.flatnonzero(ids == 256))
    ]
    tokenizer = write_tokenizer(tmp_path / "neox", "".join(documents))
    warned: list[str] = []
    (row,) = measure_losses(
        targets(tmp_path / "neox"),
        EvalOptions(data=data_folder, tokens=1000),
        lambda *progress: None,
        warn=warned.append,
    )
    theirs = [
        i for document in documents for i in (tokenizer.eos_token_id, *tokenizer.encode(document))
    ]
    nats, n_bytes = (
        nats_by_hand(tmp_path / "neox", theirs, CONTEXT),
        sum(len(d.encode()) for d in documents),
    )
    assert len(theirs) < 1000
    assert (row.tokens, row.bytes) == (len(theirs) - 1, n_bytes)
    assert row.loss == pytest.approx(nats / row.tokens, abs=1e-4)
    assert row.bits_per_byte == pytest.approx(nats / n_bytes / math.log(2), rel=1e-4)
    assert "has another tokenizer" in warned[0]


def test_folders_that_cannot_be_evaluated_raise(data_folder: Path, tmp_path: Path) -> None:
    write_neox(tmp_path / "neox")
    config = tmp_path / "neox" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(
        json.dumps(document | {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (tmp_path / "neox" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="could not load a causal language model"):
        measure_losses(
            targets(tmp_path / "neox"), EvalOptions(data=data_folder), lambda *progress: None
        )
    assert not (tmp_path / "ran").exists()
    config.write_text(json.dumps(document))
    (tmp_path / "neox" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="could not load a tokenizer"):
        measure_losses(
            targets(tmp_path / "neox"), EvalOptions(data=data_folder), lambda *progress: None
        )
    with pytest.raises(RunFailed, match="is nan"):
        broken = write_ours(tmp_path / "nan")
        weights = {name: value * math.nan for name, value in broken.state_dict().items()}
        save_over(tmp_path / "nan", weights)
        measured(tmp_path / "nan", tmp_path)


def save_over(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    from llmtrain.checkpoints.gpt2_folder import load_shape, save_tensors

    save_tensors(folder / "model.safetensors", weights, load_shape(folder))


def test_text_results_are_cached_and_validated(
    tiny: Callable[..., RunConfig], text_file: Path, tmp_path: Path
) -> None:
    run = pretrain(tiny(), tmp_path / "run", log=lambda line: None).run
    progress: list[object] = []

    def measure_again(stride: int | None = None) -> list[TextResult]:
        progress.clear()
        wanted = find_targets(run.average("ema-0.9", 12), every_snapshot=False)
        return measure_text(
            wanted, text_file, EvalOptions(stride=stride), lambda *done: progress.append(done)
        )

    raw, average = measure_again()
    assert progress
    assert raw.loss != average.loss
    assert measure_again() == [raw, average]
    assert not progress
    assert measure_again(stride=8)[0].loss != raw.loss
    assert progress
    path = max(run.evals.glob("text/raw-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": "low"}))
    with pytest.raises(UserError, match=r"loss: Input should be a valid number") as caught:
        [measure_again(stride) for stride in (None, 8)]
    assert "delete the file" in caught.value.hint
