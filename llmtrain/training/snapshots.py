"""Snapshots and online averages: one Hugging Face folder each, of however many processes have the weights.

Why apart from the state: a state is read by the processes of a run and may lie in parts; these folders
are read by everything else, and are whole.

    commit_weights(run.snapshot(1000), model, parameters, world, shape, origin)
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from llmtrain.averaging.checkpoints import RESIDUAL_FILE
from llmtrain.checkpoint import Origin, Shape, bytes_of, save_tensors, save_weights
from llmtrain.files import staged_folder
from llmtrain.sharded import local, whole
from llmtrain.training.distributed import World


def commit_weights(
    target: Path,
    model: nn.Module,
    parts: Mapping[str, Tensor],
    world: World,
    shape: Shape,
    origin: Origin,
    *,
    residual: Mapping[str, Tensor] | None = None,
    provenance: object = None,
) -> None:
    """Write a folder of weights of which each process has its part; all processes call it together.

    Args:
        target: the final name.
        model: says how the parts are spread.
        parts: by parameter name, float32.
        world: the processes.
        shape: the model's shape.
        origin: goes to `training.json`.
        residual: of a running mean, what the rounding to float32 lost; by parameter name.
        provenance: of an average.

    Raises:
        WriteFailed: the disk is full or cannot be written to.
    """
    parameters = dict(model.named_parameters())
    weights = whole(parameters, {name: local(part.detach()) for name, part in parts.items()})
    lost = None if residual is None else whole(parameters, residual)

    def write() -> None:
        needed = bytes_of(weights) + bytes_of(lost or {})
        with staged_folder(target, replace=True, needed=needed) as folder:
            save_weights(folder, weights, shape, origin, provenance)
            if lost is not None:
                save_tensors(folder / RESIDUAL_FILE, lost, shape)

    world.on_first(write)
