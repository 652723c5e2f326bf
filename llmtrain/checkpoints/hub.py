"""Checkpoints that are revisions of a repository on the Hugging Face hub, such as Pythia's.

Why metadata first: the hub returns commit, files and SHA-256 of a revision without a download. A
window is pinned and checked for duplicates first; then only its files are downloaded.

    series = hub_series("EleutherAI/pythia-1b-deduped")
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase, translate
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from llmtrain.checkpoints.checkpoint import (
    COMPANION_FILES,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Checkpoint,
)
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.series import Input, Series
from llmtrain.errors import UserError
from llmtrain.storage.commit import TEMPORARY_PREFIX
from llmtrain.storage.hub import hub_errors

DEFAULT_PATTERN = "step{N}"
"""Revision names of Pythia."""

_FINAL = "main"


def hub_series(
    repository: str, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """Return the revisions of a repository whose names contain a step; step 0 is left out.

    Args:
        repository: OWNER/NAME.
        revision_pattern: revision name with {N} for the step and * for anything.
        discard: download to a temporary folder instead of the hub's cache; the caller deletes
            each revision after summing it.

    Raises:
        UserError: the repository does not exist, or no revision matches the pattern.
        RunFailed: the hub cannot be reached.
    """
    pattern = revision_pattern or DEFAULT_PATTERN
    if pattern.count("{N}") != 1:
        raise UserError(
            f"--revision-pattern {pattern!r} lacks {{N}}", hint=f"such as {DEFAULT_PATTERN}"
        )
    with hub_errors(repository):
        refs = HfApi().list_repo_refs(repository)
    names = sorted({ref.name for ref in (*refs.branches, *refs.tags)})
    revisions = _revisions_by_step(repository, names, pattern)
    averages = Path("averages") / repository.rpartition("/")[2]
    downloads = averages / f"{TEMPORARY_PREFIX}downloads" if discard else None

    def revision_input(step: int, name: str) -> Input:
        revision = _Revision(repository, name, downloads)
        return Input(
            step, f"{repository}@{name}", lambda: revision.open(step), lambda: revision.hashes
        )

    inputs = {step: revision_input(step, revisions[step]) for step in sorted(revisions)}
    final = revision_input(max(revisions), _FINAL) if _FINAL in names else None
    return Series(repository, averages, inputs, final=final, repository=repository)


def _revisions_by_step(repository: str, names: list[str], pattern: str) -> dict[int, str]:
    expression = re.compile(translate(pattern.replace("{N}", "\0")).replace("\0", r"(\d+)"))
    revisions: dict[int, str] = {}
    for name in names:
        match = expression.match(name)
        step = int(match[1]) if match else 0
        if step in revisions:
            raise UserError(
                f"{repository}: {revisions[step]} and {name} both have step {step:,}",
                hint="give a narrower --revision-pattern",
            )
        if step:
            revisions[step] = name
    if not revisions:
        raise UserError(
            f"{repository} has no revision named {pattern}; it has {', '.join(names[:8])}",
            hint="describe the names, such as --revision-pattern 'stage1-step{N}-*'",
        )
    return revisions


def hub_checkpoint(repository: str, revision: str) -> Checkpoint:
    """Download one revision of a public model to the hub's cache and open it."""
    return _Revision(repository, revision, None).open(0)


class _Revision:
    """One revision: metadata requested once, on first use, and pinned to its commit."""

    def __init__(self, repository: str, revision: str, downloads: Path | None) -> None:
        self._repository = repository
        self._name = f"{repository} at {revision}"
        self._revision = revision
        self._downloads = downloads

    @cached_property
    def _info(self) -> ModelInfo:
        with hub_errors(self._name):
            return HfApi().model_info(
                self._repository, revision=self._revision, files_metadata=True
            )

    @property
    def _files(self) -> dict[str, RepoSibling]:
        return {file.rfilename: file for file in self._info.siblings or []}

    @cached_property
    def _weights(self) -> list[str]:
        """Weights files, safetensors if present, with their index if sharded."""
        for whole in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE):
            stem, _, suffix = whole.partition(".")
            index = f"{whole}.index.json"
            shards = [n for n in self._files if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", n)]
            if whole in self._files:
                return [whole]
            if index in self._files and shards:
                return [index, *sorted(shards)]
        raise UserError(
            f"{self._name} contains no weights",
            hint=f"expected {WEIGHTS_FILE} or {TORCH_WEIGHTS_FILE}, or shards with an index",
        )

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of the weights files from the hub."""
        files = {name: self._files[name].lfs for name in self._weights}
        return {name: lfs.sha256 for name, lfs in files.items() if lfs is not None}

    def open(self, step: int) -> Checkpoint:
        """Download the weights and their companion files, and read the headers."""
        companions = [n for n in self._files if any(fnmatchcase(n, p) for p in COMPANION_FILES)]
        commit = self._info.sha
        folder = self._downloads / str(commit) if self._downloads is not None else None
        path = Path()
        with hub_errors(self._name):
            for name in [*companions, *self._weights]:
                path = Path(
                    hf_hub_download(self._repository, name, revision=commit, local_dir=folder)
                )
        checkpoint = open_checkpoint(
            path.parent, step=step, location=f"{self._repository}@{commit}"
        )
        return replace(checkpoint, disposable=folder is not None)
