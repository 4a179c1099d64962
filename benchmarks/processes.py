"""What the operating system says about a process: its processor time, its memory. And a core to run on.

Standard library only: the load generator uses it too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int]:
    """The server's core and the load generator's; the same one where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[1] if len(available) > 1 else available[0]


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants that are alive."""
    yield pid
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in (task / "children").read_text().split():
                    yield from tree(int(child))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process with all its threads, ended ones included, and of its living descendants.

    This is ``utime + stime``, from the clock that `clock_getcpuclockid(3)` names, which counts nanoseconds where
    ``/proc/PID/stat`` counts hundredths of a second.
    """
    total = 0.0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            total += time.clock_gettime(~one << 3 | 2)
    return total


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE
    return total


def busy_seconds(core: int) -> float:
    """How long a core was at work since boot, for whomever, in hundredths of a second."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            return (user + nice + system + irq + softirq + steal) / TICKS
    raise ValueError(f"no core {core}")
