"""Read a dataset's train split from the Hugging Face hub, at one commit, without running its code.

The current commit is resolved first. A missing field or network is reported before anything large
is downloaded.
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
_DOWNLOAD_HINT = "download its data files and name them: llmtrain prepare FILE_OR_FOLDER"


@dataclass(frozen=True)
class HubDataset:
    """The train split of a dataset repository at a commit.

    Attributes:
        files: path in the repository and size in bytes, in reading order.
    """

    name: str
    revision: str
    files: tuple[tuple[str, int], ...]
    _builder: Any

    def download(self) -> list[Path]:
        """Write all documents to Arrow files in the cache and return these in order."""
        with _hub_errors(self.name):
            self._builder.download_and_prepare()
            folder = Path(self._builder.cache_dir)
            return sorted(folder.glob(f"{self._builder.dataset_name}-{_SPLIT}*.arrow"))

    def stream(self) -> Iterator[dict[str, Any]]:
        """Yield the documents in order, downloading only the ones that are read."""
        with _hub_errors(self.name):
            yield from self._builder.as_streaming_dataset(split=_SPLIT)

    def texts(self, field: str, limit: int) -> Iterator[str]:
        """Yield `field` of the first `limit` documents."""
        for number, row in enumerate(islice(self.stream(), limit), start=1):
            yield _text_of(row, field, f"{self.name}, document {number:,}")


def open_hub_dataset(
    name: str, config: str | None, field: str, cache: Path, *, parquet: str | None = None
) -> HubDataset:
    """Resolve a dataset's current commit and files, and check that its documents have `field`.

    `parquet` is a pattern of files to read instead of those that the repository declares.

    Raises:
        UserError: the hub is unreachable, or the dataset, configuration or field does not exist.
    """
    with _hub_errors(name):
        info = HfApi().dataset_info(name, files_metadata=True)
        revision = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        root = f"hf://datasets/{name}@{revision}/"
        if parquet is None:
            builder = datasets.load_dataset_builder(
                name, config, revision=revision, cache_dir=str(cache)
            )
        else:
            urls = [root + path for path in sorted(sizes) if fnmatch(path, parquet)]
            _require(bool(urls), f"the dataset {name} contains no {parquet}")
            builder = datasets.load_dataset_builder(
                "parquet", data_files={_SPLIT: urls}, cache_dir=str(cache)
            )
        declared = builder.config.data_files or {}
        present = ", ".join(map(str, declared)) or "none"
        _require(
            _SPLIT in declared, f"the dataset {name} has no split {_SPLIT!r}; it has: {present}"
        )
        paths = [str(url).removeprefix(root) for url in declared[_SPLIT]]
        files = tuple((path, sizes.get(path, 0)) for path in paths)
        dataset = HubDataset(name, revision, files, builder)
        first = next(dataset.stream(), None)
    if first is None:
        raise UserError(f"the dataset {name} is empty", hint="name a dataset with text in it")
    _text_of(first, field, f"the dataset {name}")
    return dataset


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise UserError(message, hint=_DOWNLOAD_HINT)


def _text_of(row: dict[str, Any], field: str, location: str) -> str:
    if field not in row:
        raise missing_field(location, field, list(row))
    if not isinstance(row[field], str):
        raise not_a_string(location, field, type(row[field]).__name__)
    return str(row[field])


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert exceptions of `datasets` and of the hub's client to UserErrors.

    The client raises errors of three HTTP libraries, depending on its version. Any other exception
    is treated as a failure to read.
    """
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
            f"the dataset {name!r} does not exist on the hub, or is private",
            hint="check the name (OWNER/NAME); for a private one log in: hf auth login",
        ) from error
    except ValueError as error:
        raise UserError(
            f"the dataset {name}: {error}", hint="name a configuration: hub:NAME:CONFIG"
        ) from error
    except RuntimeError as error:  # raised for a repository with a loading script
        raise UserError(
            f"the dataset {name} cannot be loaded: {error}", hint=_DOWNLOAD_HINT
        ) from error
    except Exception as error:
        is_wrapper = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if is_wrapper else error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise cause from error
        raise UserError(
            f"the dataset {name} cannot be read from the hub ({type(cause).__name__}: {cause})",
            hint=f"check the network (HF_ENDPOINT names a mirror), or {_DOWNLOAD_HINT}",
        ) from error
