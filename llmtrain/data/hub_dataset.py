"""Read the train split of a dataset on the Hugging Face hub, at one commit, without running its code.

The current commit is resolved first, and everything is read at that commit. A missing field or network
is reported before anything large is downloaded.
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
    """The train split of a dataset repository at a commit.

    Attributes:
        files: path in the repository and size in bytes, in reading order.
        urls: parquet files to read; None for the files that the repository declares.
    """

    name: str
    config: str | None
    revision: str
    files: tuple[tuple[str, int], ...]
    urls: tuple[str, ...] | None

    def download(self, cache: Path) -> list[Path]:
        """Write all columns of all documents to Arrow files below `cache` and return them in order.

        Downloads remain in the hub's cache.
        """
        with _hub_errors(self.name):
            builder = self._builder(cache)
            builder.download_and_prepare()
            return sorted(Path(builder.cache_dir).glob(f"{builder.dataset_name}-{_SPLIT}*.arrow"))

    def stream(self, cache: Path) -> Iterator[dict[str, Any]]:
        """Yield the documents in order, downloading only what is consumed."""
        with _hub_errors(self.name):
            yield from self._builder(cache).as_streaming_dataset(split=_SPLIT)

    def texts(self, field: str, limit: int, cache: Path) -> Iterator[str]:
        """Yield `field` of the first `limit` documents."""
        for number, row in enumerate(islice(self.stream(cache), limit), start=1):
            yield _text_of(row, field, f"{self.name}, document {number:,}")

    def _builder(self, cache: Path) -> Any:
        return _builder(self.name, self.config, self.revision, self.urls, cache)


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
        urls = None
        if parquet is not None:
            urls = tuple(root + path for path in sorted(sizes) if fnmatch(path, parquet))
            if not urls:
                raise UserError(
                    f"the dataset {name} contains no {parquet}",
                    hint="name another dataset: hub:NAME[:CONFIG]",
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
        dataset = HubDataset(name, config, revision, files, urls)
        first = next(dataset.stream(cache), None)
    if first is None:
        raise UserError(
            f"the dataset {name} contains no documents", hint="name a dataset with text in it"
        )
    _text_of(first, field, f"the dataset {name}")
    return dataset


def _text_of(row: dict[str, Any], field: str, location: str) -> str:
    if field not in row:
        raise missing_field(location, field, list(row))
    if not isinstance(row[field], str):
        raise not_a_string(location, field, type(row[field]).__name__)
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
    """Convert exceptions of `datasets` and of the hub's client to UserErrors.

    The client raises errors of three HTTP libraries, depending on its version. Any exception without a
    specific meaning is therefore treated as a failure to read.
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
            f"the dataset {name} cannot be loaded: {error}",
            hint="download its data files and name them: llmtrain prepare FILE_OR_FOLDER",
        ) from error
    except Exception as error:
        is_wrapper = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if is_wrapper else error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise cause from error
        raise UserError(
            f"the dataset {name} cannot be read from the hub ({type(cause).__name__}: {cause})",
            hint="check the network (HF_ENDPOINT names a mirror), or download the files and name them: "
            "llmtrain prepare FILE_OR_FOLDER",
        ) from error
