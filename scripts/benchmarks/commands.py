"""Measure a whole command like a user starts it: seconds, peak memory and bytes read.

Why: a separate small process starts the command, because Linux counts memory held before `exec` as
the command's peak, and the measuring process holds torch.

    measured = run([LLMTRAIN, "average", "run", "--every", "10"], cwd=folder)
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

LLMTRAIN = str(Path(sys.executable).with_name("llmtrain"))


def run(command: list[str], cwd: Path, *, tree: bool = False) -> dict[str, float]:
    """Run a command and discard its standard output.

    Args:
        command: the program and its arguments.
        cwd: working directory.
        tree: include child processes: memory is the largest sum over the tree.

    Returns:
        `s`: seconds until the end. `MB`: peak resident memory; with `tree`, the proportional set
        size sampled 50 times a second. `MB read`: bytes returned by read calls (`rchar`: includes
        libraries and page-cache hits, excludes mapped pages).

    Raises:
        RuntimeError: the command failed.
    """
    starter = [sys.executable, "-S", str(Path(__file__)), str(int(tree)), *command]
    done = subprocess.run(starter, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _measure(command: list[str], *, tree: bool) -> dict[str, float]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while tree and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        most = max(most, _held_by_tree(process.pid))
        time.sleep(0.02)
    os.waitid(
        os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
    )  # ended but not reaped: /proc is still readable
    seconds = time.perf_counter() - started
    read = next(
        int(line.split()[1]) for line in _lines(process.pid, "io") if line.startswith("rchar")
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    return {"s": seconds, "MB": max(most, usage.ru_maxrss * 1024) / 1e6, "MB read": read / 1e6}


def _held_by_tree(root: int) -> int:
    """Return the bytes that a process and its descendants hold now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  (pathlib is slower than the whole scan)
        if entry.isdecimal() and (stat := _lines(int(entry), "stat")):
            children.setdefault(int(stat[0].rpartition(")")[2].split()[1]), []).append(int(entry))
    held, todo = 0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        held += sum(
            int(line.split()[1]) for line in _lines(pid, "smaps_rollup") if line.startswith("Pss:")
        )
    return held * 1024


def _lines(pid: int, name: str) -> list[str]:
    """Return the lines of a /proc file; none if the process has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[2:], tree=sys.argv[1] == "1")))
