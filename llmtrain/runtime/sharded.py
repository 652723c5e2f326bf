"""Tensors that are spread over the processes of a run, seen from one of them.

Why: what a process does with its own part (averaging, copying, saving) is ordinary arithmetic on an
ordinary tensor. Only where a whole is wanted, in a snapshot or for another number of processes, does
it matter that it is a part; here, and nowhere else.

    mine = local(parameter); weights = whole(dict(model.named_parameters()), {"wte": mine})
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(like: Tensor, mine: Tensor) -> Tensor:
    """`mine` as this process's part of a tensor that is spread as `like` is.

    Args:
        like: a tensor, spread or not.
        mine: a part of the shape of `local(like)`, on the device of `like` or on the CPU.
    """
    if not isinstance(like, DTensor):
        return mine
    mesh = (
        like.device_mesh
        if mine.device.type == like.device_mesh.device_type
        else _on_cpu(like.device_mesh)
    )
    return DTensor.from_local(
        mine, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(parameters: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which `parts` are this process's; all processes call it together.

    Where nothing is spread these are the same tensors. Else they are gathered one after the other and
    kept in host memory by rank 0; the others get an empty dict.

    Args:
        parameters: by name, says how each is spread.
        parts: by name, of the shapes of `local(parameters[name])`.
    """
    gathered = {}
    for name, mine in parts.items():
        like = parameters[name]
        if not isinstance(like, DTensor):
            gathered[name] = mine
            continue
        full = made_whole(like, mine.detach().to(like.device))
        if torch.distributed.get_rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def made_whole(like: Tensor, mine: Tensor) -> Tensor:
    """The whole tensor on every process; all of them call it together.

    Args:
        like: says how it is spread, if it is.
        mine: this process's part, of the shape of `local(like)` and on its device.
    """
    spread = part_of(like, mine)
    return spread.full_tensor() if isinstance(spread, DTensor) else spread


def cut(like: Tensor, full: Tensor) -> Tensor:
    """This process's part, spread as `like` is, of a whole tensor which every process holds."""
    if not isinstance(like, DTensor):
        return full
    # No source: each process cuts its part from its own copy.
    return local(
        distribute_tensor(
            full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    )


def scatter(into: Tensor, full: Tensor) -> None:
    """Copy a whole tensor, which every process holds, into the parts of `into`."""
    with torch.no_grad():
        local(into).copy_(cut(into, full))


@torch.no_grad()
def overwrite(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Copy new weights into a model in place.

    Args:
        model: spread or not.
        parts: by parameter name, of the shapes of `local(parameter)`.
    """
    for name, parameter in model.named_parameters():
        mine, new = local(parameter), parts[name]
        if mine.shape != new.shape:
            raise ValueError(
                f"{name} has the shape {tuple(new.shape)} there and {tuple(mine.shape)} here"
            )
        mine.copy_(new)


@functools.cache
def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    """The same mesh for tensors in host memory; made by all processes together, once."""
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
