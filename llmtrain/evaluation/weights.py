"""Identity of weights: their digest, and averages of inputs that the run replaced later.

Training with `spikes.action: rewind` sets snapshots aside and writes others with the same steps. An
average of the discarded ones keeps its name, so only its provenance shows what it contains.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.checkpoints.checkpoint import (
    PROVENANCE_FILE,
    RESIDUAL_FILE,
    recorded_digests,
    require_listed,
    weights_files,
)
from llmtrain.storage.cache import cached_digest, computed_digest
from llmtrain.storage.integrity import (
    INTEGRITY_FILE,
    Digest,
    combined_digest,
    read_integrity,
    require_recorded,
)
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_name


def weights_digest(folder: Path) -> Digest:
    """Read the weights files of a folder, compare them with its record, and return their digest."""
    recorded, paths = recorded_digests(folder), weights_paths(folder)
    require_listed(paths, recorded)
    found = {}
    for path in paths:
        expected = recorded.get(path.name)
        digest = computed_digest(path, expected.algorithm if expected else "blake3")
        require_recorded(path, digest, expected or digest)
        found[path.name] = digest
    return combined_digest(found)


def weights_paths(folder: Path) -> list[Path]:
    """Return the weights files of a folder."""
    torch_files = sorted(folder.glob("pytorch_model*.bin"))
    only_torch = torch_files and not any(folder.glob("*.safetensors"))
    return torch_files if only_torch else list(weights_files(folder))


def is_unchanged(folder: Path, digest: Digest) -> bool:
    """Return whether the weights in a folder have this digest; see `cached_digest`."""
    found = {path.name: cached_digest(path, digest.algorithm) for path in weights_paths(folder)}
    return combined_digest(found) == digest


def discarded_inputs(folder: Path, run: RunFolder | None) -> list[int]:
    """Return the steps of an average's inputs that its run has replaced since.

    An input that was only deleted does not count.
    """
    path = folder / PROVENANCE_FILE
    inputs = read_json(path).get("inputs") if path.exists() else None
    if run is None or not isinstance(inputs, list):
        return []
    entries = (entry for entry in inputs if isinstance(entry, dict))
    return [entry["step"] for entry in entries if _is_discarded(run, entry)]


def _is_discarded(run: RunFolder, entry: Mapping[str, Any]) -> bool:
    digest, folder = Digest.from_json(entry), _input_folder(run, entry)
    if digest is None or folder is None:
        return False
    if folder.is_dir():
        return not _is_recorded(folder, digest)
    return any(_is_recorded(each, digest) for each in folder.parent.glob(f"{folder.name}-rewound*"))


def _input_folder(run: RunFolder, entry: Mapping[str, Any]) -> Path | None:
    """Return the place of an input in the run, or None if it belongs to something else.

    The run may have been moved since, so a path that no longer exists counts as one of the run.
    """
    step, location = entry.get("step"), Path(str(entry.get("path")))
    if not isinstance(step, int):
        return None
    match location.parts:
        case (*_, "snapshots", name) if name == step_name(step):
            folder = run.snapshot(step)
        case (*_, "averages", label, name) if name == step_name(step) and label != "..":
            folder = run.average(label, step)
        case _:
            return None
    elsewhere = location.exists() and location.resolve() != folder.resolve()
    return None if elsewhere else folder


def _is_recorded(folder: Path, digest: Digest) -> bool:
    """Return whether a folder's record, or its weights if it has none, have this digest."""
    paths = [*weights_paths(folder), *folder.glob(RESIDUAL_FILE)]
    records = read_integrity(folder) if (folder / INTEGRITY_FILE).exists() else {}
    recorded = {path.name: records[path.name].digest for path in paths if path.name in records}
    if {each.algorithm for each in recorded.values()} != {digest.algorithm}:
        recorded = {path.name: cached_digest(path, digest.algorithm) for path in paths}
    return combined_digest(recorded) == digest
