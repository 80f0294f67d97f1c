"""Traces: written as JSON and read back equal, and refused where they are not well-formed."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import ArtifactError, PassError
from dllmc.ir.trace import Call, PassTrace, Trace, calls, from_json, to_json, written_bytes
from tests.ir.stacks import call

INPUT = Call("ids", "input", "", "int64[tokens]", 24, False, "", "")
RETURN = Call("", "return", "logits=%a", "", 0, False, "", "")
GRAPHS = (INPUT, call("a", "%ids"), call("b", "%a"), RETURN), (INPUT, call("b", "%ids"), RETURN)


def pass_trace(text: str, graph: int, error: float | None = None) -> PassTrace:
    return PassTrace(text, "Does it", True, {"removed": 3}, ("a note",), error, graph)


SMALL = Trace(
    {"tokens": 3},
    GRAPHS,
    (pass_trace("first{depth=2}", 1, error=1e-6), replace(pass_trace("second", 1), modified=False)),
)

texts = st.text(max_size=4)
records = st.builds(
    Call, texts, texts, texts, texts, st.integers(0, 1 << 40), st.booleans(), st.sampled_from(["", "l.0"]), texts
)
graphs = st.lists(records, max_size=6, unique=True).map(tuple)


@given(st.lists(graphs, min_size=1, max_size=4), st.data())
@settings(deadline=None, derandomize=True)
def test_json_gives_the_trace_back(graphs: list[tuple[Call, ...]], data: st.DataObject) -> None:
    """Any graphs, through text; `graph` of a pass is the number of any of them."""
    errors = st.none() | st.floats(0, 1)
    passes = data.draw(
        st.lists(st.builds(pass_trace, texts, st.integers(0, len(graphs) - 1), errors), max_size=3).map(tuple)
    )
    trace = Trace({"tokens": 7}, tuple(graphs), passes)
    assert from_json(json.loads(json.dumps(to_json(trace))), "trace.json") == trace


def test_a_call_of_several_graphs_is_one_record() -> None:
    """What a pass leaves alone costs a range; shared texts stand once in a table."""
    document = to_json(SMALL)
    assert len(document["records"]) == len({*GRAPHS[0], *GRAPHS[1]})
    assert document["graphs"] == [[[0, 4]], [[0, 1], [4, 5], [3, 4]]]
    assert document["types"] == ["int64[tokens]", "float32[2]", ""]


def test_the_graph_behind_a_pass() -> None:
    """By its name without options, by `capture`, or behind all; the error lists what there is."""
    assert SMALL.after("capture") == GRAPHS[0]
    assert SMALL.after("first") == SMALL.after("second") == SMALL.after() == GRAPHS[1]
    assert [SMALL.before(0), SMALL.before(1)] == [*GRAPHS]
    with pytest.raises(PassError, match="no pass 'third' has run; choose from: capture, first, second"):
        SMALL.after("third")


def test_totals_leave_out_inputs_and_what_is_returned() -> None:
    assert calls(GRAPHS[0]) == 2
    assert written_bytes(GRAPHS[0]) == 16


def edited(edit: Callable[[Any], object]) -> Any:
    document = copy.deepcopy(json.loads(json.dumps(to_json(SMALL))))
    edit(document)
    return document


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        edited(lambda d: d.pop("records")),
        edited(lambda d: d["records"].append([])),
        edited(lambda d: d["records"][0].__setitem__(1, 99)),
        edited(lambda d: d["records"][0].__setitem__(1, -1)),
        edited(lambda d: d["records"][0].__setitem__(0, 7)),
        edited(lambda d: d["records"][0].__setitem__(4, "1")),
        edited(lambda d: d["operators"].append(3)),
        edited(lambda d: d["graphs"].clear()),
        edited(lambda d: d["graphs"].append([[0, 4]] * 1000)),
        edited(lambda d: d["graphs"].append([[-2, 4]])),
        edited(lambda d: d["graphs"].append([3])),
        edited(lambda d: d["passes"][0].update(graph=2)),
        edited(lambda d: d["passes"][0].update(graph=-1)),
        edited(lambda d: d["passes"][0].update(modified="yes")),
        edited(lambda d: d["passes"][0].update(notes=[1])),
        edited(lambda d: d["passes"][0].update(stats={"x": "y"})),
        edited(lambda d: d["passes"][0].update(error="none")),
        edited(lambda d: d["passes"][0].pop("summary")),
        edited(lambda d: d.update(maxima={"tokens": None})),
    ],
)
def test_what_is_no_trace_is_refused(document: Any) -> None:
    """With the file's name and what to do, and nothing worse."""
    with pytest.raises(ArtifactError, match=r"out/trace\.json: not a trace .*compile again"):
        from_json(document, "out/trace.json")
