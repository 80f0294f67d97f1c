"""Streams of a CPU that plays host and GPU, and engines on them; state and what is given lie in different memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import dllmc
from dllmc.artifact import Artifact
from dllmc.ir.program import Program
from dllmc.runtime import graphs
from dllmc.runtime.arena import Memory
from dllmc.runtime.executor import Executor


class Recorder:
    """A stream whose calls are made at once; a recorded list of them is made when it is replayed."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.fails = False

    def run(self, calls: Callable[[], object]) -> Callable[[], object]:
        calls()
        return cache(lambda: self.did.append("finish"))

    def record(self, calls: Callable[[], object]) -> Callable[[], object]:
        self.did.append("record")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.did.append("replay")
            calls()

        return replay


class Late(Recorder):
    """A stream whose calls are made as late as a GPU may make them: in order, when someone waits.

    behind: steps that were launched while one was under way. most: under way at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line: list[Callable[[], object]] = []
        self.behind = 0
        self.most = 0

    def run(self, calls: Callable[[], object]) -> Callable[[], object]:
        self.behind += bool(self.line)
        self.line.append(calls)
        self.most = max(self.most, len(self.line))

        def wait() -> None:
            while calls in self.line:
                self.line.pop(0)()

        return wait


@contextmanager
def instead_of_a_gpu(stream: Recorder) -> Iterator[None]:
    """Engines that are made within run on the stream, as they would on a GPU's."""

    def executors(programs: Mapping[str, Program], memory: Memory, mask_id: int) -> dict[str, Executor]:
        memory.set_apart(pinned=False)
        return graphs.on_stream(programs, memory, stream, mask_id)

    with patch("dllmc.runtime.engine.executors", executors):
        yield


def engine_on(stream: Recorder, loaded: Artifact) -> dllmc.Engine:
    """An engine of an artifact for cuda, on a CPU with such a stream."""
    with instead_of_a_gpu(stream):
        return dllmc.Engine(loaded, device="cpu", buckets=True)
