"""One process of a training run: its model, whole or sharded, compiled or not, and its optimizer.

Why not in the trainer: a step is the same for DDP, FSDP2 and a single process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.gpt import GPT
from llmtrain.planning.memory import (
    LESS_MEMORY,
    USABLE,
    Layout,
    check_batch,
    device_memory,
    peak,
    shortage,
    smallest_peak,
)
from llmtrain.runtime.device import (
    Precision,
    autocast,
    available_memory,
    resolve_compile,
    resolve_precision,
)
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import copy_full_tensor
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.optimizers.adamw import AdamW

Log = Callable[[str], None]
Device = torch.device
Forward = Callable[[Tensor], Tensor]
Parallel = Literal["ddp", "fsdp", "hsdp"]

_OOM_MESSAGES = (
    "can't allocate memory",
    "can't start new thread",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
    "MPS backend out of memory",
)
"""Messages of out-of-memory errors of general types."""


@dataclass
class Worker:
    """The model in this process and everything needed to compute a step with it."""

    config: RunConfig
    world: World
    device: torch.device
    precision: Precision
    parallel: Parallel | None
    """None in a single process with whole weights."""
    to_compile: bool
    model: GPT
    optimizer: AdamW
    forward: nn.Module
    """The module to call in training: the model, or DDP around it."""
    warn: Log
    is_compiled: bool = False
    uses_cuda_graphs: bool = False

    @property
    def is_sharded(self) -> bool:
        """True if each process holds a part of every weight."""
        return self.parallel in ("fsdp", "hsdp")

    @property
    def layout(self) -> Layout:
        """Distribution of the weights, for memory estimates."""
        return _layout(self.world, self.device, self.precision, self.parallel)

    @property
    def autocast_precision(self) -> Precision:
        """Precision for autocast; FSDP casts the weights itself."""
        return "float32" if self.is_sharded else self.precision

    @property
    def sequences(self) -> int:
        """Sequences of each batch that this process trains on."""
        return self.config.batch_size // self.world.size

    def backward(self, forward: nn.Module, windows: Tensor, parts: int = 1) -> Tensor:
        """Add the gradients of `loss / parts` for a micro-batch; return that value, shape ()."""
        with autocast(self.device, self.autocast_precision):
            loss: Tensor = forward(windows[:, :-1], windows[:, 1:]) / parts
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return loss.detach()

    def dummy_pass(self, forward: nn.Module, sequences: int) -> None:
        """Run a forward and backward pass over arbitrary tokens, laid out as a real batch."""
        length = self.config.data.block_size + 1
        windows = torch.arange(sequences * length, device=self.device).view(sequences, length)
        self.backward(forward, windows % self.config.model.vocab_size).item()


def make_worker(config: RunConfig, world: World, device: torch.device, warn: Log) -> Worker:
    """Build the model at step 0 and its optimizer."""
    precision = resolve_precision(config.train.precision, device)
    parallel = resolve_parallel(config, world, device, precision)
    to_compile, reason = resolve_compile(config.train.compile, device)
    if reason is not None:
        warn(reason)
    layout = _layout(world, device, precision, parallel)
    _warn_about_memory(config, world, device, layout, warn)
    model = build_model(config, parallel, world, device, precision)
    if parallel is None and device.type == "cpu" and not to_compile:
        for block in model.transformer.h:
            block.register_forward_pre_hook(_run_python_in_backward)
    shared = (config, world, device, precision, parallel, to_compile)
    return Worker(*shared, model, build_optimizer(model, config.optimizer), model, warn)


def _layout(
    world: World, device: torch.device, precision: Precision, parallel: Parallel | None
) -> Layout:
    return Layout(
        world.local_size if parallel == "hsdp" else world.size,
        "fsdp" if parallel in ("fsdp", "hsdp") else "ddp",
        2 if precision == "bfloat16" else 4,
        cuda=device.type == "cuda",
    )


def _warn_about_memory(
    config: RunConfig, world: World, device: torch.device, layout: Layout, warn: Log
) -> None:
    """Warn if less memory is free than the planned peak, before the model is allocated."""
    available = available_memory(device) / (1 if device.type == "cuda" else world.local_size)
    if problem := shortage(smallest_peak(config, layout), available):
        warn(f"{problem}; {LESS_MEMORY}")


def _run_python_in_backward(block: nn.Module, inputs: tuple[Tensor]) -> None:
    """Let signal handlers run after each block's backward pass, which otherwise stays in C++."""
    if inputs[0].requires_grad:
        inputs[0].register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]  # torch


def resolve_parallel(
    config: RunConfig, world: World, device: torch.device, precision: Precision
) -> Parallel | None:
    """Return how the weights are distributed, or raise a UserError for conflicting settings."""
    check_batch(config, world.size)
    setting = config.train.parallel
    if config.train.compile == "cuda-graphs" and (world.size > 1 or setting in ("fsdp", "hsdp")):
        problem = "train.compile: cuda-graphs needs a single process with whole weights"
        raise UserError(problem, hint="--set train.compile=true")
    if setting == "hsdp" and world.sums([world.local_size])[0] != world.local_size * world.size:
        problem = "train.parallel: hsdp needs the same number of processes on each machine"
        raise UserError(problem, hint="--set train.parallel=fsdp")
    if setting in ("fsdp", "hsdp"):
        return setting
    if world.size == 1:
        return None
    if setting == "auto" and device.type == "cuda":
        layout = Layout(world.size, "ddp", 2 if precision == "bfloat16" else 4, cuda=True)
        room = world.on_rank_zero(lambda: torch.cuda.get_device_properties(device).total_memory)
        smallest = config.with_micro_batch(1) if config.train.micro_batch == "auto" else config
        if peak(device_memory(smallest, layout)).total > USABLE * room:
            return "fsdp"
    return "ddp"


