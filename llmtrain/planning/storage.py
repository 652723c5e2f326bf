"""Bytes on disk of a whole run: snapshots, averages and states, by the rules by which the trainer saves.

Why: a run of 70,000 steps that fills the disk at step 60,000 was planned wrong. The tensors are counted;
the headers of their files and the JSON beside them are a few kilobytes a folder and are not.

    storage = run_storage(config); storage.total
"""

from dataclasses import dataclass

from llmtrain.config.schema import RunConfig
from llmtrain.config.sections import (
    AverageConfig,
    EmaConfig,
    LawaConfig,
    PowerEmaConfig,
    RunningMeanConfig,
)
from llmtrain.planning.activations import FLOAT
from llmtrain.planning.architecture import Architecture
from llmtrain.planning.memory import bytes_held, moments


@dataclass(frozen=True)
class Saved:
    """Folders of one kind."""

    label: str
    count: int
    bytes_each: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.count * self.bytes_each


@dataclass(frozen=True)
class Storage:
    """What lies on disk when the run has ended."""

    snapshots: Saved
    averages: tuple[Saved, ...]
    states: Saved
    states_saved: int
    """States saved in all; the older ones are gone."""

    @property
    def total(self) -> int:
        """Bytes at the end."""
        return (
            self.snapshots.bytes + sum(saved.bytes for saved in self.averages) + self.states.bytes
        )

    @property
    def largest(self) -> int:
        """Bytes at the fullest moment: the last state is durable before the oldest one goes."""
        return self.total + (self.states.bytes_each if self.states_saved > self.states.count else 0)


def snapshot_steps(config: RunConfig) -> list[int]:
    """The steps of snapshots: each `snapshot_every` once warm-up is over, and the last step."""
    return [
        s
        for s in _multiples(config.checkpoint.snapshot_every, config)
        if s > config.schedule.warmup_steps
    ]


def snapshot_bytes(config: RunConfig) -> int:
    """Of one folder of weights, float32."""
    return FLOAT * Architecture(config.model, config.data.block_size).stored


def run_storage(config: RunConfig) -> Storage:
    """What the run leaves on disk, from an uninterrupted start to its end."""
    model = Architecture(config.model, config.data.block_size)
    state = FLOAT * (model.parameters + moments(config, model))
    # One that may go back saves where it began.
    states = len(_multiples(config.checkpoint.state_every, config)) + config.may_rewind
    state += sum(bytes_held(each) for each in config.averages) * model.parameters
    return Storage(
        snapshots=Saved("snapshots", len(snapshot_steps(config)), snapshot_bytes(config)),
        averages=tuple(_saved(each, config) for each in config.averages),
        states=Saved("states", min(states, config.checkpoint.keep_states), state),
        states_saved=states,
    )


def _multiples(every: int, config: RunConfig) -> list[int]:
    """Multiples of `every`, and the last step."""
    last = config.train.max_steps
    return [*range(every, last, every), last]


def _saved(average: AverageConfig, config: RunConfig) -> Saved:
    """The folders of one online average: saved with a snapshot, once there is an average."""
    grid = set(_multiples(config.save_every(average), config))
    steps = [s for s in snapshot_steps(config) if s in grid and _ready(average, s, config)]
    files = 2 if isinstance(average, RunningMeanConfig) else 1  # and what the mean lost by rounding
    return Saved(f"averages/{average.label}", len(steps), files * snapshot_bytes(config))


def _ready(average: AverageConfig, step: int, config: RunConfig) -> bool:
    """Whether enough updates have happened by `step`."""
    first = (
        1 if isinstance(average, EmaConfig | PowerEmaConfig) else config.schedule.warmup_steps + 1
    )
    start = average.start if average.start is not None else first
    updates = step // average.every - max(start - 1, 0) // average.every
    return updates >= (average.window if isinstance(average, LawaConfig) else 1)
