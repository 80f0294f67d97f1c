"""Recording a pipeline: a graph for each pass that changed one, and what each pass reports."""

from typing import Any

from torch import Tensor

from dllmc.ir.graph_printer import text_of
from dllmc.ir.listing import listing
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import Graph
from dllmc.passes import pipeline
from dllmc.passes.base import LogEntry, Observer, Pass
from dllmc.passes.recorder import Recorder
from dllmc.passes.verify import NumericCheck
from tests.graphs import step_of

PIPELINE = pipeline.parse("inline-regions,remove-noops,cse")


class Graphs(Observer):
    """Lists the graph behind each pass by itself."""

    def __init__(self) -> None:
        self.behind: list[Graph] = []

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        self.behind.append(listing(step))


def body(module: Any, x: Tensor) -> Tensor:
    return x.float().contiguous().exp() + x.exp()


def test_each_pass_has_the_graph_behind_it() -> None:
    """Its text is that of the step at that moment; a pass that changed nothing has the graph before it."""
    step = step_of(body)
    captured, seen = listing(step), Graphs()
    recorder = Recorder(step)
    log = pipeline.run(step, PIPELINE, recorder, seen)
    trace = recorder.trace
    assert [entry.modified for entry in log] == [False, True, True]
    assert trace.graphs == (captured, *seen.behind[1:])
    assert [entry.graph for entry in trace.passes] == [0, 1, 2]
    for entry, graph in zip(trace.passes, seen.behind, strict=True):
        assert text_of(trace.graphs[entry.graph]) == text_of(graph)
    assert trace.maxima == step.maxima


def test_each_pass_has_what_the_log_says_of_it() -> None:
    step = step_of(body)
    recorder = Recorder(step)
    log = pipeline.run(step, PIPELINE, recorder)
    for entry, recorded in zip(log, recorder.trace.passes, strict=True):
        told = [getattr(entry, name) for name in ("text", "modified", "stats", "notes")]
        assert [getattr(recorded, name) for name in ("text", "modified", "stats", "notes")] == told
        assert recorded.error is None
    assert recorder.trace.passes[2].summary == type(PIPELINE[2]).summary()


def test_the_error_of_a_check_is_that_of_its_pass() -> None:
    """A pass that the check did not look at has none."""
    step = step_of(body)
    check = NumericCheck()
    recorder = Recorder(step, check)
    pipeline.run(step, PIPELINE, check, recorder)
    errors = [entry.error for entry in recorder.trace.passes]
    assert errors[0] is None
    assert [e for e in errors if e is not None] == [error for _, error in check.errors]
    assert len(check.errors) == 2
