"""The Hugging Face hub: push a folder, and short messages for the exceptions of its client."""

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
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmtrain.errors import RunFailed, UserError

_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of HTTP errors; the HTTP library depends on the client's version."""
_MISSING = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)


def push(folder: Path, repository: str) -> str:
    """Upload a folder in one commit to OWNER/NAME, created (private) if missing; return its URL."""
    api = HfApi()
    with hub_errors(repository):
        url = api.create_repo(repository, private=True, exist_ok=True)
        message = "Exported by llmtrain"
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    return str(url)


def ping(seconds: float) -> str:
    """Return the hub's address, or raise RunFailed if it does not answer within `seconds`."""
    with hub_errors(constants.ENDPOINT):
        get_session().head(constants.ENDPOINT, timeout=seconds)
    return constants.ENDPOINT


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Replace the client's exceptions with messages about `what`, such as a repository."""
    try:
        yield
    except (_TRANSPORT_ERROR, EntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, _MISSING) and not isinstance(error, LocalEntryNotFoundError):
            hint = "check the name and the revision; private and gated ones need `hf auth login`"
            raise UserError(f"the hub has no {what}: {reason}", hint=hint) from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            hint = "run hf auth login, or set HF_TOKEN, with a token that allows it"
            raise UserError(f"no permission for {what} on the hub: {reason}", hint=hint) from None
        hint = "check the network and HF_HUB_OFFLINE, then retry; finished downloads are kept"
        raise RunFailed(f"cannot reach the hub for {what}: {reason}", hint=hint) from None
