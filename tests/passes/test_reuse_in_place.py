"""reuse-in-place: results take the place of operands, and programs return what they did."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllmc.ir.program import Affine, ForRows, Instruction, Operand, Program, Sizes, Tensor, View
from dllmc.ir.views import coincide
from dllmc.memory.verifier import verify
from dllmc.passes.pipeline import DEFAULT_PIPELINE
from dllmc.passes.reuse_in_place import ReuseInPlace
from tests.fuzz.modules import Module, Pieces
from tests.graphs import captured, execute, execute_program, run, step_inputs, step_of
from tests.loops import CHUNK, STEPS, Replay, executed, looping, places, rows_of
from tests.programs import MAXIMA, TOKENS, planned, programs, shape, tensor, whole

Values = NDArray[np.uint64]
STEP = step_of(lambda m, x: x)


def reused(program: Program) -> tuple[Program, dict[str, int]]:
    """The program after the pass, and what it counted."""
    step = replace(STEP, program=program)
    result = ReuseInPlace().run(step)
    assert not result.modified  # the graph
    assert step.program is not None
    return step.program, dict(result.stats)


def computed(program: Program, sizes: Sizes) -> dict[str, list[int]]:
    """What a program returns: a call makes numbers of its own, the iteration's, and those of all that it reads."""
    planned_for = program.arena_bytes
    arena = np.zeros(planned_for or 0, np.uint64)
    memory: dict[str, Values] = {}
    for name, described in (program.inputs | program.weights | program.buffers).items():
        size = described.size_bytes(program.maxima)
        if planned_for is not None and name in program.buffers:
            memory[name] = arena[described.offset : (described.offset or 0) + size]
        else:
            memory[name] = np.arange(size, dtype=np.uint64) // np.uint64(4) * np.uint64(len(name) + ord(name[-1]))

    def bytes_of(view: View, here: Sizes) -> NDArray[np.int64]:
        width = Tensor(program.tensor(view.base).dtype, ()).size_bytes({})
        return (places(view, here).reshape(-1)[:, None] * width + np.arange(width)).astype(np.int64)

    def read(view: View, here: Sizes) -> Values:
        return memory[view.base][bytes_of(view, here)[:, 0]]

    numbers = {id(call): number for number, (call, _) in enumerate(program.calls())}
    for call, here, _ in executed(program, sizes):
        made = np.uint64(numbers[id(call)] * 1000003 + here.get("start", 0) * 101 + 7)
        with np.errstate(over="ignore"):
            for view in call.reads():
                held = read(view, here)
                weights = np.arange(1, 2 * held.size + 1, 2, dtype=np.uint64)
                made = made * np.uint64(6364136223846793005) + (held * weights).sum(dtype=np.uint64)
            for number, view in enumerate(call.outputs, 1):
                at = bytes_of(view, here)
                memory[view.base][at] = (made + np.arange(len(at), dtype=np.uint64) * np.uint64(number * 31 + 1))[
                    :, None
                ]
        if call.workspace is not None:
            memory[call.workspace][:] = 99
    return {name: read(view, sizes).tolist() for name, view in program.outputs.items()}


def with_operators(program: Program) -> Program:
    """Calls of an operator that may write over each operand; what was listed stands by itself."""

    def call(old: Instruction) -> Instruction:
        return replace(old, op="aten.add.Tensor", inputs=tuple(old.reads()))

    items = (
        replace(item, body=tuple(map(call, item.body))) if isinstance(item, ForRows) else call(item)
        for item in program.instructions
    )
    return replace(program, instructions=tuple(items))


def test_programs_return_what_they_did() -> None:
    """Random programs, planned after the pass: the verifier accepts them, no byte is lost, the results are the same."""
    seen: Counter[str] = Counter()

    @settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(st.one_of(*[looping(alike=True)] * 4, looping(), programs()).map(with_operators))
    def judge(program: Program) -> None:
        after, stats = reused(program)
        assert len(after.buffers) == len(program.buffers) - sum(stats.values())
        plan = planned(after)
        verify(plan)
        for sizes in STEPS:
            assert Replay(plan, sizes).fault() is None
            assert computed(plan, sizes) == computed(program, sizes)
        seen.update([name for name, count in stats.items() if count])

    judge()
    assert seen["in_place"] > 5  # loops, which chance rarely makes fit, are below


