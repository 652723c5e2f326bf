"""Errors that a command reports as one red line and a hint, and as exit code 2 or 1.

raise UserError("no run in runs/", hint="train one: llmtrain pretrain --config FILE")
"""

import re
import unicodedata

_JOINERS = "\u200c\u200d"
"""Format characters of Persian, Indic scripts and emoji."""
_MAX_MARKS = 4
"""Combining marks on one character; more would cover the lines above and below."""
_LIST_ITEM = "\n  "
"""Line break and indentation of an item in a message; every other line break is escaped."""
_INTEGER_LIMIT = re.compile(r"Exceeds the limit \(4300 digits\) for integer .* increase the limit")
"""Python's message, with advice for programmers only."""
_USER = re.compile(r"(?<=://)[^\s/?#]*@|(?<=:/)(/?)[^\s/?#@]*:\S*@")
"""User and password; `Path` reduces `://` to `:/`."""
_QUERY = re.compile(r"(?<=:/)[^\s?#]*\?[^\s#]*")
_QUERY_VALUE = re.compile(r"=[^&'\"]*[^&'\",;:.)]")
"""A query value, without punctuation that ends the sentence around the URL."""


def mask_credentials(text: str) -> str:
    """Return the text with `***` for the user, password and query values of each URL.

    All values are masked, because stores name their tokens and signatures differently.
    """
    masked = _USER.sub(r"\1***@", text)
    return _QUERY.sub(lambda url: _QUERY_VALUE.sub("=***", url[0]), masked)


def printable(text: str) -> str:
    """Return text from outside (tensor, run or hub names) as one line without control characters.

    Characters that `repr` would escape, such as newlines, terminal escapes, bidirectional overrides
    and lone surrogates, appear as Python escapes. Credentials in URLs are masked.
    """
    if ":/" in text:
        text = mask_credentials(text)
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char)[0] == "M" else 0
        is_safe = (char.isprintable() or char in _JOINERS) and marks <= _MAX_MARKS
        shown.append(char if is_safe else char.encode("unicode_escape").decode())
    return "".join(shown)


class _ReportedError(Exception):
    """An error with a hint; it can be sent to other processes."""

    def __init__(self, message: str, *, hint: str) -> None:
        message = _INTEGER_LIMIT.sub("an integer has more than 4,300 digits", message)
        super().__init__(_LIST_ITEM.join(map(printable, message.split(_LIST_ITEM))))
        self.hint = printable(hint)

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
