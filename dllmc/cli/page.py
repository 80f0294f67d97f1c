"""The page that shows what the compiler did to a model: one HTML file that needs nothing else.

The template `page.html` draws it from the data that stands in it as JSON: the trace as the artifact has it, and how
each graph differs from the one before it.
"""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dllmc.ir.graph_printer import Row, folded
from dllmc.ir.trace import Call, Graph, Trace, to_json

if TYPE_CHECKING:
    from dllmc.artifact import Artifact
    from dllmc.passes.base import LogEntry


def render(artifact: "Artifact", trace: Trace, log: "Sequence[LogEntry]" = ()) -> str:
    """The page of an artifact and its trace. `log`: what the passes reported while they ran, for their times."""
    data = {
        "title": artifact.path.name,
        **{name: artifact.manifest[name] for name in ("model", "options", "versions", "memory")},
        "programs": [
            {
                "name": name,
                "maxima": program.maxima,
                "instructions": len(list(program.calls())),
                "arena_bytes": program.arena_bytes,
                "lower_bound_bytes": program.lower_bound_bytes,
                "buffers": [
                    [buffer, tensor.offset, tensor.size_bytes(program.maxima), *tensor.lifetime]
                    for buffer, tensor in program.buffers.items()
                    if tensor.lifetime is not None
                ],
            }
            for name, program in sorted(artifact.programs.items(), key=lambda item: item[1] is not artifact.program)
        ],
        "times": [[entry.seconds, entry.check_seconds] for entry in log],
        "trace": to_json(trace),
        "views": views(trace),
    }
    # Within a script no text may look like markup: "<" is written as JSON's escape of it.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("dllmc.cli").joinpath("page.html").read_text(encoding="utf-8")
    before, rest = template.split("{{title}}")
    middle, after = rest.split("{{data}}")
    return "".join((before, html.escape(artifact.path.name), middle, embedded, after))


def views(trace: Trace) -> list[dict[str, Any]]:
    """Each graph next to the one before it, as the page shows it.

    `inputs`, `returns` and each group's `rows` are numbers of the trace's records: one for what is in both graphs,
    `[new, old]` for what is not the same in both, -1 standing for what a graph does not have. A group has its `layer`,
    and `like` as `dllmc.ir.graph_printer.Group` has it.
    """
    records: dict[Call, int] = {}
    for graph in trace.graphs:
        for call in graph:
            records.setdefault(call, len(records))

    def row(new: Call | None, old: Call | None) -> int | list[int]:
        numbers = [-1 if call is None else records[call] for call in (new, old)]
        return numbers[0] if numbers[0] == numbers[1] else numbers

    def view(before: Graph, after: Graph) -> dict[str, Any]:
        rows = list(changes(before, after))
        inputs, calls, returns = ([r for r in rows if _kind(r) == kind] for kind in ("input", "", "return"))
        return {
            "inputs": [row(*r) for r in inputs],
            "groups": [
                {"layer": group.layer, "like": group.like, "rows": [row(*r) for r in group.rows]}
                for group in folded(calls)
            ],
            "returns": [row(*r) for r in returns],
        }

    pairs: Iterable[tuple[Graph, Graph]] = zip((trace.graphs[0], *trace.graphs), trace.graphs, strict=False)
    return [view(*pair) for pair in pairs]


def changes(before: Graph, after: Graph) -> Iterator[Row]:
    """Rows (call of `after`, call of `before`): two calls of one name are one row; what is gone stands where it was."""
    old = {_key(call): call for call in before}
    kept = {_key(call) for call in after}
    gone: dict[tuple[bool, str] | None, list[Call]] = {}
    anchor = None
    for key, call in old.items():
        if key in kept:
            anchor = key
        else:
            gone.setdefault(anchor, []).append(call)
    yield from ((None, call) for call in gone.get(None, ()))
    for call in after:
        yield call, old.get(_key(call))
        yield from ((None, other) for other in gone.get(_key(call), ()))


def _key(call: Call) -> tuple[bool, str]:
    """What identifies a call among those of its graph: a result may have the name of an input."""
    return call.operator == "input", call.name


def _kind(row: Row) -> str:
    operator = next(call.operator for call in row if call is not None)
    return operator if operator in ("input", "return") else ""
