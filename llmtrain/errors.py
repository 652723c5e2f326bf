"""Errors that a command reports as one red line and a hint, and as exit code 2 or 1.

raise UserError("no run in runs/", hint="train one: llmtrain pretrain --config FILE")
"""

import unicodedata


def printable(text: str) -> str:
    """Return text from outside (tensor, run or hub names) without control characters.

    Control and format characters, such as newlines, escapes and bidirectional overrides, appear as
    their Python escapes.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" else char
        for char in text
    )


class _ReportedError(Exception):
    """An error with a hint; it can be sent to other processes."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.hint))


class UserError(_ReportedError, ValueError):
    """An invalid configuration, path or option (exit code 2)."""


class RunFailed(_ReportedError, RuntimeError):
    """A valid request that failed, such as a NaN loss or a full disk (exit code 1)."""


class StorageWarning(UserWarning):
    """A limitation of a file system that reduces safety; the command continues."""


class WriteFailed(RunFailed):
    """A full, limited or read-only disk; training continues without optional files."""


def _rebuild(kind: type[_ReportedError], message: str, hint: str) -> _ReportedError:
    return kind(message, hint=hint)
