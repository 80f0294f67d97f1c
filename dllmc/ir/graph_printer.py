"""Graphs of a trace as text, layer by layer; layers that do the same are shown once.

A value reads `%name = operator(arguments) : dtype[shape]`, followed by the bytes that it takes in the largest step and,
where it changes, the line of the user's model. Below the heading of a layer, names of its weights start with a dot.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from dllmc.ir.trace import Call, Graph, calls, written_bytes

COMMENT = "  # "
"""What stands before the user's line."""

Row = tuple[Call | None, ...]
"""A call as it is in each of the graphs that are compared; None where a graph does not have it."""

_VALUE = re.compile(r"%[\w.]+")
_WIDEST = 72


@dataclass(frozen=True)
class Group:
    """Consecutive rows of one layer, whose path is empty outside of layers.

    `like`: the number of an earlier group that does the same, and of which it need only be said.
    """

    layer: str
    rows: tuple[Row, ...]
    like: int | None = None


def text_of(graph: Graph, all_layers: bool = False) -> str:
    """A whole graph as text. `all_layers`: those too that do what an earlier one does."""
    inputs = [call for call in graph if call.operator == "input"]
    returned = [call for call in graph if call.operator == "return"]
    groups = folded((call,) for call in graph if call.operator not in ("input", "return"))
    lines = [totals(graph), "", "inputs", *_columns(inputs, "")]
    for alike, run in groupby(enumerate(groups), key=lambda item: None if all_layers else item[1].like):
        members = [group for _, group in run]
        if alike is not None:
            lines += ["", f"{_span([g.layer for g in members])}: as {groups[alike].layer}"]
            continue
        for group in members:
            shown = [call for row in group.rows for call in row if call is not None]
            lines += ["", f"{group.layer or 'outside of layers'}: {totals(shown)}", *_columns(shown, group.layer)]
    return "\n".join([*lines, "", *(f"return {call.arguments}" for call in returned)])


def totals(graph: Sequence[Call]) -> str:
    """How many calls, and what they write in the largest step."""
    return f"calls {calls(graph)}, written {size(written_bytes(graph))}"


def folded(rows: Iterable[Row]) -> tuple[Group, ...]:
    """Rows in their order as groups, those marked that are like an earlier one."""
    groups = list(_grouped(rows))
    placed = {
        f"%{call.name}": (index, len(group.rows) - place)
        for index, group in enumerate(groups)
        for place, row in enumerate(group.rows)
        for call in row
        if call is not None
    }
    shown: list[int] = []
    for index, group in enumerate(groups):
        like = next((first for first in shown if _alike(groups, placed, first, index)), None)
        if like is not None:
            groups[index] = Group(group.layer, group.rows, like)
        elif group.layer:
            shown.append(index)
    return tuple(groups)


def in_layer(text: str, layer: str) -> str:
    """A call's arguments as they read below the heading of its layer."""
    return re.sub(rf"(?<![\w.]){re.escape(layer)}(?=\.)", "", text) if layer else text


def size(count: int) -> str:
    """Bytes for people: 1536 -> 1.5 KiB."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _grouped(rows: Iterable[Row]) -> Iterator[Group]:
    """Consecutive rows of one layer; what is of no layer but amid one belongs to it."""
    runs = [(layer, list(run)) for layer, run in groupby(rows, key=_layer)]
    merged: list[tuple[str, list[Row]]] = []
    for layer, run in runs:
        if len(merged) > 1 and not merged[-1][0] and merged[-2][0] == layer:
            merged[-2][1].extend(merged.pop()[1] + run)
        else:
            merged.append((layer, run))
    return (Group(layer, tuple(run)) for layer, run in merged)


def _layer(row: Row) -> str:
    return next(call.layer for call in row if call is not None)


def _alike(groups: Sequence[Group], placed: dict[str, tuple[int, int]], first: int, second: int) -> bool:
    """Whether two groups read the same but for the layers' paths and for how their values are called.

    What both read from elsewhere must be one value, or stand at the same place of the group right before each.
    """
    a, b = groups[first], groups[second]
    if len(a.rows) != len(b.rows) or not b.layer:
        return False
    renamed: dict[str, str] = {}

    def matches(old: str, new: str) -> bool:
        (group, place), (other, other_place) = placed.get(old, (-1, 0)), placed.get(new, (-1, 0))
        before = group == first - 1 and other == second - 1
        ok = old == new or (before and (place == other_place or not groups[group].layer))
        return renamed.setdefault(old, new if ok else "") == new

    for row, other_row in zip(a.rows, b.rows, strict=True):
        for x, y in zip(row, other_row, strict=True):
            if x is None or y is None:
                if x is not y:
                    return False
                continue
            (template, read), (other_template, other_read) = _parts(x.arguments, a.layer), _parts(y.arguments, b.layer)
            same = (x.operator, x.type, x.is_view, x.source) == (y.operator, y.type, y.is_view, y.source)
            if not same or template != other_template or not all(map(matches, read, other_read)):
                return False
            if renamed.setdefault(f"%{x.name}", f"%{y.name}") != f"%{y.name}":
                return False
    return True


@lru_cache(maxsize=1 << 16)
def _parts(arguments: str, layer: str) -> tuple[str, tuple[str, ...]]:
    """Arguments without the names of values and the path of their layer, and the names."""
    return _VALUE.sub("%", in_layer(arguments, layer)), tuple(_VALUE.findall(arguments))


def _columns(shown: Sequence[Call], layer: str) -> Iterator[str]:
    heads = [
        f"%{call.name}" + ("" if call.operator == "input" else f" = {call.operator}({in_layer(call.arguments, layer)})")
        for call in shown
    ]
    width = max((len(head) for head in heads if len(head) <= _WIDEST), default=0)
    type_width = max((len(call.type) for call in shown), default=0)
    source = ""
    for head, call in zip(heads, shown, strict=True):
        amount = "view" if call.is_view else size(call.size_bytes) if call.type else ""
        line = f"  {head:<{width}} : {call.type:<{type_width}}  {amount:>9}" if call.type else f"  {head}"
        yield line.rstrip() + (COMMENT + _short(call.source) if call.source and call.source != source else "")
        source = call.source


def _short(source: str) -> str:
    """`folder/file.py:3, in f: code` -> `file.py:3: code`."""
    place, _, rest = source.partition(", in ")
    return f"{place.rpartition('/')[2]}: {rest.partition(': ')[2]}"


def _span(layers: Sequence[str]) -> str:
    """`model.layers.1 to 30`."""
    first, last = layers[0], layers[-1]
    return first if first == last else f"{first} to {last.rpartition('.')[2]}"
