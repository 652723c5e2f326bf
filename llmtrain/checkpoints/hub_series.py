"""Checkpoints that are revisions of a repository on the Hugging Face hub, such as Pythia's.

Why: the hub tells the commit, the files and their SHA-256 of a revision without a download, so that a
window is pinned and its duplicates are found first; then only what the window needs is fetched.

    series = hub_series("EleutherAI/pythia-1b-deduped", revision_pattern=None)
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import ModelInfo

from llmtrain.checkpoints.checkpoint import TORCH_WEIGHTS_FILE, Checkpoint
from llmtrain.checkpoints.open import open_folder
from llmtrain.checkpoints.series import Input, Series
from llmtrain.checkpoints.weights_folder import WEIGHTS_FILE
from llmtrain.checkpoints.writer import CARRIED_OVER
from llmtrain.errors import UserError
from llmtrain.storage.commit import TEMPORARY_PREFIX
from llmtrain.storage.hub import hub_errors

DEFAULT_PATTERN = "step{N}"
"""How Pythia names its revisions."""

_FINAL = "main"


def hub_series(
    repository: str, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """The revisions of a repository whose names hold a step; step 0 is left out.

    Args:
        repository: OWNER/NAME.
        revision_pattern: name of a revision, with {N} for the step and * for anything.
        discard: download to a temporary folder, of which each revision is deleted once it is summed,
            and not to the hub's cache.

    Raises:
        UserError: no such repository, or no such revisions.
        RunFailed: the hub cannot be reached.
    """
    pattern = revision_pattern or DEFAULT_PATTERN
    if pattern.count("{N}") != 1:
        raise UserError(
            f"--revision-pattern {pattern!r} lacks {{N}}", hint=f"such as {DEFAULT_PATTERN}"
        )
    with hub_errors(repository):
        refs = HfApi().list_repo_refs(repository)
    names = {ref.name for ref in (*refs.branches, *refs.tags)}
    expression = re.compile(fnmatch.translate(pattern.replace("{N}", "\0")).replace("\0", r"(\d+)"))
    found: dict[int, str] = {}
    for name in sorted(names):
        match = expression.match(name)
        if match is None or int(match[1]) == 0:
            continue
        if int(match[1]) in found:
            raise UserError(
                f"{repository}: {found[int(match[1])]} and {name} are both of step {int(match[1]):,}",
                hint="a narrower --revision-pattern",
            )
        found[int(match[1])] = name
    if not found:
        shown = ", ".join(sorted(names)[:8])
        raise UserError(
            f"{repository} has no revision named {pattern}; it has {shown}",
            hint="--revision-pattern 'stage1-step{N}-*' says how they are named",
        )
    steps = sorted(found)
    averages = Path("averages") / repository.rpartition("/")[2]
    downloads = averages / f"{TEMPORARY_PREFIX}downloads" if discard else None
    inputs = {step: _input(repository, found[step], step, downloads) for step in steps}
    final = _input(repository, _FINAL, steps[-1], downloads) if _FINAL in names else None
    return Series(repository, averages, inputs, final=final, repository=repository)


def hub_checkpoint(repository: str, revision: str) -> Checkpoint:
    """One revision of a public model, downloaded to the hub's cache and pinned to its commit.

    Raises:
        UserError: there is no such model or revision, or it holds no weights.
        RunFailed: the hub cannot be reached.
    """
    return _Revision(repository, revision, None).open(0)


def _input(repository: str, revision: str, step: int, downloads: Path | None) -> Input:
    source = _Revision(repository, revision, downloads)
    return Input(step, f"{repository}@{revision}", lambda: source.open(step), lambda: source.hashes)


class _Revision:
    """One revision: asked of the hub once, when it is first needed, and pinned to its commit."""

    def __init__(self, repository: str, revision: str, downloads: Path | None) -> None:
        self._repository = repository
        self._revision = revision
        self._downloads = downloads

    @cached_property
    def _info(self) -> ModelInfo:
        with hub_errors(f"{self._repository} at {self._revision}"):
            return HfApi().model_info(
                self._repository, revision=self._revision, files_metadata=True
            )

    @cached_property
    def _weights(self) -> list[str]:
        """The weights files: safetensors where there are any, and the index if they are shards."""
        names = [sibling.rfilename for sibling in self._info.siblings or []]
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            whole, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
            if whole in names:
                return [whole]
            shards = [n for n in names if re.fullmatch(rf"{stem}-\d+-of-\d+{re.escape(suffix)}", n)]
            if index in names and shards:
                return [index, *sorted(shards)]
        raise UserError(
            f"{self._repository} at {self._revision} holds no weights",
            hint=f"expected {WEIGHTS_FILE} or {TORCH_WEIGHTS_FILE}, whole or in shards with an index",
        )

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of the weights files, as the hub has them."""
        wanted = set(self._weights)
        return {
            sibling.rfilename: sibling.lfs.sha256
            for sibling in self._info.siblings or []
            if sibling.rfilename in wanted and sibling.lfs is not None
        }

    def open(self, step: int) -> Checkpoint:
        """Download the weights and what a model needs beside them, and read their headers."""
        names = [sibling.rfilename for sibling in self._info.siblings or []]
        beside = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in CARRIED_OVER)]
        commit = self._info.sha
        folder = self._downloads / str(commit) if self._downloads is not None else None
        first = Path()
        with hub_errors(f"{self._repository} at {self._revision}"):
            for name in [*beside, *self._weights]:
                first = Path(
                    hf_hub_download(self._repository, name, revision=commit, local_dir=folder)
                )
        opened = open_folder(first.parent, step=step, location=f"{self._repository}@{commit}")
        return replace(opened, disposable=folder is not None)
