"""Run several commands in one process with limits of time and memory.

`python limited.py SECONDS '[["runs"], ["report", "runs/run"]]'` prints a list of outcomes as JSON.
If one command takes longer, the process prints the stacks and exits with 1.
"""

import faulthandler
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from in_process import Outcome, invoke, unmeasured

_GIGABYTES = 24
"""Limit of the address space, of which PyTorch reserves a large part without using it."""


def invoke_limited(commands: Sequence[Sequence[str]], *, cwd: Path, seconds: int) -> list[Outcome]:
    """Run the commands one after the other; raise if one of them exceeds a limit."""
    done = subprocess.run(
        [sys.executable, __file__, str(seconds), json.dumps(commands)],
        cwd=cwd,
        env=unmeasured(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*each) for each in json.loads(done.stdout)]


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_GIGABYTES << 30,) * 2)
    outcomes = []
    for command in json.loads(sys.argv[2]):
        faulthandler.dump_traceback_later(int(sys.argv[1]), exit=True)
        outcomes.append(invoke(*command, cwd=Path.cwd()))
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    _main()
