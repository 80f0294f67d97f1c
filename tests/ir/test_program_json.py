"""Programs as JSON: what is written reads back equal, and nothing malformed is read."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllmc.errors import ProgramError
from dllmc.ir.program import Affine, DType, ForRows, Instruction, Program, Tensor, View
from dllmc.ir.program_json import from_json, to_json
from tests.loops import CHUNK, START, looping, rows_of
from tests.programs import MAXIMA, TOKENS, planned, programs, shape, tensor, whole

FILE = "programs/dense.json"


def small_program() -> Program:
    """One instruction with every kind of operand, on a planned buffer and on views of an input and of a weight."""
    ids, w, b = tensor(TOKENS, dtype="int64"), tensor(4, 2), Tensor("float32", shape(TOKENS, 2), 0, (0, 1))
    row = View("w", shape(2), shape(1), Affine(6))
    first = View("ids", shape(1), shape(1), Affine(-1, (("tokens", 1),)))
    operands = (whole("ids", ids), (row, first), DType("int32"), None, True, 3, -0.5, -math.inf, "none")
    return Program(
        name="dense",
        maxima={**MAXIMA, "pages": 6},
        inputs={"ids": ids},
        weights={"w": w},
        buffers={"%b": b, "%work": Tensor("uint8", shape(100), 128, (0, 1))},
        instructions=(Instruction("op", operands, (whole("%b", b),), "%work", "model.py:3"),),
        caches={"kv": Tensor("float16", shape(2, Affine(0, (("pages", 1),)), 8))},
        outputs={"last": View("%b", shape(2), shape(1), Affine(-2, (("tokens", 2),)))},
        arena_bytes=256,
        lower_bound_bytes=200,
    )


def document() -> Any:
    return json.loads(json.dumps(to_json(small_program())))


def test_the_document() -> None:
    """Constants are plain, sizes are ints or coefficients, whole tensors are names, lists of operands are lists."""
    assert document() == {
        "name": "dense",
        "maxima": {**MAXIMA, "pages": 6},
        "arena_bytes": 256,
        "lower_bound_bytes": 200,
        "inputs": {"ids": {"dtype": "int64", "shape": [{"tokens": 1}]}},
        "weights": {"w": {"dtype": "float32", "shape": [4, 2]}},
        "buffers": {
            "%b": {"dtype": "float32", "shape": [{"tokens": 1}, 2], "offset": 0, "lifetime": [0, 1]},
            "%work": {"dtype": "uint8", "shape": [100], "offset": 128, "lifetime": [0, 1]},
        },
        "caches": {"kv": {"dtype": "float16", "shape": [2, {"pages": 1}, 8]}},
        "instructions": [
            {
                "op": "op",
                "inputs": [
                    {"view": "ids"},
                    [
                        {"view": "w", "shape": [2], "strides": [1], "offset": 6},
                        {"view": "ids", "shape": [1], "strides": [1], "offset": {"tokens": 1, "constant": -1}},
                    ],
                    {"dtype": "int32"},
                    None,
                    True,
                    3,
                    -0.5,
                    {"float": "-inf"},
                    "none",
                ],
                "outputs": [{"view": "%b"}],
                "workspace": "%work",
                "source": "model.py:3",
            }
        ],
        "outputs": {"last": {"view": "%b", "shape": [2], "strides": [1], "offset": {"tokens": 2, "constant": -2}}},
    }
    assert from_json(document(), FILE) == small_program()


@settings(deadline=None, derandomize=True)
@given(programs(), st.booleans())
def test_any_program_reads_back_equal(program: Program, plan: bool) -> None:
    """Through standard JSON text, which has no NaN; `repr` tells True from 1 and 1 from 1.0 where == does not."""
    program = planned(program) if plan else program
    text = json.dumps(to_json(program), allow_nan=False)
    again = from_json(json.loads(text), FILE)
    assert again == program
    assert repr(again) == repr(program)
    assert json.dumps(to_json(again)) == text


def looped_program() -> Program:
    """A call in a loop, on rows of its own and on how many are before them."""
    ids, b = tensor(TOKENS, dtype="int64"), tensor(CHUNK, 2, offset=64)
    call = Instruction("op", (rows_of("ids", ids, TOKENS), START), (whole("%b", b),))
    return Program("dense", {**MAXIMA, "chunk": 4}, {"ids": ids}, {}, {"%b": b}, (ForRows(TOKENS, (call,)),), {}, 256)


def looped_document() -> Any:
    return json.loads(json.dumps(to_json(looped_program())))


def test_the_document_of_a_loop() -> None:
    """Its extent and its calls; chunk and start are sizes like others, and the rows of an iteration are a maximum."""
    loop = {
        "for_rows": {"tokens": 1},
        "body": [
            {
                "op": "op",
                "inputs": [
                    {"view": "ids", "shape": [{"chunk": 1}], "strides": [1], "offset": {"start": 1}},
                    {"size": {"start": 1}},
                ],
                "outputs": [{"view": "%b"}],
                "workspace": None,
                "source": "",
            }
        ],
    }
    assert looped_document()["instructions"] == [loop]
    assert looped_document()["maxima"] == {**MAXIMA, "chunk": 4}
    assert from_json(looped_document(), FILE) == looped_program()


@settings(deadline=None, derandomize=True)
@given(looping(), st.booleans())
def test_any_program_of_loops_reads_back_equal(program: Program, plan: bool) -> None:
    assume(any(isinstance(item, ForRows) for item in program.instructions))
    program = planned(program) if plan else program
    again = from_json(json.loads(json.dumps(to_json(program), allow_nan=False)), FILE)
    assert repr(again) == repr(program)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("maxima",), MAXIMA, "maxima"),
        *[(("maxima", "chunk"), bad, "maxima.chunk") for bad in (0, -1, None, 1.0)],
        *[(("instructions", 0, "for_rows"), bad, "instructions[0].for_rows") for bad in (None, 5, "tokens", {"x": 1})],
        *[(("instructions", 0, "for_rows"), {size: 1}, "instructions[0].for_rows") for size in ("chunk", "start")],
        *[(("instructions", 0, "body"), bad, "instructions[0].body") for bad in (None, {}, "op")],
        (("instructions", 0, "body", 0), {"for_rows": {"tokens": 1}, "body": []}, "instructions[0].body[0]"),
        (("instructions", 0, "body", 0, "op"), None, "instructions[0].body[0].op"),
        (("instructions", 0, "body", 0, "inputs", 1, "size"), "start", "instructions[0].body[0].inputs[1].size"),
        (("instructions", 0), {**looped_document()["instructions"][0], "step": 2}, "instructions[0]"),
    ],
)
def test_a_malformed_loop_is_refused(path: tuple[str | int, ...], value: Any, field: str) -> None:
    """A loop is over a size of the step, holds calls alone, and has a maximum of rows."""
    changed = looped_document()
    put(changed, path, value)
    with pytest.raises(ProgramError, match=f"^{re.escape(f'{FILE}: {field}')}: expected "):
        from_json(changed, FILE)


INSTRUCTION = ("instructions", 0)
WEIGHT_VIEW = (*INSTRUCTION, "inputs", 1, 0)
BUFFER = ("buffers", "%b")
NOT_INTEGERS = (True, 1.0, "1", None, [1], math.nan, 10**400, -(10**400), 2**48)
MALFORMED: list[tuple[tuple[str | int, ...], Any, str]] = [
    # (path of a field, what is put there, the field that the error names)
    *[(("name",), bad, "name") for bad in (None, 3, ["dense"])],
    *[((group,), bad, group) for group in ("inputs", "weights", "buffers", "outputs") for bad in (None, [], "x", 1)],
    *[(("maxima",), bad, "maxima") for bad in (None, [9], {}, {**MAXIMA, "layers": 1}, MAXIMA)],
    *[(("maxima", "rows"), bad, "maxima.rows") for bad in (*NOT_INTEGERS, 0, -1)],
    *[(("arena_bytes",), bad, "arena_bytes") for bad in (*NOT_INTEGERS, -1) if bad is not None],
    *[(("lower_bound_bytes",), bad, "lower_bound_bytes") for bad in (*NOT_INTEGERS, -1) if bad is not None],
    *[(("instructions",), bad, "instructions") for bad in (None, {}, "op")],
    *[(("instructions", 0), bad, "instructions[0]") for bad in (None, [], "op", {"op": "copy"})],
    *[((*INSTRUCTION, "op"), bad, "instructions[0].op") for bad in (None, 1, ["copy"])],
    *[((*INSTRUCTION, "source"), bad, "instructions[0].source") for bad in (None, 1)],
    *[((*INSTRUCTION, "inputs"), bad, "instructions[0].inputs") for bad in (None, {"view": "w"}, "w")],
    *[((*INSTRUCTION, "outputs"), bad, "instructions[0].outputs") for bad in (None, {"view": "%b"}, 0)],
    *[((*INSTRUCTION, "workspace"), bad, "instructions[0].workspace") for bad in ("w", "%c", 1, ["%b"], {})],
    *[((*INSTRUCTION, "inputs", 3), bad, "instructions[0].inputs[3]") for bad in (math.nan, math.inf, 2**63, 10**400)],
    ((*INSTRUCTION, "inputs", 2), {"dtype": "int7"}, "instructions[0].inputs[2].dtype"),
    ((*INSTRUCTION, "inputs", 2), {"dtype": ["int32"]}, "instructions[0].inputs[2].dtype"),
    ((*INSTRUCTION, "inputs", 7), {"float": "nan"}, "instructions[0].inputs[7].float"),
    ((*INSTRUCTION, "inputs", 7), {"float": 1.5}, "instructions[0].inputs[7].float"),
    ((*INSTRUCTION, "inputs", 7), {"code": "exit()"}, "instructions[0].inputs[7]"),
    ((*INSTRUCTION, "inputs", 7), {}, "instructions[0].inputs[7]"),
    *[((*INSTRUCTION, "outputs", 0), bad, "instructions[0].outputs[0]") for bad in (None, "%b", 1, {"dtype": "int32"})],
    *[((*WEIGHT_VIEW, "view"), bad, "instructions[0].inputs[1][0].view") for bad in ("%c", "", None, 1, ["w"])],
    *[((*WEIGHT_VIEW, "offset"), bad, "instructions[0].inputs[1][0].offset") for bad in NOT_INTEGERS],
    *[((*WEIGHT_VIEW, "shape", 0), bad, "instructions[0].inputs[1][0].shape[0]") for bad in NOT_INTEGERS],
    *[((*WEIGHT_VIEW, "strides", 0), bad, "instructions[0].inputs[1][0].strides[0]") for bad in NOT_INTEGERS],
    ((*WEIGHT_VIEW, "strides"), [2, 1], "instructions[0].inputs[1][0].strides"),
    ((*WEIGHT_VIEW, "strides"), 1, "instructions[0].inputs[1][0].strides"),
    ((*WEIGHT_VIEW, "dtype"), "int32", "instructions[0].inputs[1][0]"),
    *[((*BUFFER, "dtype"), bad, "buffers.%b.dtype") for bad in ("float31", None, 4, ["float32"], {})],
    *[((*BUFFER, "shape"), bad, "buffers.%b.shape") for bad in (None, 3, {"tokens": 1}, [1] * 65)],
    *[((*BUFFER, "shape", 1), bad, "buffers.%b.shape[1]") for bad in NOT_INTEGERS],
    ((*BUFFER, "shape", 0), {"layers": 1}, "buffers.%b.shape[0]"),
    *[((*BUFFER, "shape", 0), {"tokens": bad}, "buffers.%b.shape[0].tokens") for bad in NOT_INTEGERS],
    ((*BUFFER, "shape"), [2, {"tokens": 1}, {"rows": 1}], "buffers.%b.shape"),
    *[((*BUFFER, "offset"), bad, "buffers.%b.offset") for bad in (*NOT_INTEGERS, -64) if bad is not None],
    *[((*BUFFER, "lifetime"), bad, "buffers.%b.lifetime") for bad in (None, 1, [1], [0, 1, 2], [2, 1], [-1, 1])],
    *[((*BUFFER, "lifetime", 1), bad, "buffers.%b.lifetime") for bad in NOT_INTEGERS],
    ((*BUFFER, "address"), 0, "buffers.%b"),
    (("weights", "w", "offset"), 0, "weights.w"),
    (("inputs", "ids", "lifetime"), [0, 1], "inputs.ids"),
    (("outputs", "last"), {"view": "%c"}, "outputs.last.view"),
    (("outputs", "last"), None, "outputs.last"),
    (("version",), 1, FILE),
]


@pytest.mark.parametrize(("path", "bad", "field"), MALFORMED)
def test_a_malformed_field_is_refused_by_name(path: tuple[str | int, ...], bad: Any, field: str) -> None:
    """The error starts with the file, then the field that is wrong."""
    changed = document()
    put(changed, path, bad)
    with pytest.raises(ProgramError) as caught:
        from_json(changed, FILE)
    prefix = FILE if field == FILE else f"{FILE}: {field}"
    assert str(caught.value).startswith(f"{prefix}: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("path", [(), INSTRUCTION, ("weights", "w"), WEIGHT_VIEW, ("maxima",)])
def test_every_field_is_needed_and_no_other_is_taken(path: tuple[str | int, ...]) -> None:
    """Those of a program, an instruction, a tensor, a view and the maxima."""
    for name in [*at(document(), path), "extra"]:
        changed = document()
        entry = at(changed, path)
        if name in entry:
            del entry[name]
        else:
            entry[name] = 0
        with pytest.raises(ProgramError, match=rf"^{FILE}: .*expected the fields .*, found \["):
            from_json(changed, FILE)


@pytest.mark.parametrize(("group", "name"), [("weights", "ids"), ("buffers", "w"), ("inputs", "%b")])
def test_a_name_stands_for_one_tensor(group: str, name: str) -> None:
    """A name that another group has too is refused."""
    changed = document()
    changed[group][name] = {"dtype": "float32", "shape": [1]}
    with pytest.raises(ProgramError, match=rf"^{FILE}: \w+: expected names that no other tensor has, found '{name}'"):
        from_json(changed, FILE)


@pytest.mark.parametrize("data", [None, [], "program", 3, math.nan])
def test_what_is_no_object_is_no_program(data: object) -> None:
    with pytest.raises(ProgramError, match=f"^{FILE}: expected a JSON object, found"):
        from_json(data, FILE)


def test_operands_nested_beyond_the_stack_are_refused() -> None:
    changed = document()
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    put(changed, (*INSTRUCTION, "inputs"), nested)
    with pytest.raises(ProgramError, match=f"^{FILE}: instructions: expected operands that are not nested so deeply"):
        from_json(changed, FILE)


def test_a_constant_that_is_no_number_is_not_read() -> None:
    """NaN can be written by a compiler's mistake; reading, which follows every writing, refuses it."""
    broken = small_program()
    instruction = Instruction("op", (math.nan,), broken.instructions[0].outputs)
    broken = Program(**{**vars(broken), "instructions": (instruction,)})
    with pytest.raises(ProgramError, match=r"instructions\[0\]\.inputs\[0\]: expected a finite number, found nan"):
        from_json(json.loads(json.dumps(to_json(broken))), FILE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(("%b", "w", "view", "float32", "x")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("view", "dtype", "shape", "float", "tokens", "x")), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.data())
def test_any_value_anywhere_gives_a_program_or_a_typed_error(data: st.DataObject) -> None:
    """And a program that was read is written and read again as it is."""
    changed = document()
    path = data.draw(st.sampled_from(paths(changed)))
    put(changed, path, data.draw(json_values))
    refusal, read = "", None
    try:
        read = from_json(changed, FILE)
    except ProgramError as error:
        refusal = str(error)
    if read is None:
        assert refusal.startswith(FILE)
    else:
        assert from_json(to_json(read), FILE) == read


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def put(document: Any, path: tuple[str | int, ...], value: Any) -> None:
    at(document, path[:-1])[path[-1]] = value


def paths(document: Any) -> list[tuple[str | int, ...]]:
    """The path of every value below the document."""
    steps = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path for step, inner in steps for path in ((step,), *((step, *rest) for rest in paths(inner)))]
