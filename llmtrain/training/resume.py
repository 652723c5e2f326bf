"""Start of a run: at step 0, at its newest training checkpoint, or at another run's checkpoint.

A run folder is resumed only with an equivalent config and the same data, and is never overwritten.
After a spike, a rewind restarts training before it with other data (PaLM, Chowdhery et al. 2022,
section 5.1), and keeps the weights of the first attempt as `step-…-rewound`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llmtrain.checkpoints.checkpoint import CONFIG_FILE
from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.schema import RunConfig, flatten
from llmtrain.data.token_data import TokenData
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import remove_folder, remove_leftovers, write_atomically
from llmtrain.storage.integrity import INTEGRITY_FILE
from llmtrain.storage.json_files import read_events, read_json
from llmtrain.storage.run_folder import (
    RunFolder,
    is_run,
    require_run,
    step_folders,
    step_name,
)
from llmtrain.training.checkpoint import (
    TrainingCheckpoint,
    TrainingProgress,
    load_checkpoint,
    newest_checkpoint,
    regular_steps,
    set_aside,
)
from llmtrain.training.spikes import SpikeEvent
from llmtrain.training.worker import Log

Resume = Literal["auto", "never"] | Path

MAY_CHANGE = (
    "name",
    "train.max_steps",
    "train.micro_batch",
    "train.compile",
    "train.device",
    "train.parallel",
    "train.activation_checkpointing",
    "train.on_nonfinite",
    "spikes.action",
    "spikes.threshold",
    "spikes.rewind_steps",
    "spikes.max_rewinds",
    "data.path",
    "checkpoint.",
    "eval.",
    "log.",
)
"""Keys that may change when a run resumes: they do not affect what was learned so far."""

_STARTED_FILES = re.compile(r"\.lock|parent\.json|\.tmp-\d+-(parent\.json|config\.yaml)")


def check_folder(folder: Path) -> None:
    """Raise a UserError if the folder contains anything other than a run or its first files."""
    if folder.exists() and not is_run(folder) and not has_only_started(folder):
        raise UserError(f"{folder} exists and is not a run", hint="choose another --run-dir")


def has_only_started(folder: Path) -> bool:
    """Return whether this folder belongs to a run that ended before its config was written."""
    return folder.is_dir() and all(_STARTED_FILES.fullmatch(p.name) for p in folder.iterdir())


def is_finished(config: RunConfig, run: RunFolder, data: TokenData, step: int) -> bool:
    """Return whether the last step is done, including its evaluation and weights."""
    if step != config.train.max_steps:
        return step > config.train.max_steps
    saved = [run.snapshot(step), *(run.average(average.label, step) for average in config.averages)]
    evaluated = [event["step"] for event in read_events(run.metrics) if "val/loss" in event]
    to_evaluate = step not in evaluated and len(data.reader("val")) > 1
    return all(path.exists() for path in saved) and not to_evaluate


def find_start(
    config: RunConfig, run: RunFolder, data: TokenData, resume: Resume, warn: Log
) -> TrainingCheckpoint | None:
    """Return the checkpoint to start from, of this run or of the parent of a branch, or None."""
    run.reject_links()
    if not is_run(run.path):
        return _begin(config, run, data, resume)
    for parent in (run.path, run.snapshots, run.states, run.evals, *run.averages.glob("[!.]*")):
        remove_leftovers(parent)
    if _never_trained(run) and not _resumes_branch(config, run, resume):
        _discard(run, config, warn)
        return _begin(config, run, data, resume)
    if resume == "never":
        problem = f"{run.path} already contains a run, and --resume is never"
        raise UserError(problem, hint="choose another --run-dir, or use --resume auto")
    if isinstance(resume, Path) and not _started_from(run, resume.resolve()):
        problem = f"{run.path} already contains a run that did not start from {resume}"
        raise UserError(problem, hint="choose another name for the branch")
    _refuse_other_config(config, run, warn)
    checkpoint = newest_checkpoint(run, warn)
    if checkpoint is None:
        if origin := _parent_checkpoint(run):
            checkpoint = _branch(config, run, data, origin)
        _refuse_lost_checkpoints(run, 0 if checkpoint is None else checkpoint.progress.step, warn)
    elif checkpoint.progress.data != data.sha256:
        problem = f"{run.path} was trained on other data than {config.data.path}"
        hint = "restore that folder (data prepared again by a newer llmtrain counts as other data)"
        raise UserError(problem, hint=f"{hint}, or choose another --run-dir")
    return checkpoint


def _begin(
    config: RunConfig, run: RunFolder, data: TokenData, resume: Resume
) -> TrainingCheckpoint | None:
    """Return the checkpoint of another run to start from, or None for step 0."""
    if isinstance(resume, Path):
        return _branch(config, run, data, resume)
    run.parent.unlink(missing_ok=True)  # of a branch killed before its config was written
    return None


def _never_trained(run: RunFolder) -> bool:
    """Return whether a run has neither a training event nor anything saved after its start."""
    events = read_events(run.metrics)
    if run.rewound_metrics.exists() or any("lr" in event for event in events):
        return False
    start = read_json(run.parent).get("step", 0) if run.parent.exists() else 0
    return all(event["step"] <= start for event in events) and all(
        folder.name == step_name(start) for folder in _saved_folders(run)
    )


def _saved_folders(run: RunFolder) -> list[Path]:
    """Return all training checkpoints, weights and results, also those set aside."""
    parents = (run.states, run.snapshots, run.evals, *run.averages.glob("[!.]*"))
    return [folder for parent in parents for folder in parent.glob("[!.]*")]


def _resumes_branch(config: RunConfig, run: RunFolder, resume: Resume) -> bool:
    """Return whether this is the config, and not another parent, of the branch in the folder."""
    same = not _fixed_keys(_changed_keys(load_config(run.config), config))
    same_parent = _started_from(run, resume.resolve()) if isinstance(resume, Path) else True
    return run.parent.exists() and resume != "never" and same and same_parent


def _discard(run: RunFolder, config: RunConfig, warn: Log) -> None:
    """Replace a run that never trained; if this is killed, the run still counts as one."""
    if _changed_keys(load_config(run.config), config):
        warn(f"{run.path} contains a run that never trained: replacing its config")
    for folder in _saved_folders(run):
        remove_folder(folder)
    for path in (run.metrics, run.parent):
        path.unlink(missing_ok=True)
    # Before a new `parent.json`, which must not apply to the previous config.
    write_atomically(run.config, dump_config(config))


def _fixed_keys(changed: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the changes that a run with progress must not make."""
    return {key: values for key, values in changed.items() if not key.startswith(MAY_CHANGE)}


