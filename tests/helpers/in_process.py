"""The `llmtrain` command without a process of its own: for tests that call it thousands of times."""

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
    """The environment for a process under a limit on the size of files: its coverage could not be saved."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


class Outcome(NamedTuple):
    """What a person would see of a command."""

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
