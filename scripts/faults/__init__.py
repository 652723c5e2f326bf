"""Shared parts of `scripts/torture` (kills) and `scripts/power_loss`.

workload.py    the commands, and the comparison of their results with an undisturbed run
trace.py       the file system calls of a command, recorded by strace
disk.py        what a disk may contain after a power loss at any of these calls
"""
