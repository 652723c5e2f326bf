"""The loss on a split, compared with transformers on the same windows."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, load_model, save_weights
from llmtrain.config.schema import ModelConfig
from llmtrain.data.token_data import open_data
from llmtrain.errors import UserError
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.model.chunk_sizes import rows_in_cache
from llmtrain.model.gpt import GPT, IGNORE
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.signals import Interrupted

CPU = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=264)
    model = GPT(config, 16, seed=1)
    folder = tmp_path / "weights"
    folder.mkdir()
    save_weights(folder, model.state_dict(), Shape(config, 16, 256), Origin(3, 4, 0.1, "test"))
    return folder


def measured(
    folder: Path, data: Path, limit: int | None = None, batch: int = 4, block: int = 16
) -> LossResult:
    reader = open_data(data).reader("val")
    return evaluate(
        load_model(folder), reader, load_tokenizer("byte").token_bytes(),
        block_size=block, batch=batch, device=CPU, precision="float32", limit=limit,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [None, 2, 17, 18, 100])
def test_loss_equals_transformers_on_the_same_windows(
    weights: Path, data_folder: Path, limit: int | None
) -> None:
    result = measured(weights, data_folder, limit)
    reader = open_data(data_folder).reader("val")
    tokens = torch.from_numpy(
        reader.read(0, min(limit or len(reader), len(reader))).astype(np.int64)
    )
    model = AutoModelForCausalLM.from_pretrained(weights).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    assert result.tokens == count == len(tokens) - 1
    assert result.loss == pytest.approx(total / count, abs=1e-4)
    text_bytes = int((tokens[1:] != 256).sum())
    assert result.bytes == text_bytes
    assert result.bits_per_byte == pytest.approx(total / text_bytes / math.log(2), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_standard_error_is_that_of_the_windows_losses(weights: Path, data_folder: Path) -> None:
    """Compare with the textbook formula on windows of equal size."""
    result = measured(weights, data_folder, limit=16 * 20 + 1, batch=7)
    tokens = torch.from_numpy(
        open_data(data_folder).reader("val").read(0, 16 * 20 + 1).astype(np.int64)
    )
    model = AutoModelForCausalLM.from_pretrained(weights).eval()
    with torch.no_grad():
        logits = model(tokens[:-1].view(20, 16)).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[1:], reduction="none").view(20, 16)
    expected = losses.mean(dim=1).std().item() / math.sqrt(20)
    assert result.stderr == pytest.approx(expected, rel=1e-4)
    assert measured(weights, data_folder, limit=16 * 20 + 1, batch=1).stderr == pytest.approx(
        result.stderr, rel=1e-4
    )


def test_one_window_has_no_standard_error(weights: Path, data_folder: Path) -> None:
    assert measured(weights, data_folder, limit=17).stderr is None
    assert measured(weights, data_folder, limit=18).stderr is not None


def test_collecting_losses_changes_no_bit(weights: Path) -> None:
    model, collected = load_model(weights), list[torch.Tensor]()
    tokens = torch.randint(264, (5, 16), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1).clone()
    targets[0, :9] = IGNORE
    with torch.no_grad():
        loss = model(tokens, targets, collected.append)
        assert torch.equal(model(tokens, targets), loss)
        hidden, total = model.transformer(tokens).flatten(0, 1), torch.zeros(())
        for logits, part in zip(
            torch.split(model.logits(tokens).flatten(0, 1), rows_in_cache(264)),
            torch.split(targets.flatten(), rows_in_cache(264)),
            strict=True,
        ):
            total += F.cross_entropy(logits, part, ignore_index=IGNORE, reduction="sum")
    assert torch.equal(loss, total / (targets != IGNORE).sum())
    assert len(torch.cat(collected)) == len(hidden) == targets.numel()
    assert torch.cat(collected).sum() == pytest.approx(total.item(), rel=1e-6)
    assert not torch.cat(collected)[:9].any()


def test_the_batch_size_does_not_change_the_loss(weights: Path, data_folder: Path) -> None:
    losses = [measured(weights, data_folder, batch=b).loss for b in (1, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_changed_weights_are_cast_again(weights: Path, data_folder: Path) -> None:
    """Autocast may reuse cast weights only within one evaluation."""
    model, reader = load_model(weights), open_data(data_folder).reader("val")

    def loss() -> float:
        return evaluate(
            model, reader, load_tokenizer("byte").token_bytes(),
            block_size=16, batch=4, device=CPU, precision="bfloat16", limit=200,
        ).loss  # fmt: skip

    first = loss()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    changed = loss()
    assert abs(changed - first) > 0.01
    save_weights(
        weights, model.state_dict(), Shape(model.config, 16, 256), Origin(3, 4, 0.1, "test")
    )
    model = load_model(weights)
    assert loss() == changed


def test_a_split_with_one_token_raises(weights: Path, data_folder: Path) -> None:
    with pytest.raises(UserError, match="too few to predict any"):
        measured(weights, data_folder, limit=1)


def test_an_interrupted_evaluation_restores_the_training_mode(
    weights: Path, data_folder: Path
) -> None:
    model = load_model(weights).train()

    def stop(done: int, total: int) -> None:
        raise Interrupted("SIGINT", 130)

    with pytest.raises(Interrupted):
        evaluate(
            model, open_data(data_folder).reader("val"), load_tokenizer("byte").token_bytes(),
            block_size=16, batch=4, device=CPU, precision="float32", on_progress=stop,
        )  # fmt: skip
    assert model.training


def test_overflow_and_empty_text() -> None:
    assert LossResult(1000.0, 10, 10, 0.1).perplexity is None
    assert LossResult(1.0, 1, 0, 0.1).bits_per_byte is None
