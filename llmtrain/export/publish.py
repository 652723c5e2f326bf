"""Export weights as a Hugging Face repository or as nanoGPT's `ckpt.pt`."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.checkpoints import gpt2_folder
from llmtrain.checkpoints.checkpoint import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, load_origin
from llmtrain.checkpoints.nanogpt import ACTIVATION_KEY
from llmtrain.checkpoints.resolve import Target
from llmtrain.checkpoints.shared_files import text_files
from llmtrain.errors import UserError
from llmtrain.evaluation.generation import tokenizer_of
from llmtrain.evaluation.results import stored_results
from llmtrain.export.model_card import model_card
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import Tokenizer
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.json_files import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    target: Target,
    to: Path,
    *,
    dtype: str = "fp32",
    form: Literal["hf", "nanogpt"] = "hf",
    name: str,
    tokenizer: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> None:
    """Write GPT-2 weights to the new folder `to`, rounded to `dtype` (a key of DTYPES).

    `name` is the title of the model card, OWNER/NAME or a folder.
    """
    if to.exists():
        raise UserError(f"{to} already exists", hint="choose a new folder: --to DIR")
    text_tokenizer = tokenizer_of(target.path, gpt2_folder.load_shape(target.path), tokenizer)
    model = gpt2_folder.load_model(target.path)
    number = DTYPES[dtype]
    _check_range(target.path, model, number)
    with staged_folder(to, needed=model.n_parameters() * number.itemsize) as folder:
        if form == "hf":
            _write_repository(folder, target, model, text_tokenizer, number, name)
        else:
            if model.config.activation != "gelu":
                warn(
                    "nanoGPT uses the exact GELU and this model the tanh form: "
                    "logits differ by about 0.001"
                )
            with (folder / "ckpt.pt").open("wb") as file:  # given a path, torch hides the OSError
                torch.save(nanogpt_checkpoint(model, target, number), file)


def _check_range(path: Path, model: GPT, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        largest = float(parameter.detach().abs().max())
        if not largest <= limit:  # also true for NaN
            raise UserError(
                f"{path}: {name} contains {largest:g}, which is not a finite {_name(dtype)} number",
                hint="use --dtype bf16 or fp32 for large weights; NaN means damaged weights",
            )


def _write_repository(
    folder: Path, target: Target, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, name: str
) -> None:
    shape = gpt2_folder.load_shape(target.path)
    gpt2_folder.save_tensors(folder / WEIGHTS_FILE, dict(model.state_dict()), shape, dtype=dtype)
    write_json(
        folder / CONFIG_FILE, gpt2_folder.hugging_face_config(shape) | {"dtype": _name(dtype)}
    )
    card = model_card(target, shape, tokenizer, dtype=_name(dtype), name=name)
    texts = text_files(shape, tokenizer) | {"README.md": card}
    for file, content in texts.items():
        (folder / file).write_text(content, encoding="utf-8")
    if load_origin(target.path) is not None:
        shutil.copyfile(target.path / TRAINING_FILE, folder / TRAINING_FILE)


def nanogpt_checkpoint(model: GPT, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """Return a checkpoint for nanoGPT's `sample.py` and `train.py --init_from=resume`.

    nanoGPT cannot divide the attention logits of layer i by i + 1, so the query weights are
    divided. nanoGPT always applies the exact GELU. The file records the activation function of the
    model, which nanoGPT ignores. The optimizer state is that of a new optimizer.
    """
    config = model.config
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.scale_attn_by_inverse_layer_idx:
        for layer in range(config.n_layer):
            for kind in ("weight", "bias") if config.bias else ("weight",):
                weights[f"transformer.h.{layer}.attn.c_attn.{kind}"][: config.n_embd] /= layer + 1
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    optimizer = _new_optimizer_state(weights)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    origin = load_origin(target.path)
    arguments = config.model_dump(exclude={"scale_attn_by_inverse_layer_idx", "activation"})
    return {
        "model": weights,
        "optimizer": optimizer,
        "model_args": arguments | {"block_size": model.block_size},
        "iter_num": origin.step if origin else 0,
        "best_val_loss": _best_val_loss(target),
        "config": {},
        ACTIVATION_KEY: config.activation,
    }


def _new_optimizer_state(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of a new AdamW with nanoGPT's two groups: matrices and the rest."""
    groups = [
        {"params": [t for t in weights.values() if t.dim() >= 2], "weight_decay": 0.1},
        {"params": [t for t in weights.values() if t.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def _best_val_loss(target: Target) -> float:
    """Return the loss measured on most validation tokens, or nanoGPT's initial value 1e9."""
    rows = stored_results(target.run) if target.run else []
    wanted = (target.label, target.step, "val")
    found = [row for row in rows if (row.label, row.step, row.split) == wanted]
    return max(found, key=lambda row: row.tokens).loss if found else 1e9


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
