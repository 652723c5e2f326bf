"""The ways in which a command fails on purpose, each with a hint that says what to do next.

Why: a person who mistyped a key and a person whose loss became NaN both need one red line and
one next step, not a traceback. The CLI turns these classes into exit codes 2 and 1.

    raise UserError("no run under runs/", hint="train one: llmtrain pretrain --config FILE")
"""


class UserError(ValueError):
    """What was asked for cannot be done as asked: bad config, bad path, bad option (exit code 2)."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.hint))


class RunFailed(RuntimeError):
    """What was asked for was started and could not be finished: NaN, no disk left (exit code 1)."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.hint))


class WriteFailed(RunFailed):
    """A disk that is full, limited or not to be written to; training goes on without what is not essential."""


def _rebuild(kind: type[UserError | RunFailed], message: str, hint: str) -> UserError | RunFailed:
    return kind(message, hint=hint)
