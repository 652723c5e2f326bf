"""A set of weights as a repository that others run as it is: Hugging Face's, or nanoGPT's `ckpt.pt`.

Why, where snapshots are Hugging Face folders already: these hold float32 weights and nothing to read text
with. A repository has its tokenizer, says how to generate and where it comes from, and may be half as large.

    export(target, Path("exported"), dtype="bf16", form="hf", name="owner/name")
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.checkpoints.checkpoint import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE, load_origin
from llmtrain.checkpoints.gpt2_folder import (
    Shape,
    hugging_face_config,
    load_model,
    load_shape,
    save_tensors,
)
from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError
from llmtrain.evaluation.generation import tokenizer_of
from llmtrain.evaluation.results import stored_rows
from llmtrain.export.model_card import model_card
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import Tokenizer, tokenizer_files
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.json_files import write_json

Form = Literal["hf", "nanogpt"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NANOGPT_FILE = "ckpt.pt"


def export(
    target: Target,
    to: Path,
    *,
    dtype: str = "fp32",
    form: Form = "hf",
    name: str,
    tokenizer: str | None = None,
) -> None:
    """Write the weights of `target`, and what belongs to them, into the new folder `to`.

    Args:
        target: GPT-2 weights.
        to: the folder; it appears when it is complete.
        dtype: a key of `DTYPES`; numbers are rounded to the nearest.
        form: `hf` or `nanogpt`.
        name: what the model card calls it, OWNER/NAME or a folder.
        tokenizer: see `tokenizer_of`.

    Raises:
        UserError: `to` exists, the weights are no GPT-2, or a weight does not fit the dtype.
        WriteFailed: the disk is full or cannot be written to.
    """
    if to.exists():
        raise UserError(f"{to} exists already", hint="name a new folder: --to DIR")
    shape = load_shape(target.path)
    text = tokenizer_of(target.path, shape, tokenizer)
    model = load_model(target.path)
    _require_range(target.path, model, DTYPES[dtype])
    with staged_folder(to, needed=model.n_parameters() * DTYPES[dtype].itemsize) as folder:
        if form == "nanogpt":
            with (folder / NANOGPT_FILE).open(
                "wb"
            ) as file:  # torch's own files tell no reason when they fail
                torch.save(nanogpt_checkpoint(model, target, DTYPES[dtype]), file)
        else:
            _write_repository(folder, model, target, shape, text, dtype=DTYPES[dtype], name=name)


def _require_range(path: Path, model: GPT, dtype: torch.dtype) -> None:
    """Raise a UserError where a weight is not finite or would not stay so: float16 ends at 65,504."""
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        largest = float(parameter.detach().abs().max())
        if not largest <= limit:  # NaN compares with nothing
            raise UserError(
                f"{path}: {name} holds {largest:g}, which is no finite number of {_name(dtype)}",
                hint="--dtype bf16 or fp32 where it is finite; else the weights are damaged",
            )


def _write_repository(
    folder: Path,
    model: GPT,
    target: Target,
    shape: Shape,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    name: str,
) -> None:
    save_tensors(folder / WEIGHTS_FILE, dict(model.state_dict()), shape, dtype=dtype)
    write_json(folder / CONFIG_FILE, hugging_face_config(shape) | {"dtype": _name(dtype)})
    write_json(folder / "generation_config.json", generation_config(shape, tokenizer))
    for file, content in tokenizer_files(tokenizer, shape.block_size).items():
        (folder / file).write_text(content, encoding="utf-8")
    if load_origin(target.path) is not None:
        shutil.copyfile(target.path / TRAINING_FILE, folder / TRAINING_FILE)
    card = model_card(target, shape, tokenizer, dtype=_name(dtype), name=name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def generation_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """How transformers generates: within the context, and no id that stands for no text."""
    unused = list(range(tokenizer.vocab_size, shape.model.vocab_size))
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    return {
        **special,
        "max_length": shape.block_size,
        **({"suppress_tokens": unused} if unused else {}),
    }


def nanogpt_checkpoint(model: GPT, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """What nanoGPT's `train.py` saves (karpathy/nanoGPT) and its `sample.py` and `--init_from=resume` load.

    nanoGPT does not divide the attention logits of layer i (from 0) by i + 1: the queries' weights are divided
    here instead, which is the same model but for rounding. It computes GELU exactly where GPT-2 has the tanh
    form, which is out of reach here: logits differ by some thousandths. The optimizer is new, without moments.
    """
    shape = model.config
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shape.scale_attn_by_inverse_layer_idx:
        for layer in range(shape.n_layer):
            for kind in ("weight", "bias") if shape.bias else ("weight",):
                weights[f"transformer.h.{layer}.attn.c_attn.{kind}"][: shape.n_embd] /= layer + 1
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    origin = load_origin(target.path)
    sizes = {
        key: getattr(shape, key)
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "dropout")
    }
    return {
        "model": weights,
        "optimizer": _new_optimizer(weights),
        "model_args": sizes | {"block_size": model.block_size},
        "iter_num": origin.step if origin else 0,
        "best_val_loss": _loss(target),
        "config": {},
    }


def _new_optimizer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """State of an AdamW over nanoGPT's two groups, matrices and the rest, before its first step."""
    own = [
        tensor for name, tensor in weights.items() if name != "lm_head.weight"
    ]  # tied to the embedding
    matrices = [tensor for tensor in own if tensor.dim() >= 2]
    others = [tensor for tensor in own if tensor.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def _loss(target: Target) -> float:
    """The loss that `eval` measured of these weights; nanoGPT's 1e9 where it has not."""
    rows = stored_rows(target.run) if target.run else []
    losses = [
        r.loss for r in rows if (r.label, r.step, r.split) == (target.label, target.step, "val")
    ]
    return min(losses, default=1e9)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
