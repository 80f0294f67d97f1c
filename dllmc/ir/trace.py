"""What a pipeline did to a step, as plain data: the graph behind every pass, call by call, and what each pass reports.

`dllmc.passes.recorder` makes a trace, an artifact carries it as `trace.json`, `dllmc inspect` shows it. Nothing is ever
run from it. Equal calls of different graphs are one record there, so a deep model's trace stays small.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dllmc.errors import ArtifactError, PassError

CAPTURE = "capture"
"""The name of the graph before the first pass."""


@dataclass(frozen=True)
class Call:
    """A line of a graph: a call of an operator, or `input` or `return`, which stand there as operators.

    `arguments` has inputs and results of calls as `%name`, weights by their names. `type` is the dtype and the shape in
    the step's sizes, such as `float32[tokens, 64]`. `size_bytes`: what the call writes in the largest step; nothing
    where its results only view what it reads. `layer`: the path of the repeated layer in the model, if it is in one.
    """

    name: str
    operator: str
    arguments: str
    type: str
    size_bytes: int
    is_view: bool
    layer: str
    source: str


Graph = tuple[Call, ...]


@dataclass(frozen=True)
class PassTrace:
    """What one pass did, as `dllmc.passes.base.LogEntry` has it, and the number of the graph behind it.

    No times: the same model and options give the same trace. `error`: the largest relative error that the numeric
    check found, if it ran.
    """

    text: str
    summary: str
    modified: bool
    stats: Mapping[str, int]
    notes: tuple[str, ...]
    error: float | None
    graph: int

    @property
    def name(self) -> str:
        """The pass without its options."""
        return self.text.partition("{")[0]


@dataclass(frozen=True)
class Trace:
    """Graph 0 is what was captured; each pass that modified the graph adds one. `maxima`: sizes of the largest step."""

    maxima: Mapping[str, int]
    graphs: tuple[Graph, ...]
    passes: tuple[PassTrace, ...]

    def before(self, index: int) -> Graph:
        """The graph that the pass of that index found."""
        return self.graphs[self.passes[index - 1].graph if index else 0]

    def after(self, name: str | None = None) -> Graph:
        """The graph behind the last pass of that name, behind the capture, or, without a name, behind all passes.

        Raises `PassError` listing the choices.
        """
        behind = {CAPTURE: 0} | {entry.name: entry.graph for entry in self.passes}
        if name is not None and name not in behind:
            raise PassError(f"no pass {name!r} has run; choose from: {', '.join(behind)}")
        return self.graphs[-1 if name is None else behind[name]]


def calls(graph: Iterable[Call]) -> int:
    """How many operators a graph calls."""
    return sum(call.operator not in ("input", "return") for call in graph)


def written_bytes(graph: Iterable[Call]) -> int:
    """What all calls together write in the largest step."""
    return sum(call.size_bytes for call in graph if call.operator != "input")


# The texts that many calls share, and the table that has them in JSON.
_SHARED = {"operator": "operators", "type": "types", "layer": "layers", "source": "sources"}
_FIELDS = tuple(f.name for f in fields(Call))


def to_json(trace: Trace) -> dict[str, Any]:
    """A JSON document of the trace; `from_json` reads it back equal.

    `records` are the distinct calls, a list of the fields of `Call` each, where shared texts are indices into tables.
    A graph is a list of ranges of records, `[start, stop]`.
    """
    tables: dict[str, dict[str, int]] = {table: {} for table in _SHARED.values()}
    records: dict[Call, int] = {}
    graphs = [_ranges(records.setdefault(call, len(records)) for call in graph) for graph in trace.graphs]
    rows = [
        [
            (table := tables[_SHARED[name]]).setdefault(value, len(table)) if name in _SHARED else value
            for name, value in vars(call).items()
        ]
        for call in records
    ]
    return {
        "maxima": dict(trace.maxima),
        **{name: list(table) for name, table in tables.items()},
        "records": rows,
        "graphs": graphs,
        "passes": [asdict(entry) for entry in trace.passes],
    }


def from_json(document: Any, where: str) -> Trace:
    """Parse and check a trace. Raises `ArtifactError` naming the file and what is wrong."""
    try:
        tables = {table: [_checked(text, str) for text in document[table]] for table in _SHARED.values()}
        records = [_call(row, tables) for row in document["records"]]
        graphs = tuple(_graph(ranges, records) for ranges in document["graphs"])
        passes = tuple(_pass(entry, len(graphs)) for entry in document["passes"])
        maxima = {_checked(symbol, str): _checked(n, int) for symbol, n in document["maxima"].items()}
        _require(len(graphs) > 0, "at least one graph", graphs)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{where}: not a trace of this version of dllmc ({reason}); compile again") from None
    return Trace(maxima, graphs, passes)


def _ranges(indices: Iterable[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    return ranges


def _call(row: Sequence[Any], tables: Mapping[str, Sequence[str]]) -> Call:
    _require(isinstance(row, list) and len(row) == len(_FIELDS), f"a record of {len(_FIELDS)} fields", row)
    values = dict(zip(_FIELDS, row, strict=True))
    for name, table in _SHARED.items():
        values[name] = tables[table][_count(values[name])]
    for name, kind in (("name", str), ("arguments", str), ("is_view", bool)):
        _checked(values[name], kind)
    _count(values["size_bytes"])
    return Call(**values)


def _graph(ranges: Sequence[Sequence[int]], records: Sequence[Call]) -> Graph:
    spans = [(_count(start), _count(stop)) for start, stop in ranges]
    _require(sum(stop - start for start, stop in spans) <= len(records), "each record at most once", "more")
    return tuple(call for start, stop in spans for call in records[start:stop])


def _pass(entry: Mapping[str, Any], graphs: int) -> PassTrace:
    _require(_count(entry["graph"]) < graphs, "the number of a graph", entry["graph"])
    kinds = {"text": str, "summary": str, "modified": bool, "stats": dict, "notes": list, "graph": int}
    values = {name: _checked(entry[name], kind) for name, kind in kinds.items()}
    for name, n in entry["stats"].items():
        _checked(name, str), _checked(n, int)
    values["notes"] = tuple(_checked(note, str) for note in entry["notes"])
    values["error"] = None if entry["error"] is None else _checked(entry["error"], float)
    return PassTrace(**values)


def _checked(value: Any, kind: type) -> Any:
    _require(isinstance(value, kind), f"a {kind.__name__}", value)
    return value


def _count(value: Any) -> int:
    _require(isinstance(value, int) and value >= 0, "a count", value)
    return int(value)


def _require(ok: bool, expected: str, found: object) -> None:
    if not ok:
        raise ValueError(f"expected {expected}, found {found!r:.60}")
