"""The Hugging Face hub: a folder sent there, and its client's exceptions in plain words.

Why one place: the client raises a dozen kinds of errors, some of them its HTTP library's, and a person
needs to know one of three things: the name is wrong, they may not, or the hub cannot be reached.

    url = push(Path("exported"), "owner/name")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmtrain.errors import RunFailed, UserError

_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of its HTTP library's errors: which library that is depends on the client's version."""

_FORBIDDEN = (401, 403)


def push(folder: Path, repository: str) -> str:
    """Send a folder to a model repository; one that does not exist is made, private. Its address.

    Args:
        folder: all of it is sent, in one commit.
        repository: OWNER/NAME.

    Raises:
        UserError: no such name, or no right to write there.
        RunFailed: the hub cannot be reached.
    """
    api = HfApi()
    with hub_errors(repository):
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Exported by llmtrain"
        )
    return str(made)


def ping(seconds: float) -> str:
    """The hub's address, which answered within `seconds`.

    Raises:
        RunFailed: it did not.
    """
    with hub_errors(constants.ENDPOINT):
        get_session().head(constants.ENDPOINT, timeout=seconds)
    return constants.ENDPOINT


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Say what the client's exceptions mean.

    Raises:
        UserError: there is no such thing, or it is not ours.
        RunFailed: the hub cannot be reached.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(
            f"the hub wants to know who asks for {what}", hint="hf auth login, or set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"the hub has no {what}: {_first_line(error)}",
            hint="check the name and the revision; a private or gated one needs `hf auth login`",
        ) from None
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(what, error) from None
        raise UserError(
            f"{what} lacks a file: {_first_line(error)}", hint="another revision"
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _FORBIDDEN:
            raise UserError(
                f"the hub refuses {what}: {_first_line(error)}",
                hint="hf auth login, or HF_TOKEN, with a token that may write there",
            ) from None
        raise _unreachable(what, error) from None
    except (_TRANSPORT_ERROR, OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(what, error) from None


def _unreachable(what: str, error: Exception) -> RunFailed:
    return RunFailed(
        f"the hub cannot be reached for {what}: {_first_line(error)}",
        hint="check the network and HF_HUB_OFFLINE, and try again: what has arrived is not transferred twice",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