def build_model(
    config: RunConfig, parallel: Parallel | None, world: World, device: Device, precision: Precision
) -> GPT:
    """Build the model at step 0; if it is sharded, no process holds the whole model."""
    if parallel in (None, "ddp"):
        model = GPT(config.model, config.data.block_size, config.seed).to(device)
    else:
        with torch.device("meta"):
            model = GPT(config.model, config.data.block_size)
        _shard(model, parallel, world, device, precision)
        model.to_empty(device=device)
        parameters = dict(model.named_parameters())
        for name, value in model.initial_weights(config.seed):
            copy_full_tensor(parameters[name], value)
    for block in model.transformer.h:
        block.recompute = config.train.activation_checkpointing  # type: ignore[assignment]  # a Block
    return model


def _shard(
    model: GPT, parallel: str | None, world: World, device: torch.device, precision: Precision
) -> None:
    """Shard block by block: gather in the compute precision, reduce in float32."""
    if parallel == "hsdp":
        shape = (world.size // world.local_size, world.local_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def grad_sync(forward: nn.Module, enabled: bool) -> Iterator[None]:
    """Enable or disable gradient reduction across processes in the backward passes of the block."""
    if isinstance(forward, DistributedDataParallel) and not enabled:
        with forward.no_sync():
            yield
        return
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(enabled)
    yield


def compile_model(worker: Worker, micro_batch: int) -> nn.Module:
    """Compile the model if asked for, and return the module to call in training.

    DDP wraps it first: torch then splits the graph at gradient buckets, so reduction overlaps the
    backward pass.
    """
    module: nn.Module = worker.model
    if worker.parallel == "ddp":
        # Not `static_graph`: it saves nothing here and fails with several micro-batches.
        devices = [worker.device] if worker.device.type == "cuda" else None
        module = DistributedDataParallel(
            worker.model, device_ids=devices, gradient_as_bucket_view=True
        )
    if worker.to_compile:
        _compile(worker, module, micro_batch)
    return module


def allocate_grads(model: nn.Module) -> None:
    """Give every parameter a zero gradient for the backward pass to add to.

    Without one, torch adopts the CUDA graph's output buffer as the gradient, and the next replay
    overwrites it (pytorch/pytorch#96693).
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _compile(worker: Worker, module: nn.Module, micro_batch: int) -> None:
    """Compile the transformer body as one graph, or FSDP's blocks separately."""
    model = worker.model
    parts: list[nn.Module] = list(model.transformer.h) if worker.is_sharded else [model.transformer]
    # One dynamic graph from the start: otherwise a step's graph depends on the steps before it.
    dynamic = True if worker.config.data.block_warmup is not None else None
    worker.uses_cuda_graphs = worker.config.train.compile == "cuda-graphs"
    mode = "reduce-overhead" if worker.uses_cuda_graphs else None  # torch's name for CUDA graphs
    for part in parts:
        compiled = torch.compile(part.forward, dynamic=dynamic, mode=mode)
        part.forward = _only_in_training(part, compiled)
    model.fused_loss = worker.device.type == "cuda"  # slower than cache-sized chunks on a CPU
    worker.is_compiled = True
    failure = _compile_failure(worker, module, micro_batch)
    if failure and worker.is_sharded and worker.world.size > 1:
        # The other processes block in the middle of this pass.
        raise RunFailed(f"torch.compile failed ({failure})", hint="--set train.compile=false")
    if worker.world.sums([failure is not None])[0]:
        where = failure or "on another process"
        worker.warn(f"torch.compile failed ({where}): training uncompiled")
        model.fused_loss = worker.is_compiled = worker.uses_cuda_graphs = False
        for part in parts:
            del part.forward


def _only_in_training(part: nn.Module, compiled: Forward) -> Forward:
    """Run evaluation uncompiled: compiling for each of its many shapes takes too long."""
    eager = part.forward

    def forward(inputs: Tensor) -> Tensor:
        result: Tensor = compiled(inputs) if part.training else eager(inputs)
        return result

    return forward


def _compile_failure(worker: Worker, module: nn.Module, micro_batch: int) -> str | None:
    """Return the type of error that compiling raises in a dummy pass, or None.

    DDP reduces nothing in it. CUDA graphs are recorded in pass two and replayed in pass three.
    """
    try:
        for _ in range(3 if worker.uses_cuda_graphs else 1):
            if worker.uses_cuda_graphs:
                allocate_grads(worker.model)
            with grad_sync(module, worker.parallel != "ddp"):
                worker.dummy_pass(module, micro_batch)
    except Exception as error:  # the backends of torch.compile raise any type of error
        # Out of memory is not a compile failure: the first step handles it.
        return None if is_out_of_memory(error) else type(error).__name__
    finally:
        worker.model.zero_grad(set_to_none=True)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or the host ran out of memory."""
    has_message = any(message in str(error) for message in _OOM_MESSAGES)
    return has_message or isinstance(error, torch.OutOfMemoryError | MemoryError)