def _refuse_other_config(config: RunConfig, run: RunFolder, warn: Log) -> None:
    changed = _changed_keys(load_config(run.config), config)
    if fixed := _fixed_keys(changed):
        listed = "; ".join(f"{key}: {old} there, {new} here" for key, (old, new) in fixed.items())
        problem = f"{run.path} was trained with another config ({listed})"
        raise UserError(problem, hint="choose another --run-dir (or name:), or restore that config")
    if "train.max_steps" in changed and getattr(config.schedule, "horizon", 0) is None:
        old, new = changed["train.max_steps"]
        warn(
            f"train.max_steps changed from {old:,} to {new:,}, which moves the end of the "
            f"{config.schedule.name} schedule: the learning rate jumps; "
            "set schedule.horizon to keep the schedule"
        )


def _changed_keys(before: RunConfig, now: RunConfig) -> dict[str, list[Any]]:
    old, new = flatten(before), flatten(now)
    return {key: [old.get(key), new.get(key)] for key in new | old if old.get(key) != new.get(key)}


def _refuse_lost_checkpoints(run: RunFolder, first: int, warn: Log) -> None:
    """Restart a run without training checkpoints only if it cannot have had one."""
    steps = [event["step"] for event in read_events(run.metrics)]
    if steps and max(steps) > first + load_config(run.config).checkpoint.state_every:
        problem = f"{run.path} reached step {max(steps):,}, but lacks its training checkpoints"
        raise UserError(problem, hint="restore its folder state/, or choose another --run-dir")
    if steps:
        warn(f"{run.path} ended before its first training checkpoint: restarting at step {first:,}")


