"""Begins a composed step where its program runs: a CPU is done with it then, a GPU while the host goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dllmc.runtime import on_device
from dllmc.runtime.batch import Batch, Commits
from dllmc.runtime.executor import Executor
from dllmc.runtime.graphs import GraphExecutor


@dataclass(frozen=True)
class Running:
    """A step under way; `wait` returns what it commits, once it is over."""

    step: Batch
    wait: Callable[[], Commits]


def launch(step: Batch, executor: Executor) -> Running:
    """Begin a step, whose requests are to `advance` then. Raises what `executor` raises."""
    if not isinstance(executor, GraphExecutor):
        predicted = executor.run(step.sizes, step.inputs)
        return Running(step, lambda: step.choose(**predicted))
    news = on_device.unknown(step.table, step.rows)
    before = partial(on_device.tell, executor.memory, news) if news else None
    inputs = {**step.given, "places": step.places()}
    finish = executor.launch(step.sizes, inputs, before)
    return Running(step, lambda: step.chosen(finish()["committed"]))
