"""Checkpoints that are revisions of a repository on the Hugging Face hub, such as Pythia's."""

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase, translate
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import BlobLfsInfo, ModelInfo

from llmtrain.checkpoints.checkpoint import (
    COMPANION_FILES,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Checkpoint,
)
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.series import Input, Series, by_step
from llmtrain.errors import UserError
from llmtrain.storage.commit import TEMPORARY_PREFIX
from llmtrain.storage.hub import hub_errors
from llmtrain.storage.integrity import Digest
from llmtrain.storage.safe_files import reject_links


def hub_series(
    repository: str, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """Return the revisions of a repository OWNER/NAME whose names contain a step, but not step 0.

    In `revision_pattern`, {N} is the step and * is anything. With `discard`, revisions are
    downloaded to a temporary folder instead of the hub's cache, and the caller deletes them.
    """
    pattern = revision_pattern or "step{N}"  # of Pythia
    if pattern.count("{N}") != 1:
        raise UserError(f"--revision-pattern {pattern!r} lacks {{N}}", hint="such as step{N}")
    with hub_errors(repository):
        refs = HfApi().list_repo_refs(repository)
    names = sorted({ref.name for ref in (*refs.branches, *refs.tags)})
    expression = re.compile(translate(pattern.replace("{N}", "\0")).replace("\0", r"(\d+)"))
    matches = [(expression.match(name), name) for name in names]
    revisions = by_step(
        ((int(match[1]), name) for match, name in matches if match and int(match[1])),
        hint="use a narrower --revision-pattern",
    )
    if not revisions:
        raise UserError(
            f"{repository} has no revision named {pattern}; it has {', '.join(names[:8])}",
            hint="describe the names, such as --revision-pattern 'stage1-step{N}-*'",
        )
    averages = Path("averages") / repository.rpartition("/")[2]
    downloads = averages / f"{TEMPORARY_PREFIX}downloads" if discard else None

    def revision_input(step: int, name: str) -> Input:
        revision, location = _Revision(repository, name, downloads), f"{repository}@{name}"
        return Input(step, location, lambda: revision.open(step), lambda: revision.digests)

    inputs = {step: revision_input(step, name) for step, name in revisions.items()}
    final = revision_input(max(revisions), "main") if "main" in names else None
    return Series(repository, averages, inputs, final=final, repository=repository)


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
            api, name = HfApi(), self._repository
            return api.model_info(name, revision=self._revision, files_metadata=True)

    @cached_property
    def _files(self) -> dict[str, BlobLfsInfo | None]:
        """Weights files, safetensors if present, with their index if sharded; LFS entry by name."""
        files = {file.rfilename: file.lfs for file in self._info.siblings or []}
        for whole in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE):
            if whole in files:
                return {whole: files[whole]}
            stem, _, suffix = whole.partition(".")
            parts = rf"{whole}\.index\.json|{stem}-\d+-of-\d+\.{suffix}"
            found = {name: files[name] for name in sorted(files) if re.fullmatch(parts, name)}
            if len(found) > 1:
                return found
        hint = f"expected {WEIGHTS_FILE} or {TORCH_WEIGHTS_FILE}, or shards with an index"
        raise UserError(f"{self._name} contains no weights", hint=hint)

    @property
    def digests(self) -> Mapping[str, Digest]:
        """Digests of the weights files from the hub."""
        known = {name: lfs.sha256 for name, lfs in self._files.items() if lfs is not None}
        return {name: Digest("sha256", sha256) for name, sha256 in known.items()}

    def open(self, step: int) -> Checkpoint:
        """Download the weights and their companion files, and read the headers."""
        names = [file.rfilename for file in self._info.siblings or []]
        companions = [n for n in names if any(fnmatchcase(n, p) for p in COMPANION_FILES)]
        commit = self._info.sha
        folder = None
        if self._downloads is not None:
            folder = self._downloads / str(commit)
            reject_links(self._downloads.parent, folder)
        with hub_errors(self._name):
            paths = [
                Path(hf_hub_download(self._repository, name, revision=commit, local_dir=folder))
                for name in [*companions, *self._files]
            ]
        location = f"{self._repository}@{commit}"
        checkpoint = open_checkpoint(paths[-1].parent, step=step, location=location)
        return replace(checkpoint, disposable=folder is not None, recorded=self.digests)
