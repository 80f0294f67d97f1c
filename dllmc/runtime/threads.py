"""The CPU threads that a step runs on: a fixed number, or as many as other processes leave cores for.

torch divides each operator evenly among its threads and waits for the last of them. A thread that must share its core
with another process is late every time, and while the others wait they spin, which takes time from the late one: one
busy process on two cores makes a step several times as long. One thread fewer costs only that thread's share.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dllmc.errors import RequestError

AUTO = "auto"
"""The value of `threads` that asks for as many threads as there are cores without another process."""

INTERVAL_S = 0.25
"""Seconds over which the load of other processes is averaged. The kernel counts in ticks of 10 ms."""


@dataclass(frozen=True)
class Usage:
    """CPU time so far, in seconds: `everyone`'s on the cores that this process may use, and this process's `own`."""

    at: float
    cores: int
    everyone: float
    own: float


class Threads:
    """Sets torch's number of threads before each step.

    wanted: a number of threads, 1 or more; "auto" for at most torch's own number at this moment; None to leave torch
    as it is. read: returns the usage so far, None where the system does not count it. Raises `RequestError` for any
    other `wanted`.
    """

    def __init__(self, wanted: int | str | None, read: Callable[[], Usage | None] | None = None) -> None:
        is_count = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1
        if wanted not in (None, AUTO) and not is_count:
            raise RequestError(f"threads is {wanted!r}; expected an integer >= 1, {AUTO!r}, or None")
        self._most = torch.get_num_threads()
        self._count = wanted if isinstance(wanted, int) else None
        self._read = read or _usage
        self._last = self._read() if wanted == AUTO else None

    def before_step(self) -> None:
        """Apply the number of threads to the calling thread; torch keeps one for each thread that calls it."""
        if self._last is not None:
            self._count = self._adapted(self._last)
        if self._count is not None and self._count != torch.get_num_threads():
            torch.set_num_threads(self._count)

    def _adapted(self, last: Usage) -> int | None:
        usage = self._read()
        if usage is None or usage.at - last.at < INTERVAL_S:
            return self._count
        self._last = usage
        others = (usage.everyone - last.everyone - (usage.own - last.own)) / (usage.at - last.at)
        return max(1, min(self._most, usage.cores - round(max(0.0, others))))


def _usage() -> Usage | None:
    """Read the usage from Linux's /proc/stat; None on other systems."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for core, *counts in map(str.split, lines):
        if core in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return Usage(time.monotonic(), len(cores), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())
