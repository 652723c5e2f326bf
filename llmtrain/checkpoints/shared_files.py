"""Tokenizer and generation files of a run: one copy, linked into each of its weights folders.

Why links: GPT-2's files take 3.6 MB, and a run has hundreds of snapshots. A file with several names
is never modified in place.
"""

import json
from pathlib import Path

from llmtrain.checkpoints.gpt2_folder import Shape, generation_config
from llmtrain.errors import UserError
from llmtrain.model.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.file_systems import link_or_copy
from llmtrain.storage.integrity import Digest, integrity_problems, read_integrity


class SharedFiles:
    """The shared files of a run, in a committed folder that the first use creates."""

    def __init__(self, folder: Path, shape: Shape, tokenizer: str) -> None:
        self._folder, self._shape, self._tokenizer = folder, shape, tokenizer
        self._digests: dict[str, Digest] = {}

    def link_into(self, target: Path) -> dict[str, Digest]:
        """Link or copy every file into a folder; return the digests by name."""
        self._digests = self._digests or self._prepare()
        for name in self._digests:
            link_or_copy(self._folder / name, target / name)
        return self._digests

    def _prepare(self) -> dict[str, Digest]:
        """Return the digests of the files; write them if one is missing or damaged."""
        if not _is_intact(self._folder):
            with staged_folder(self._folder, replace=True) as folder:
                for name, text in text_files(self._shape, load_tokenizer(self._tokenizer)).items():
                    (folder / name).write_text(text, encoding="utf-8")
        return {name: record.digest for name, record in read_integrity(self._folder).items()}


def _is_intact(folder: Path) -> bool:
    try:
        return not integrity_problems(folder)
    except UserError:  # no record, or a damaged one
        return False


def text_files(shape: Shape, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokenizer files and `generation_config.json`, content by name."""
    settings = json.dumps(generation_config(shape, tokenizer), indent=2) + "\n"
    return tokenizer_files(tokenizer, shape.block_size) | {"generation_config.json": settings}
