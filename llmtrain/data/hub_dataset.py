"""Documents from a dataset on the Hugging Face Hub, at one commit, without running its code.

Why: the commit is looked up first and everything is read at it, so that the manifest can say what
was read; and what cannot work (no such field, no network) is found out before anything big is
downloaded.

    hub = open_hub("Skylion007/openwebtext", None, "text", cache, parquet="plain_text/train-*.parquet")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from llmtrain.data.readers import missing_field, not_a_string
from llmtrain.errors import UserError
from llmtrain.storage.disk import NO_ROOM

_SPLIT = "train"


@dataclass(frozen=True)
class HubDataset:
    """The train split of a dataset repository at a commit."""

    name: str
    config: str | None
    revision: str
    files: tuple[tuple[str, int], ...]
    """Path in the repository and size in bytes, in reading order."""
    urls: tuple[str, ...] | None
    """The parquet files to read; None lets the repository's own description decide."""

    def load(self, cache: Path) -> list[Path]:
        """Arrow files under `cache` with all documents (and other columns), in order.

        What is downloaded stays in the hub's own cache.
        """
        with _hub_errors(self.name):
            builder = self._builder(cache)
            builder.download_and_prepare()
            return sorted(Path(builder.cache_dir).glob(f"{builder.dataset_name}-{_SPLIT}*.arrow"))

    def stream(self, cache: Path) -> Iterator[dict[str, Any]]:
        """The documents in order, reading only as much of the repository as is asked for."""
        with _hub_errors(self.name):
            yield from self._builder(cache).as_streaming_dataset(split=_SPLIT)

    def texts(self, field: str, limit: int, cache: Path) -> Iterator[str]:
        """`field` of the first `limit` documents, without downloading the rest."""
        for number, row in enumerate(islice(self.stream(cache), limit), start=1):
            yield text_of(row, field, f"{self.name}, document {number:,}")

    def _builder(self, cache: Path) -> Any:
        return _builder(self.name, self.config, self.revision, self.urls, cache)


def open_hub(
    name: str, config: str | None, field: str, cache: Path, *, parquet: str | None = None
) -> HubDataset:
    """Look a dataset up: its current commit, its files, and whether it has `field`.

    `parquet` is a pattern of files to read in place of what the repository declares.

    Raises:
        UserError: the hub cannot be reached, or there is no such dataset, configuration or field.
    """
    with _hub_errors(name):
        info = HfApi().dataset_info(name, files_metadata=True)
        revision = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        root = f"hf://datasets/{name}@{revision}/"
        urls = (
            None
            if parquet is None
            else tuple(root + f for f in sorted(sizes) if fnmatch(f, parquet))
        )
        if urls == ():
            raise UserError(
                f"the dataset {name} holds no {parquet}", hint="name another with hub:NAME[:CONFIG]"
            )
        declared = _builder(name, config, revision, urls, cache).config.data_files or {}
        if _SPLIT not in declared:
            present = ", ".join(map(str, declared)) or "none"
            raise UserError(
                f"the dataset {name} has no split {_SPLIT!r}; it has: {present}",
                hint="download the files and name them: llmtrain prepare FILE_OR_FOLDER",
            )
        paths = [str(url).removeprefix(root) for url in declared[_SPLIT]]
        files = tuple((path, sizes.get(path, 0)) for path in paths)
        found = HubDataset(name, config, revision, files, urls)
        first = next(found.stream(cache), None)
    if first is None:
        raise UserError(
            f"the dataset {name} holds no documents", hint="name a dataset with text in it"
        )
    text_of(first, field, f"the dataset {name}")
    return found


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a document.

    Raises:
        UserError: the field is missing or is not text.
    """
    if field not in row:
        raise missing_field(where, field, list(row))
    if not isinstance(row[field], str):
        raise not_a_string(where, field, type(row[field]).__name__)
    return str(row[field])


def _builder(
    name: str, config: str | None, revision: str, urls: tuple[str, ...] | None, cache: Path
) -> Any:
    if urls is not None:
        return datasets.load_dataset_builder(
            "parquet", data_files={_SPLIT: list(urls)}, cache_dir=str(cache)
        )
    return datasets.load_dataset_builder(name, config, revision=revision, cache_dir=str(cache))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    # The client raises errors of three HTTP libraries, by its version: all that is not known to be
    # something else is a failure to read.
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except GatedRepoError as error:
        raise UserError(
            f"the dataset {name} is gated: its terms must be accepted first",
            hint=f"accept them on the hub's page of {name}, then log in: hf auth login",
        ) from error
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"there is no dataset {name!r} on the hub, or it is private",
            hint="check the name (OWNER/NAME); for a private one log in: hf auth login",
        ) from error
    except ValueError as error:
        raise UserError(
            f"the dataset {name}: {error}", hint="hub:NAME:CONFIG names a configuration"
        ) from error
    except RuntimeError as error:
        # What `datasets` raises for a repository that is a loading script.
        raise UserError(
            f"the dataset {name} cannot be loaded: {error}",
            hint="download its data files and name them: llmtrain prepare FILE_OR_FOLDER",
        ) from error
    except Exception as error:
        cause = (
            error.__cause__
            if isinstance(error, datasets.exceptions.DatasetGenerationError)
            else error
        )
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise cause from error
        raise UserError(
            f"the dataset {name} cannot be read from the hub ({type(cause).__name__}: {cause})",
            hint="check the network (HF_ENDPOINT names a mirror), or fetch the files by other means "
            "and name them: llmtrain prepare FILE_OR_FOLDER",
        ) from error
