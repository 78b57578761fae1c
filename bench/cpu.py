"""CPU time of other processes, to the microsecond, from Linux; elsewhere (macOS) it is not measured."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_PROC = Path("/proc")
# Positions behind the name in /proc/PID/stat (proc_pid_stat(5)): the parent; and, of children that ended and were
# waited for, user and system time in clock ticks. A process's own ticks, a hundred a second, would be too coarse.
_PARENT = 1
_ENDED_CHILDREN = slice(13, 15)
# clock_getcpuclockid(3), which Python lacks: how Linux names the CPU clock of a whole process.
_CLOCK_SHIFT = 3
_CLOCK_OF_PROCESS = 2


def tree_cpu_seconds(pid: int) -> float | None:
    """CPU of a process and all its descendants so far, those that ended included; None where it can't be known."""
    if sys.platform != "linux":
        return None
    parents: dict[int, int] = {}
    ended_seconds: dict[int, float] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        # The name, in parentheses, may hold blanks and parentheses itself.
        fields = text[text.rindex(")") + 1 :].split()
        process = int(path.parent.name)
        parents[process] = int(fields[_PARENT])
        ended_seconds[process] = sum(map(int, fields[_ENDED_CHILDREN])) / os.sysconf("SC_CLK_TCK")
    family = {pid}
    grown = True
    while grown:
        more = {process for process, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return sum(_own_cpu_seconds(process) + ended_seconds.get(process, 0.0) for process in family)


def _own_cpu_seconds(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << _CLOCK_SHIFT) | _CLOCK_OF_PROCESS)
    except OSError:  # it ended meanwhile
        return 0.0
