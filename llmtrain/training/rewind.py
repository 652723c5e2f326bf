"""Going back: which state a run rewinds to, and what becomes of all that came after it.

Why: after a spike, training goes on from before it with other data (PaLM, Chowdhery et al. 2022,
section 5.1). Weights of the stretch that is taken back must not be averaged with those of the new
one, and none of it may be lost: it is kept as `step-…-rewound`, of a second rewind as `step-…-rewound-2`.

    state = state_before(run, incident, config, warn); take_back(run, state.progress.step)
"""

from collections.abc import Callable

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed
from llmtrain.storage.commit import remove_folder
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import (
    TrainingCheckpoint,
    TrainingProgress,
    newest_state,
    regular,
    set_aside,
)
from llmtrain.training.spikes import SpikeEvent


def state_before(
    run: RunFolder,
    incident: SpikeEvent,
    progress: TrainingProgress,
    config: RunConfig,
    warn: Callable[[str], None],
) -> TrainingCheckpoint:
    """The newest state at least `spikes.rewind_steps` before the incident, its progress brought up to now.

    Where the run began, or last went back to, later than that: its oldest state. The batches from there
    to the incident's are passed over: batch `step` becomes batch `step + progress.passed_batches`.

    Raises:
        RunFailed: there were too many rewinds, or there is no state.
    """
    spikes = config.spikes
    if len(progress.rewinds) >= spikes.max_rewinds:
        raise RunFailed(
            f"step {incident.step:,} would be rewind {spikes.max_rewinds + 1}: the run does not become stable",
            hint="lower optimizer.lr, or raise schedule.warmup_steps or spikes.max_rewinds",
        )
    steps = regular(list(step_folders(run.states)), config.checkpoint.state_every)
    old = [step for step in steps if step <= incident.step - spikes.rewind_steps]
    state = newest_state(run, warn, among=old or steps[:1])
    if state is None:
        raise RunFailed(
            f"step {incident.step:,} cannot be rewound: {run.states} holds no state",
            hint="the folder was emptied while the run was training: restore it",
        )
    back = state.progress
    passed = incident.step + progress.passed_batches - back.step
    record = {
        "step": back.step,
        "rewound_from": incident.step,
        "passed_batches": passed,
        **incident.reason(),
    }
    back.passed_batches = passed
    back.rewinds = [*progress.rewinds, record]
    back.seconds, back.wandb_id = progress.seconds, progress.wandb_id
    back.skipped = progress.skipped
    back.micro_batch, back.micro_batch_for = progress.micro_batch, progress.micro_batch_for
    return state


def take_back(run: RunFolder, step: int) -> None:
    """Set aside the snapshots and averages after `step`, and remove the states after it."""
    for later, folder in step_folders(run.states).items():
        if later > step:
            remove_folder(folder)
    for parent in (run.snapshots, *run.averages.glob("[!.]*")):
        for later, folder in step_folders(parent).items():
            if later > step:
                set_aside(folder, "rewound")