X, Y, WIDE = tensor(TOKENS, 4), tensor(TOKENS, 4), tensor(TOKENS, 12)
ADD, GLU, ROPE = "aten.add.Tensor", "dllmc.glu.default", "dllmc.rope.default"
Item = tuple[str, Sequence[Operand], Sequence[View]]


def made(buffers: dict[str, Tensor], *items: Item | list[Item], returns: Sequence[str] = ()) -> Program:
    """A program of calls, those in a list in a loop of 3 tokens; every buffer is first written by a call of its own."""

    def call(item: Item) -> Instruction:
        return Instruction(item[0], tuple(item[1]), tuple(item[2]))

    built = [ForRows(TOKENS, tuple(map(call, item))) if isinstance(item, list) else call(item) for item in items]
    outputs = {name: whole(name, buffers[name]) for name in returns}
    return Program("dense", {**MAXIMA, "chunk": 3}, {"in": WIDE}, {}, buffers, tuple(built), outputs)


def columns(name: str, first: int, count: int = 4) -> View:
    return View(name, shape(TOKENS, count), shape(12, 1), Affine(first))


IN = View("in", shape(TOKENS, 12), shape(12, 1))
ALL = {name: whole(name, t) for name, t in {"x": X, "y": Y, "wide": WIDE}.items()}


def places_taken(program: Program) -> list[tuple[str, str]]:
    """Of every call in place, the operator and the buffer."""
    after, _ = reused(program)
    verify(planned(after))
    return [
        (call.op, call.outputs[0].base)
        for call, _ in after.calls()
        if any(coincide(view, call.outputs[0]) for view in call.reads())
    ]


def test_what_is_read_for_the_last_time_is_written_over() -> None:
    """Whole buffers, and columns of a joint projection that nothing reads any more, while others are read later."""
    program = made(
        {"wide": WIDE, "x": X, "y": Y},
        ("copy", [IN], [ALL["wide"]]),
        (GLU, [columns("wide", 0), columns("wide", 4), "silu"], [ALL["x"]]),
        (ADD, [ALL["x"], columns("wide", 8)], [ALL["y"]]),
        returns=["y"],
    )
    after, stats = reused(program)
    assert stats == {"in_place": 2, "loops": 0}
    assert list(after.buffers) == ["wide"]
    first = columns("wide", 0)
    assert after.instructions[1].outputs == after.instructions[2].outputs == (first,)  # type: ignore[union-attr]
    assert after.outputs == {"y": first}
    assert places_taken(program) == [(GLU, "wide"), (ADD, "wide")]


@pytest.mark.parametrize(
    "program",
    [
        # read later, returned, read twice at once in other places
        made({"x": X, "y": Y}, ("copy", [IN], [ALL["x"]]), (ADD, [ALL["x"], 1], [ALL["y"]]), ("copy", [ALL["x"]], [])),
        made({"x": X, "y": Y}, ("copy", [IN], [ALL["x"]]), (ADD, [ALL["x"], 1], [ALL["y"]]), returns=["x"]),
        made(
            {"wide": WIDE, "y": Y},
            ("copy", [IN], [ALL["wide"]]),
            (ADD, [columns("wide", 0), columns("wide", 2)], [ALL["y"]]),
        ),
        # an input of the step, another dtype, stretched, an operator that allows none
        made({"y": Y}, (ADD, [columns("in", 0), 1], [ALL["y"]])),
        made(
            {"x": tensor(TOKENS, 4, dtype="int32"), "y": Y},
            ("copy", [IN], [ALL["x"]]),
            (ADD, [ALL["x"], 1.5], [ALL["y"]]),
        ),
        made(
            {"x": X, "y": tensor(TOKENS, 5, 4)},
            ("copy", [IN], [ALL["x"]]),
            (
                ADD,
                [View("x", shape(TOKENS, 5, 4), shape(4, 0, 1)), View("in", shape(TOKENS, 5, 4), shape(12, 1, 1))],
                [whole("y", tensor(TOKENS, 5, 4))],
            ),
            ("copy", [whole("y", tensor(TOKENS, 5, 4))], []),
        ),
        made({"x": X, "y": Y}, ("copy", [IN], [ALL["x"]]), ("dllmc.add_rms_norm.default", [ALL["x"], 1], [ALL["y"]])),
        # in a loop: what the next iterations read whole
        made(
            {"x": X, "y": Y},
            ("copy", [IN], [ALL["x"]]),
            [("copy", [ALL["x"]], []), (ADD, [rows_of("x", X, TOKENS), 1], [rows_of("y", Y, TOKENS)])],
            returns=["y"],
        ),
        # the results of a loop are read later in another shape than columns of the joint projection have
        made(
            {"wide": WIDE, "y": Y},
            ("copy", [IN], [ALL["wide"]]),
            (ADD, [columns("wide", 0), 1], [ALL["y"]]),
            ("copy", [View("y", (Affine(0, (("tokens", 4),)),), shape(1))], []),
        ),
    ],
)
def test_what_must_stay_is_not_written_over(program: Program) -> None:
    after, stats = reused(program)
    assert stats == {"in_place": 0, "loops": 0}
    assert after == program
    verify(planned(after))


