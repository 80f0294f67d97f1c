"""Begins a composed step where its program runs: a CPU is done with it then, a GPU while the host goes on.

The host keeps the table (`dllmc.runtime.table`); of it a GPU knows each request's tokens, from when it has a place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dllmc.runtime.arena import Memory
from dllmc.runtime.batch import Batch, Commits
from dllmc.runtime.executor import Executor
from dllmc.runtime.graphs import GraphExecutor
from dllmc.runtime.table import IntArray, Table


@dataclass(frozen=True)
class Running:
    """A step under way; `wait` returns what it commits, once it is over."""

    step: Batch
    wait: Callable[[], Commits]


def launch(step: Batch, executor: Executor) -> Running:
    """Begin a step. Raises what `executor` raises."""
    if not isinstance(executor, GraphExecutor):
        predicted = executor.run(step.sizes, step.inputs)
        return Running(step, lambda: step.choose(**predicted))
    news = unknown(step.table, step.rows)
    before = partial(tell, executor.memory, news) if news else None
    inputs = {**step.given, "places": step.places()}
    finish = executor.launch(step.sizes, inputs, before)
    return Running(step, lambda: step.chosen(finish()["committed"]))


def unknown(table: Table, rows: IntArray) -> dict[int, npt.NDArray[np.int32]]:
    """What a GPU must be told of rows before their step, once: a part of `sequences` [2, length] by row."""
    found = {}
    for row in rows[table.fresh[rows]].tolist():
        length = int(table.length[row])
        tokens = np.where(table.masked[row, :length], -1, table.token_ids[row, :length])
        found[row] = np.stack((tokens, table.reference[row, :length])).astype(np.int32)
    table.fresh[rows] = False
    return found


def tell(memory: Memory, parts: dict[int, npt.NDArray[np.int32]]) -> None:
    """Begin to move what is `unknown` to the GPU, behind the steps so far."""
    sequences = memory.placed("sequences")
    for row, part in parts.items():
        given = torch.from_numpy(part)
        if sequences.is_cuda:
            given = given.pin_memory()
        for side, values in enumerate(given):
            sequences[row, side, : len(values)].copy_(values, non_blocking=True)
