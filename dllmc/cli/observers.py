"""What looks on for the command line while passes run."""

from dllmc.cli import report
from dllmc.ir.graph_printer import text_of
from dllmc.ir.listing import Lister
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import CAPTURE
from dllmc.passes.base import LogEntry, Observer, Pass


class Log(Observer):
    """Keeps what each pass reports, its times among it, which an artifact does not have."""

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        self.entries.append(entry)


class PrintBetween(Observer):
    """Prints a heading for each pass, with what it did, and the graph behind it where it changed."""

    def __init__(self) -> None:
        self._lister: Lister | None = None

    def before(self, current: Pass, step: StepGraph) -> None:
        if self._lister is None:
            self._lister = Lister(step)
            self._print(CAPTURE)

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        did = report.counts(entry.stats) or "nothing to do"
        if entry.modified:
            self._print(f"{entry.text}: {did}", entry.notes)
        else:
            report.echo((f"=== {entry.text}: {did}; the graph is as it was", *map(_note, entry.notes), ""))

    def _print(self, heading: str, notes: tuple[str, ...] = ()) -> None:
        assert self._lister is not None
        report.echo((f"=== {heading}", *map(_note, notes), *text_of(self._lister.graph()).splitlines(), ""))


def _note(text: str) -> str:
    return f"note: {text}"
