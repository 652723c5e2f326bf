"""The Hugging Face hub: push a folder, and short messages for the exceptions of its client.

Why: the client raises a dozen types of errors, including those of its HTTP library. For users there
are three causes: a wrong name, a denied access, or a failed connection.

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
"""Base class of HTTP errors; the HTTP library depends on the client's version."""
_FORBIDDEN = (401, 403)


def push(folder: Path, repository: str) -> str:
    """Upload a folder in one commit to OWNER/NAME, created (private) if missing; return its URL."""
    api = HfApi()
    with hub_errors(repository):
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Exported by llmtrain"
        )
    return str(url)


def ping(seconds: float) -> str:
    """Return the hub's address, or raise RunFailed if it does not answer within `seconds`."""
    with hub_errors(constants.ENDPOINT):
        get_session().head(constants.ENDPOINT, timeout=seconds)
    return constants.ENDPOINT


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Replace the client's exceptions by messages about `what`, such as a repository.

    Raises:
        UserError: it does not exist, or access is denied.
        RunFailed: the hub cannot be reached.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(
            f"{what} needs a token for the hub", hint="run hf auth login, or set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"the hub has no {what}: {_first_line(error)}",
            hint="check the name and the revision; private and gated ones need `hf auth login`",
        ) from None
    except LocalEntryNotFoundError as error:
        raise _unreachable(what, error) from None
    except EntryNotFoundError as error:
        raise UserError(
            f"{what} has no such file: {_first_line(error)}", hint="choose another revision"
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _FORBIDDEN:
            raise UserError(
                f"no permission for {what} on the hub: {_first_line(error)}",
                hint="run hf auth login, or set HF_TOKEN, with a token that allows it",
            ) from None
        raise _unreachable(what, error) from None
    except (_TRANSPORT_ERROR, OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(what, error) from None


def _unreachable(what: str, error: Exception) -> RunFailed:
    return RunFailed(
        f"cannot reach the hub for {what}: {_first_line(error)}",
        hint="check the network and HF_HUB_OFFLINE, then retry; finished downloads are kept",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
