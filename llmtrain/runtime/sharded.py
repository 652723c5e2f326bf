"""Sharded tensors (DTensor): access a shard, gather full tensors, copy full tensors back."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard without a copy, or `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local(like: Tensor, shard: Tensor) -> Tensor:
    """Return a tensor placed like `like` whose local shard, there or on the CPU, is `shard`."""
    if not isinstance(like, DTensor):
        return shard
    mesh = like.device_mesh
    if shard.device.type != mesh.device_type:
        mesh = _cpu_mesh(mesh)
    return DTensor.from_local(
        shard, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def full_tensor(like: Tensor, shard: Tensor) -> Tensor:
    """Gather the tensor placed like `like` from its shards on all ranks (a collective call)."""
    tensor = from_local(like, shard)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_on_rank_zero(
    parameters: Mapping[str, Tensor], shards: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gather full tensors in the host memory of rank 0, one at a time (a collective call).

    Each shard is placed like the parameter of its name. Other ranks return an empty dictionary.
    Unsharded tensors are returned as they are, on all ranks.
    """
    gathered = {}
    for name, shard in shards.items():
        like = parameters[name]
        if not isinstance(like, DTensor):
            gathered[name] = shard
            continue
        full = full_tensor(like, shard.detach().to(like.device))
        if torch.distributed.get_rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def shard_like(like: Tensor, full: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor that each rank has, sharded like `like`."""
    if not isinstance(like, DTensor):
        return full
    # Without a source rank, each rank slices its own copy and nothing is sent.
    sharded = distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return to_local(sharded)


@torch.no_grad()
def copy_full_tensor(target: Tensor, full: Tensor) -> None:
    """Copy a full tensor that each rank has into the shards of `target`."""
    to_local(target).copy_(shard_like(target, full))


@torch.no_grad()
def load_shards(model: nn.Module, shards: Mapping[str, Tensor]) -> None:
    """Copy shards by parameter name into a model in place; each has its parameter's local shape."""
    for name, parameter in model.named_parameters():
        target, source = to_local(parameter), shards[name]
        if target.shape != source.shape:
            shapes = f"{tuple(source.shape)}, expected {tuple(target.shape)}"
            raise ValueError(f"{name} has shape {shapes}")
        target.copy_(source)


@functools.cache
def _cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Create the same mesh for host memory, once (a collective call)."""
    return init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names)
