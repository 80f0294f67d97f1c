"""Records what a pipeline does: the graph before it, the graph behind each pass, and what each pass reports."""

from dllmc.ir.listing import Lister
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import Graph, PassTrace, Trace
from dllmc.passes.base import LogEntry, Observer, Pass
from dllmc.passes.verify import NumericCheck


class Recorder(Observer):
    """Records one pipeline on one step. `check`: a numeric check that looks on before it, whose errors it notes."""

    def __init__(self, step: StepGraph, check: NumericCheck | None = None) -> None:
        self._lister = Lister(step)
        self._maxima = dict(step.maxima)  # in which the listings give sizes, whatever a budget makes of them
        self._check = check
        self._checked = 0
        self._graphs: list[Graph] = [self._lister.graph()]
        self._passes: list[PassTrace] = []

    @property
    def trace(self) -> Trace:
        """What has been recorded so far."""
        return Trace(self._maxima, tuple(self._graphs), tuple(self._passes))

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        if entry.modified:
            self._graphs.append(self._lister.graph())
        done = entry.text, type(current).summary(), entry.modified, entry.stats, entry.notes
        self._passes.append(PassTrace(*done, error=self._error(), graph=len(self._graphs) - 1))

    def _error(self) -> float | None:
        """The error that the check found of the pass that has just run, if it looked at it."""
        errors = self._check.errors if self._check is not None else []
        found = errors[-1][1] if len(errors) > self._checked else None
        self._checked = len(errors)
        return found
