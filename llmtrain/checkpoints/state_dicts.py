"""Find the state dict in a training file, and check its tensors.

Trainers store the weights under one of `WEIGHTS_KEYS`, next to optimizer states and numbers. A file
in which several entries could be the weights is rejected, with the candidates in the message.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

WEIGHTS_KEYS = ("model", "net", "state_dict", "model_state_dict", "module")
"""Keys under which trainers store the weights."""

_TRAINER_STATE = re.compile(r"optim|sched|scaler|rng|callback|loop|loss|metric", re.IGNORECASE)
"""Keys of tensors that are not weights and are ignored without a note."""

_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefixes that torch.compile, FSDP and activation checkpointing add at any depth of a name."""

_PARALLEL = re.compile(r"^(?:module\.)+")
"""Prefix that DistributedDataParallel adds to every name."""

_COUNTERS = ("global_step", "iter_num", "num_updates", "iteration", "iter", "step")
_MAX_DEPTH = 4


class StateDict(NamedTuple):
    """The weights in a file."""

    tensors: dict[str, Tensor]
    """By name, without the prefixes of wrappers."""
    ignored: list[str]
    """Keys of tensors that were left out and may be weights, such as an EMA."""


def read_state_dict(path: Path, document: object) -> StateDict:
    """Return the weights in the content of a file of torch; raise a UserError if unclear."""
    ignored: list[str] = []
    for _ in range(_MAX_DEPTH):
        entries = document if isinstance(document, Mapping) else {}
        nested = [k for k, v in entries.items() if not isinstance(v, Tensor) and _has_tensor(v)]
        known = [k for k in nested if k in WEIGHTS_KEYS and isinstance(entries[k], Mapping)]
        if len(known) != 1:
            break
        ignored += [_quote(k) for k in _other_weights(entries) if k != known[0]]
        document = entries[known[0]]
    if nested:
        raise _unclear(path, entries, known or nested)
    return StateDict(_checked_tensors(path, entries), ignored)


def stored_position(document: object) -> tuple[int, int] | None:
    """Return (epoch, step) as the trainer stored them in the file, with 0 for a missing one.

    If the step counts the whole run, the epoch is 0, because trainers advance it at different
    times.
    """
    entries = document if isinstance(document, Mapping) else {}
    numbers = {k: v for k, v in entries.items() if type(v) is int}
    counter = next((key for key in _COUNTERS if key in numbers), None)
    if counter in _COUNTERS[:3]:
        return 0, numbers[counter]
    if counter is None and "epoch" not in numbers:
        return None
    return numbers.get("epoch", 0), numbers.get(counter, 0)


def _has_tensor(value: object) -> bool:
    """Return whether a container has a tensor at any depth; visit shared containers once."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            return True
        if id(item) not in seen and isinstance(item, Mapping | list | tuple | set):
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, Mapping) else item)
    return False


def _other_weights(entries: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of containers with tensors, and of tensors, that may be weights."""
    return [
        key
        for key, value in entries.items()
        if _has_tensor(value)
        and not _TRAINER_STATE.search(str(key))
        and not (isinstance(value, Tensor) and _is_number(value))
    ]


def _is_number(tensor: Tensor) -> bool:
    return not tensor.is_nested and tensor.numel() <= 1


def _unclear(path: Path, entries: Mapping[Any, Any], candidates: list[Any]) -> UserError:
    plain = [key for key, value in entries.items() if isinstance(value, Tensor)]
    plain_note = f", next to plain tensors such as {_quote(plain[0])}" if plain else ""
    first = next((k for k in candidates if not _TRAINER_STATE.search(str(k))), candidates[0])
    return UserError(
        f"cannot identify the weights in {path}: "
        f"it has tensors under {', '.join(map(_quote, candidates[:8]))}{plain_note}",
        hint=f"save the weights alone, such as torch.save(torch.load(FILE)[{_quote(first)}], NEW); "
        f"a single one of {', '.join(WEIGHTS_KEYS)} is found without this",
    )


def _checked_tensors(path: Path, entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    size = path.stat().st_size
    for key, tensor in entries.items():
        if not isinstance(tensor, Tensor):
            continue
        name = _PARALLEL.sub("", _WRAPPERS.sub("", str(key)))
        if name in tensors:
            raise UserError(
                f"{path} contains {name} twice, once as {key}",
                hint="save it with one of them",
            )
        if problem := _name_problem(name) or _tensor_problem(tensor, size):
            raise UserError(
                f"{path}: {name} cannot be read: {problem}",
                hint="do not trust this file, or re-save the tensor dense and .contiguous()",
            )
        tensors[name] = tensor.detach().resolve_neg()
    numbers_only = len(tensors) < len(entries) and all(map(_is_number, tensors.values()))
    if not tensors or numbers_only:  # a loss next to an epoch
        keys = ", ".join(_quote(key) for key in list(entries)[:8]) or "no entries"
        hint = f"expected a state dict, or one under a key such as {', '.join(WEIGHTS_KEYS)}"
        raise UserError(f"{path} contains no weights; it has {keys}", hint=hint)
    return tensors


def _name_problem(name: str) -> str | None:
    if name == "__metadata__" or name.encode(errors="replace").decode() != name:
        return "safetensors does not allow this name"
    return None


def _tensor_problem(tensor: Tensor, size: int) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "it is nested" if tensor.is_nested else f"its layout is {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"its device is {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"{tensor.dtype} is not supported"
    return f"it has {tensor.nbytes:,} bytes, more than the file" if tensor.nbytes > size else None


def _quote(key: object) -> str:
    return repr(str(key))