def _branch(config: RunConfig, run: RunFolder, data: TokenData, folder: Path) -> TrainingCheckpoint:
    """Return another run's checkpoint to start from, and record it in `parent.json`.

    Averages in both runs continue; others start here.
    """
    _require_checkpoint(folder)
    checkpoint = load_checkpoint(folder)
    if checkpoint.progress.step >= config.train.max_steps:
        step, last = checkpoint.progress.step, config.train.max_steps
        problem = f"nothing to train from step {step:,} to train.max_steps {last:,}"
        raise UserError(problem, hint=f"use --set train.max_steps=N with N above {step}")
    parent = require_run(folder.resolve().parents[1])
    changed = _changed_keys(load_config(parent.config), config)
    if other := [key for key in changed if key.startswith(("model.", "data.block_size"))]:
        problem = f"{folder} belongs to another model: {', '.join(other)} differ"
        raise UserError(problem, hint="set the model as in the parent's config.yaml")
    if "muon" in changed.get("optimizer.name", ()):
        problem = f"{folder} belongs to another optimizer: Muon has other moments than AdamW"
        raise UserError(problem, hint="keep the optimizer, or use init_from: SNAPSHOT")
    checkpoint.progress.wandb_id, checkpoint.progress.data = None, data.sha256
    record = {"run": str(parent.path), "state": folder.name, "step": checkpoint.progress.step}
    record["changed"] = changed
    write_atomically(run.parent, json.dumps(record, indent=2) + "\n")
    return checkpoint


def _require_checkpoint(folder: Path) -> None:
    runs = [RunFolder(path) for path in (folder, *folder.absolute().parents[:3])]
    found = next(filter(None, (step_folders(run.states) for run in runs)), {})
    listed = ", ".join(map(str, found.values())) or "none"
    if (folder / CONFIG_FILE).is_file():
        problem = f"{folder} contains weights, not a training checkpoint"
        hint = f"start from them: --set init_from={folder}; training checkpoints: {listed}"
        raise UserError(problem, hint=hint)
    if not (folder / INTEGRITY_FILE).is_file():
        hint = f"existing training checkpoints: {listed}"
        raise UserError(f"{folder} is not a training checkpoint", hint=hint)


def _parent_checkpoint(run: RunFolder) -> Path | None:
    """Return the folder of the checkpoint that a branch started from."""
    if not run.parent.exists():
        return None
    record = read_json(run.parent)
    try:
        return RunFolder(Path(record["run"])).states / Path(record["state"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.parent} is damaged: {error}", hint="restore the file") from None


def _started_from(run: RunFolder, checkpoint: Path) -> bool:
    recorded = _parent_checkpoint(run)
    if recorded is None or recorded == checkpoint:
        return recorded == checkpoint
    # On another machine or mount point: the same checkpoint of the same run.
    return not recorded.parents[1].exists() and recorded.parts[-3:] == checkpoint.parts[-3:]


def checkpoint_before(
    run: RunFolder, event: SpikeEvent, progress: TrainingProgress, config: RunConfig, warn: Log
) -> TrainingCheckpoint:
    """Return the newest checkpoint at least `spikes.rewind_steps` before a spike, or the oldest.

    Its progress skips the batches from there to the spike, and keeps what a rewind does not undo.
    """
    spikes = config.spikes
    if len(progress.rewinds) >= spikes.max_rewinds:
        raise RunFailed(
            f"training is unstable: step {event.step:,} would need rewind {spikes.max_rewinds + 1}",
            hint="lower optimizer.lr, or raise schedule.warmup_steps or spikes.max_rewinds",
        )
    steps = regular_steps(list(step_folders(run.states)), config.checkpoint.state_every)
    old = [step for step in steps if step <= event.step - spikes.rewind_steps]
    checkpoint = newest_checkpoint(run, warn, among=old or steps[:1])
    if checkpoint is None:
        problem = f"cannot rewind step {event.step:,}: {run.states} has no training checkpoint"
        raise RunFailed(problem, hint="restore the folder: it was emptied during training")
    back = checkpoint.progress
    back.passed_batches = event.step + progress.passed_batches - back.step
    record = {"step": back.step, "rewound_from": event.step, "passed_batches": back.passed_batches}
    back.rewinds = [*progress.rewinds, record | event.reason()]
    for kept in ("seconds", "wandb_id", "skipped", "micro_batch", "micro_batch_for"):
        setattr(back, kept, getattr(progress, kept))
    return checkpoint


def set_aside_after(run: RunFolder, step: int) -> None:
    """Rename snapshots and averages after `step` to `…-rewound`; remove later checkpoints."""
    parents = [run.states, run.snapshots, *run.averages.glob("[!.]*")]
    for parent in parents:
        for later, folder in step_folders(parent).items():
            if later > step:
                remove_folder(folder) if parent == run.states else set_aside(folder, "rewound")