HEADS = tensor(2, TOKENS, 4)


def test_rows_of_one_of_several_heads() -> None:
    """The place of an iteration's rows within a head: all that comes before them is counted."""
    second = View("h", shape(TOKENS, 4), shape(4, 1), Affine(0, (("tokens", 4),)))
    rows = replace(second, shape=(CHUNK, Affine(4)), offset=second.offset + Affine(0, (("start", 4),)))
    program = made(
        {"h": HEADS, "y": Y},
        ("copy", [IN], [whole("h", HEADS)]),
        [(ADD, [rows, 1], [rows_of("y", Y, TOKENS)])],
        returns=["y"],
    )
    after, stats = reused(program)
    verify(planned(after))
    assert stats["in_place"] == 1
    assert after.outputs["y"] == second
    for sizes in STEPS:
        assert computed(planned(after), sizes) == computed(program, sizes)


def test_a_loops_result_takes_the_place_of_what_its_earlier_calls_read() -> None:
    """Case 2: the residual stream, which a chunk of the loop's own stands between."""
    stream, chunk = rows_of("x", X, TOKENS), tensor(CHUNK, 4)
    inside = whole("c", chunk)
    program = made(
        {"x": X, "c": chunk, "y": Y},
        ("copy", [IN], [ALL["x"]]),
        [("copy", [stream], [inside]), ("copy", [inside], [rows_of("y", Y, TOKENS)])],
        returns=["y"],
    )
    after, stats = reused(program)
    assert stats == {"in_place": 0, "loops": 1}
    assert list(after.buffers) == ["x", "c"]
    assert after.outputs == {"y": ALL["x"]}
    verify(planned(after))
    later = replace(program, outputs={**program.outputs, "x": ALL["x"]})
    assert reused(later) == (later, {"in_place": 0, "loops": 0})
    loop = program.instructions[1]
    assert isinstance(loop, ForRows)
    behind = replace(loop, body=(*loop.body, Instruction("copy", (stream,), ())))
    reads_on = replace(program, instructions=(program.instructions[0], behind))
    assert reused(reads_on)[1] == {"in_place": 0, "loops": 0}
    whole_too = replace(loop, body=(Instruction("copy", (ALL["x"],), ()), *loop.body))
    reads_whole = replace(program, instructions=(program.instructions[0], whole_too))
    assert reused(reads_whole)[1] == {"in_place": 0, "loops": 0}


LLAMA = Pieces(
    "llama", "sliced", "slices", "silu", "gated", "flag", 2, True, True, False, 1.0, 2, False, False, 3
)  # fmt: skip


@pytest.mark.parametrize("chunk", [0, 1, 4, 64])
def test_a_compiled_transformer_is_written_in_place(chunk: int) -> None:
    """Heads are turned and gates are taken in the joint projections; what comes out is what the graph computes.

    Queries of the active spans, which `keep` reads whole, leave the chunk in which they are made.
    """
    step = captured(Module(LLAMA).eval())
    run(step, DEFAULT_PIPELINE.replace("chunk-activations", f"chunk-activations{{chunk={chunk}}}"))
    assert step.program is not None
    calls = [call for call, _ in step.program.calls()]
    for call in calls:
        spans = any(dim.of("active") for dim in step.program.tensor(call.outputs[0].base).shape)
        if call.op in (ROPE, GLU) and not spans:
            assert any(coincide(view, call.outputs[0]) for view in call.reads()), call.op
    assert {ROPE, GLU} <= {call.op for call in calls}
    inputs = step_inputs(5, 7, rows=(4, 1, 6))
    expected, found = execute(step, inputs), execute_program(step, inputs)
    assert torch.equal(found["token"], expected["token"])
    torch.testing.assert_close(found["logprob"], expected["logprob"], rtol=1e-5, atol=1e-5)
