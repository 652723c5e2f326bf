"""A whole command as a user starts it: seconds, memory at its peak and bytes read, of it and its children.

Why through a process of its own: Linux counts what a process held before it became the command as the
command's peak. The measuring process has torch in memory; the small one that starts the command has not.

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
    """Run a command; its standard output is thrown away.

    Args:
        command: the program and its arguments.
        cwd: where.
        tree: whether it starts others: memory is then the most that all held together.

    Returns:
        `s`: seconds until it has ended. `MB`: its peak resident memory; with `tree`, looked at 50 times a second,
        pages that processes share counted in parts. `MB read`: what its system calls asked files and the page
        cache for and got (`rchar`: its libraries too, and no page that is only mapped), in its own threads.

    Raises:
        RuntimeError: it failed; says how.
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
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still there to be asked
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
    """Bytes that a process and its descendants hold now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  (pathlib takes longer than this whole look)
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
    """What the kernel tells of a process; nothing where it has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[2:], tree=sys.argv[1] == "1")))
