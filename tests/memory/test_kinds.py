"""What buffers hold: told from who writes them and what reads them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dllmc.artifact import read
from dllmc.ir.program import Instruction, Program, View
from dllmc.memory.kinds import WRITES, kinds
from dllmc.ops.registry import OPERATORS
from tests.programs import TOKENS, program, tensor, whole

Call = tuple[str, Sequence[str], Sequence[str]]


def made(*calls: Call, workspace: str | None = None) -> Program:
    """A program of calls (operator, what it reads, what it writes); what none writes is the input `x` or a weight."""
    written = {name for _, _, outputs in calls for name in outputs} | ({workspace} if workspace else set())
    read_only = {name for _, inputs, _ in calls for name in inputs} - written
    plain = program(
        {name: tensor(TOKENS, 4) for name in written},
        [(inputs, outputs) for _, inputs, outputs in calls],
        inputs={name: tensor(TOKENS, 4) for name in read_only if name == "x"},
        weights={name: tensor(4, 4) for name in read_only if name != "x"},
    )
    named = [replace(i, op=call[0]) for i, call in zip(plain.instructions, calls, strict=True)]  # type: ignore[type-var]
    if workspace is not None:
        named[-1] = replace(named[-1], workspace=workspace)
    return replace(plain, instructions=tuple(named))


LINEAR, ROPE, ATTENTION = "aten.linear.default", "dllmc.rope.default", "dllmc.attention.default"
EMBED: Call = ("aten.embedding.default", ["table", "x"], ["stream"])


def test_a_layer() -> None:
    """Of fused projections, rope, attention, a gated feed-forward and the sums with the residual stream."""
    layer = made(
        ("aten.cos.default", ["x"], ["cos"]),
        EMBED,
        ("dllmc.rms_norm.default", ["stream", "w0"], ["normed"]),
        (LINEAR, ["normed", "w1"], ["qkv"]),
        (ROPE, ["qkv", "cos", "cos"], ["q"]),
        (ROPE, ["qkv", "cos", "cos"], ["k"]),
        (ATTENTION, ["q", "k", "qkv"], ["attended"]),
        (LINEAR, ["attended", "w2"], ["projected"]),
        ("dllmc.add_rms_norm.default", ["stream", "projected", "w3"], ["normed2", "stream2"]),
        (LINEAR, ["normed2", "w4"], ["gate_up"]),
        ("dllmc.glu.default", ["gate_up", "gate_up"], ["hidden"]),
        ("dllmc.decode_head.default", ["hidden", "w5"], ["token", "confidence", "logprob"]),
        workspace="scratch",
    )
    assert kinds(layer) == {
        "cos": "positions",
        "stream": "residual stream",
        "normed": "norms",
        "qkv": "fused q, k and v",
        "q": "queries",
        "k": "keys and values",
        "attended": "attention",
        "projected": "output projections",
        "normed2": "norms",
        "stream2": "residual stream",
        "gate_up": "feed-forward",
        "hidden": "feed-forward",
        "token": "head",
        "confidence": "head",
        "logprob": "head",
        "scratch": "workspace",
    }


def test_projections_of_their_own_are_told_by_their_use() -> None:
    """Also where they are normed, rotated by single operators, or copied row by row before attention takes them."""
    found = kinds(
        made(
            (LINEAR, ["x", "w1"], ["a"]),
            ("dllmc.rms_norm.default", ["a", "w0"], ["a1"]),
            ("aten.neg.default", ["a1"], ["a2"]),
            ("aten.index_select.default", ["a2", "x"], ["a3"]),
            (LINEAR, ["x", "w2"], ["b"]),
            ("copy", ["b"], ["b1"]),
            (ATTENTION, ["a3", "b1", "b1"], ["out"]),
        )
    )
    assert {found[name] for name in ("a", "a1", "a2", "a3")} == {"queries"}
    assert {found[name] for name in ("b", "b1")} == {"keys and values"}


def test_norms_and_sums_of_single_operators() -> None:
    """What is computed of the stream is a norm's, until a projection is added to it."""
    found = kinds(
        made(
            EMBED,
            ("copy", ["stream"], ["wide"]),
            ("aten.pow.Tensor_Scalar", ["wide"], ["square"]),
            ("aten.mul.Tensor", ["wide", "square"], ["normed"]),
            (LINEAR, ["normed", "w1"], ["up"]),
            ("aten.gelu.default", ["up"], ["hidden"]),
            (LINEAR, ["hidden", "w2"], ["down"]),
            ("aten.add.Tensor", ["down", "stream"], ["stream2"]),
            ("aten.index_select.default", ["stream2", "x"], ["rows"]),
        )
    )
    assert [found[name] for name in ("wide", "square", "normed")] == ["residual stream", "norms", "norms"]
    assert [found[name] for name in ("up", "hidden", "down")] == ["feed-forward", "feed-forward", "output projections"]
    assert [found[name] for name in ("stream2", "rows")] == ["residual stream", "residual stream"]


def test_a_buffer_that_is_written_in_parts_is_what_its_first_part_is() -> None:
    """As the rows of a projection, which the head may overwrite."""
    parts = made((LINEAR, ["x", "w1"], ["a"]), ("dllmc.guide_rows.default", ["x"], ["a"]))
    assert kinds(parts)["a"] == "output projections"


def test_operands_in_a_list_count() -> None:
    """`cat` takes its operands as one list."""
    plain = made(EMBED, (LINEAR, ["stream", "w"], ["a"]), ("aten.cat.default", ["a"], ["b"]), (ATTENTION, ["b"], ["c"]))
    first, second, cat, attention = plain.instructions
    assert isinstance(cat, Instruction)
    view = whole("a", plain.buffers["a"])
    listed = replace(plain, instructions=(first, second, replace(cat, inputs=((view, view),)), attention))
    assert kinds(listed)["a"] == "queries"


def test_the_table_names_operators_that_exist() -> None:
    assert set(WRITES) <= set(OPERATORS)


def test_every_buffer_of_a_compiled_model_is_known(tiny_llada: Path) -> None:
    """None is left over, and what attention reads is what it is called."""
    compiled = read(tiny_llada).programs["dense"]
    found = kinds(compiled)
    assert found.keys() == compiled.buffers.keys()
    assert "other" not in found.values()
    for instruction, _ in compiled.calls():
        if instruction.op == ATTENTION:
            q, k, v = (operand.base for operand in instruction.inputs[:3] if isinstance(operand, View))
            assert found[q] in ("queries", "fused q, k and v")
            assert {found[k], found[v]} <= {"keys and values", "fused q, k and v"}
