"""A model on several processes: whole on each (DDP), or in shards (FSDP2), as torch has them.

Why not in the loop: a step is the same however the weights lie. What differs is how the model is built,
wrapped and told when to exchange gradients: once a step, not once a micro-batch.

    model = build_model(config, "fsdp", world, device, precision); forward = wrapped(model, "fsdp", device)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.planning.memory import USABLE, Layout, check_batch, device_memory, peak
from llmtrain.runtime.device import Precision
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import copy_full_tensor

Parallel = Literal["ddp", "fsdp", "hsdp"]


def resolve_parallel(
    config: RunConfig, world: World, device: torch.device, precision: Precision
) -> Parallel | None:
    """How the weights will lie; None: on one process, as they are.

    Raises:
        UserError: a step does not divide over the processes, or CUDA graphs are asked of several.
    """
    check_batch(config, world.size)
    setting = config.train.parallel
    if config.train.compile == "cuda-graphs" and (world.size > 1 or setting in ("fsdp", "hsdp")):
        raise UserError(
            "train.compile cuda-graphs is for one process, with its weights whole",
            hint="--set train.compile=true",
        )
    if setting == "hsdp" and world.sums([world.local_size])[0] != world.local_size * world.size:
        raise UserError(
            "train.parallel hsdp needs the same number of processes on each machine",
            hint="or use fsdp",
        )
    if setting in ("fsdp", "hsdp"):
        return setting
    if world.size == 1:
        return None
    if setting == "auto" and device.type == "cuda":
        layout = Layout(world.size, "ddp", 2 if precision == "bfloat16" else 4, cuda=True)
        room = world.on_rank_zero(lambda: torch.cuda.get_device_properties(device).total_memory)
        asked = config.train.micro_batch
        smallest = config.with_micro_batch(1) if asked == "auto" else config
        if peak(device_memory(smallest, layout)).total > USABLE * room:
            return "fsdp"
    return "ddp"


def build_model(
    config: RunConfig,
    parallel: Parallel | None,
    world: World,
    device: torch.device,
    precision: Precision,
) -> GPT:
    """The model at step 0, on `device`; where it is spread, each process holds its shard alone.

    Its weights are the same in every case: sharded ones are made parameter by parameter, never as a whole.
    """
    if parallel in (None, "ddp"):
        model = GPT(config.model, config.data.block_size, config.seed).to(device)
    else:
        with torch.device("meta"):
            model = GPT(config.model, config.data.block_size)
        _shard(model, _mesh(parallel, world, device), precision)
        model.to_empty(device=device)
        parameters = dict(model.named_parameters())
        for name, value in model.initial_weights(config.seed):
            copy_full_tensor(parameters[name], value)
    for block in model.transformer.h:
        block.recompute = config.train.activation_checkpointing  # type: ignore[assignment]  # it is a Block
    return model


def _mesh(parallel: Parallel | None, world: World, device: torch.device) -> DeviceMesh:
    if parallel == "hsdp":
        shape = (world.size // world.local_size, world.local_size)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))


def _shard(model: GPT, mesh: DeviceMesh, precision: Precision) -> None:
    """FSDP2 by block: gathered in the precision of matrix products, reduced in float32."""
    product = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=product, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def wrap_parallel(forward: nn.Module, parallel: Parallel | None, device: torch.device) -> nn.Module:
    """The module to call in training: with DDP around it where that is how gradients are exchanged.

    Not with `static_graph`: every pass uses every parameter, so that it would save nothing, and torch fails
    (an assertion of its own) where the first backward pass of all exchanges nothing: at several micro-batches.
    """
    if parallel != "ddp":
        return forward
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def grad_sync(forward: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the backward pass inside the block adds up the gradients of all processes."""
    if isinstance(forward, DistributedDataParallel) and not wanted:
        with forward.no_sync():
            yield
        return
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(wanted)
    yield


@contextmanager
def without_backward(model: nn.Module) -> Iterator[None]:
    """For forward passes alone: however the block ends, the weights that FSDP gathered lie in shards again."""
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()  # a backward pass would have done it
