"""What a pass is: a frozen dataclass whose fields are its options, and facts it requires and ensures.

A fact is a property of the graph with a checker in `facts.py`; the pipeline checks what a pass claims.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from dllmc.ir.step_graph import StepGraph


@dataclass(frozen=True)
class PassResult:
    """Whether the pass changed the graph, and counts of what it did (for the pass log)."""

    modified: bool
    stats: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses set `name`, may set `requires` and `ensures`, and implement `run`."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, step: StepGraph) -> PassResult:
        """Rewrite the step in place; leave it valid even where nothing matched."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The pass as pipeline text: options that differ from their defaults, in braces."""
        options = [
            f"{f.name.replace('_', '-')}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")
