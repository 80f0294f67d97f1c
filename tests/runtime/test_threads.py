"""Threads of a step: fixed, as torch has them, or as many as other processes leave cores for."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dllmc
from dllmc.errors import RequestError
from dllmc.runtime import threads
from dllmc.runtime.threads import Threads, Usage


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


class Machine:
    """Cores on which this process and others have used so much CPU time."""

    def __init__(self, cores: int) -> None:
        self.usage = Usage(0.0, cores, 0.0, 0.0)

    def read(self) -> Usage:
        return self.usage

    def passes(self, seconds: float, others: float, own: float) -> None:
        """Let time pass in which so many cores, on average, are busy with each."""
        u = self.usage
        self.usage = Usage(u.at + seconds, u.cores, u.everyone + (others + own) * seconds, u.own + own * seconds)


def chosen(cores: int, others: float, own: float, most: int | None = None) -> int:
    """The threads of a step on a machine after a second of such a load."""
    torch.set_num_threads(most or cores)
    machine = Machine(cores)
    adapting = Threads("auto", machine.read)
    machine.passes(1.0, others, own)
    adapting.before_step()
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("cores", "others", "own", "expected"),
    [
        (2, 0.0, 2.0, 2),
        (2, 0.3, 1.7, 2),  # a process that wakes up now and then
        (2, 0.7, 1.3, 1),  # one busy process beside two threads
        (2, 1.0, 1.0, 1),  # the same beside one thread
        (2, 1.3, 0.7, 1),  # two busy processes
        (8, 3.0, 5.0, 5),
        (8, 20.0, 0.1, 1),  # as ticks may add up
        (8, -0.1, 8.1, 8),
    ],
)
def test_auto_uses_the_cores_that_others_leave(cores: int, others: float, own: float, expected: int) -> None:
    """`round` of the load of others is taken off the cores; one thread is always left."""
    assert chosen(cores, others, own) == expected


def test_auto_uses_no_more_than_torch_would() -> None:
    """Torch takes one thread a physical core; a busy process on a spare hardware thread costs none."""
    assert chosen(cores=8, others=2.0, own=4.0, most=4) == 4
    assert chosen(cores=8, others=6.0, own=2.0, most=4) == 2


def test_auto_follows_the_load() -> None:
    """A number holds for an interval and is chosen anew after it."""
    torch.set_num_threads(2)
    machine = Machine(2)
    adapting = Threads("auto", machine.read)
    found = []
    for seconds, others in ((1.0, 1.0), (threads.INTERVAL_S / 2, 0.0), (threads.INTERVAL_S, 0.0)):
        machine.passes(seconds, others, 1.0)
        adapting.before_step()
        found.append(torch.get_num_threads())
    assert found == [1, 1, 2]


def test_auto_without_a_count_of_usage() -> None:
    """On a system without /proc/stat torch is left as it is."""
    torch.set_num_threads(2)
    Threads("auto", lambda: None).before_step()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat")
def test_usage_counts_other_processes() -> None:
    """What a busy child takes, as its own clock counts it, is in everyone's time and not in this process's."""
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(time.process_time())"
    before = threads._usage()
    child = subprocess.run([sys.executable, "-c", busy], capture_output=True, text=True, check=True)
    after = threads._usage()
    assert before is not None
    assert after is not None
    others = after.everyone - before.everyone - (after.own - before.own)
    ticks = (after.cores + 1) / os.sysconf("SC_CLK_TCK")
    assert others >= float(child.stdout) - ticks
    assert after.at - before.at >= 0.5
    assert after.own - before.own < 0.3


@pytest.mark.parametrize("wanted", [0, -1, True, 1.5, "2", "many"])
def test_refused(wanted: object) -> None:
    """Neither a count, nor auto, nor None."""
    with pytest.raises(RequestError, match=r"threads is .*; expected an integer >= 1, 'auto', or None"):
        Threads(wanted)  # type: ignore[arg-type]


def test_an_engine_applies_it_in_whatever_thread_steps(tiny_llada: Path) -> None:
    """Torch keeps a number for each thread that calls it: the engine sets it where a step runs."""
    torch.set_num_threads(2)
    seen: list[int] = []
    with dllmc.load(tiny_llada, threads=1) as engine:

        def run() -> None:
            params = dllmc.SamplingParams(gen_length=4, block_length=4)
            engine.generate([[5, 6, 7]], params, on_step=lambda _: seen.append(torch.get_num_threads()))

        other = threading.Thread(target=run)
        other.start()
        other.join()
    assert seen == [1, 1, 1, 1]
