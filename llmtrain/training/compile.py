"""The module that a run trains with: compiled where that was asked for and works, and exchanging gradients.

Why the body alone is compiled: embedding to last norm is one graph without a break; the loss of the head
has its own way with memory. Blocks in shards are compiled one by one, inside of what gathers and frees
their weights. Within DDP that one graph is compiled in pieces, one for each bucket of gradients, so that the
exchange of one goes on while the backward pass computes the next: therefore it is compiled in a call of DDP.

Why CUDA graphs are asked for and no default: what they save is the host's time, which a GPU waits for in small
models alone, and their memory is kept apart from all else. They are torch's own, made and replayed by what
torch.compile gives; the optimizer's kernels are few, and stay outside.

    trainer.forward = compiled(trainer, warn)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmtrain.errors import RunFailed
from llmtrain.training.micro_batch import is_out_of_memory, one_pass
from llmtrain.training.parallel import grad_sync, wrap_parallel

if TYPE_CHECKING:
    from llmtrain.training.trainer import Trainer


def compile_model(trainer: "Trainer", warn: Callable[[str], None]) -> nn.Module:
    """The module to call in training; in evaluation mode the same model runs uncompiled.

    Args:
        trainer: with its model, at any step.
        warn: tells why the model is trained uncompiled where that was not asked for.

    Raises:
        RunFailed: compiling fails where other processes cannot be told.
    """
    module = wrap_parallel(trainer.model, trainer.parallel, trainer.device)
    if trainer.to_compile:
        _compile(trainer, module, warn)
    return module


def allocate_grads(model: nn.Module) -> None:
    """Let every parameter have a gradient, of zeros, for a backward pass to add to.

    Where there is none, torch takes over what the pass gives; of a CUDA graph that is memory which its next
    replay writes over, and the gradients of several micro-batches come out wrong (pytorch/pytorch#96693).
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _compile(trainer: "Trainer", module: nn.Module, warn: Callable[[str], None]) -> None:
    model, in_shards = trainer.model, trainer.parallel in ("fsdp", "hsdp")
    parts: list[nn.Module] = list(model.transformer.h) if in_shards else [model.transformer]
    # One program for all lengths from the start: else which one runs a step depends on those before it.
    dynamic = True if trainer.config.data.block_warmup is not None else None
    trainer.replays = trainer.config.train.compile == "cuda-graphs"
    mode = "reduce-overhead" if trainer.replays else None  # torch's name for CUDA graphs
    for part in parts:
        part.forward = _in_training(part, torch.compile(part.forward, dynamic=dynamic, mode=mode))
    model.fused_loss = (
        trainer.device.type == "cuda"
    )  # on a CPU, slower than pieces that fit the cache
    trainer.is_compiled = True
    failure = _failure(trainer, module)
    if failure and in_shards and trainer.world.size > 1:
        raise RunFailed(  # the others wait in the middle of this one's pass
            f"torch.compile failed ({failure})", hint="--set train.compile=false trains without it"
        )
    if trainer.world.sums([failure is not None])[0]:
        warn(f"torch.compile failed ({failure or 'on another process'}): training uncompiled")
        model.fused_loss = trainer.is_compiled = trainer.replays = False
        for part in parts:
            del part.forward


def _in_training(part: nn.Module, fast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluations and samples come in too many shapes to compile each."""
    eager = part.forward

    def forward(inputs: Tensor) -> Tensor:
        result: Tensor = fast(inputs) if part.training else eager(inputs)
        return result

    return forward


def _failure(trainer: "Trainer", module: nn.Module) -> str | None:
    """What compiling fails with, if it does: seen in a forward and backward pass before the first of all.

    Replicas exchange nothing in it, so that a process where it fails leaves no other waiting. CUDA graphs are
    recorded in a second pass, and replayed in a third.
    """
    try:
        for _ in range(3 if trainer.replays else 1):
            if trainer.replays:
                allocate_grads(trainer.model)
            with grad_sync(module, trainer.parallel != "ddp"):
                one_pass(trainer, module, trainer.progress.micro_batch)
    except Exception as error:  # torch.compile fails with the exceptions of any of its back ends
        # Too little memory is no failure of it: the first step meets that too, and lowers the micro-batch.
        return None if is_out_of_memory(error) else type(error).__name__
    finally:
        trainer.model.zero_grad(set_to_none=True)
    return None
