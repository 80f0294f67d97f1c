"""What a pass is: a frozen dataclass whose fields are its options, and facts it requires and ensures.

A fact is a property of the graph with a checker in `facts.py`; the pipeline checks what a pass claims. An observer
looks on while a pipeline runs: it verifies, records or prints.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from dllmc.ir.step_graph import StepGraph

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class PassResult:
    """Whether the pass changed the graph, counts of what it did, and why it left alone what it might have changed."""

    modified: bool
    stats: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses set `name`, may set `requires` and `ensures`, and implement `run`."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, step: StepGraph) -> PassResult:
        """Rewrite the step in place; leave it valid even where nothing matched."""
        raise NotImplementedError

    def expected(self, step: StepGraph, before: Values, inputs: Values) -> Values:
        """What the step is to return after this pass, given what it returned before on the same inputs.

        Only a pass that changes what the step returns says something else than `before`. Where numbers cannot decide
        an integer, it is -1.
        """
        return before

    @classmethod
    def summary(cls) -> str:
        """What the pass does, in the first sentence of its docstring."""
        text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        return text.split(". ")[0].rstrip(".")

    def __str__(self) -> str:
        """The pass as pipeline text: options that differ from their defaults, in braces."""
        options = [
            f"{f.name.replace('_', '-')}={str(getattr(self, f.name)).lower()}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclass(frozen=True)
class LogEntry:
    """What one pass did: its text, whether it modified the graph, its counts and notes, and times in seconds.

    `seconds` is the pass itself, `check_seconds` the propagation and the checks behind it.
    """

    text: str
    modified: bool
    stats: dict[str, int]
    notes: tuple[str, ...]
    seconds: float
    check_seconds: float


class Observer:
    """Looks on while a pipeline runs. Each method does nothing unless it is overridden."""

    def before(self, current: Pass, step: StepGraph) -> None:
        """Called before each pass."""

    def after(self, current: Pass, step: StepGraph, entry: LogEntry) -> None:
        """Called after each pass, when its claims have been checked."""
