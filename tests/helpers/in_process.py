"""Run the `llmtrain` command within the test process, for speed."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from llmtrain.cli.main import main


def unmeasured() -> dict[str, str]:
    """Return the environment without coverage, which fails under a file size limit."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


def invoke(*arguments: str | Path, cwd: Path) -> Outcome:
    """Run one command in `cwd`."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["llmtrain", *map(str, arguments)])
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        code: Sequence[int] = []
        try:
            main()
        except SystemExit as left:
            code = [left.code if isinstance(left.code, int) else int(left.code is not None)]
    return Outcome(code[0] if code else 0, stdout.getvalue(), stderr.getvalue())


def refused(*arguments: str | Path, cwd: Path, expected: str, code: int = 2) -> None:
    """Assert that a command exits with `code`, one line with the `expected` text, and a hint."""
    outcome = invoke(*arguments, cwd=cwd)
    assert outcome.code == code, outcome
    assert outcome.stderr.startswith("error: "), outcome
    message, hint, *more = outcome.stderr.splitlines()
    assert expected in message, message
    assert len(message) < 600
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    assert not more
