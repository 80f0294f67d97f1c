"""A hand-written program, run at several sizes over one arena, gives what torch gives in eager mode."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import ProgramError
from dllmc.ir.program import SYMBOLS, Affine, DType, ForRows, Instruction, Program, Tensor, View
from dllmc.ops.registry import Operator, operator
from dllmc.runtime import binding as binding_module
from dllmc.runtime import executor as executor_module
from dllmc.runtime.executor import Executor
from tests.loops import CHUNK, START, rows_of
from tests.programs import MAXIMA, ROWS, TOKENS, executor_of, planned, shape, tensor, whole

Array = np.ndarray[Any, np.dtype[Any]]
VOCAB, WIDTH, OUT = 11, 6, 8
SHAPES: dict[str, Tensor] = {
    "ids": tensor(TOKENS, dtype="int64"),
    "rows": tensor(ROWS, dtype="int64"),
    "scale": tensor(TOKENS),
    "table": tensor(VOCAB, WIDTH),
    "w": tensor(OUT, WIDTH),
    "bias": tensor(OUT),
    "%e": tensor(TOKENS, WIDTH),
    "%t": tensor(WIDTH, TOKENS),
    "%scaled": tensor(WIDTH, TOKENS),
    "%sum": tensor(TOKENS, WIDTH),
    "%h": tensor(TOKENS, OUT),
    "%halves": tensor(TOKENS, OUT),
    "%r": tensor(ROWS, OUT),
    "%p": tensor(ROWS, OUT),
    "%i": tensor(ROWS, OUT, dtype="int32"),
}
GROUPS = {"inputs": ("ids", "rows", "scale"), "weights": ("table", "w", "bias")}


def hand_written() -> Program:
    """Embeddings, scaled in a transposed copy and added to themselves; linear; halves swapped; softmax of some rows."""

    def v(name: str) -> View:
        return whole(name, SHAPES[name])

    transposed = View("%scaled", shape(TOKENS, WIDTH), (Affine(1), TOKENS))
    upper = View("%h", shape(TOKENS, OUT // 2), shape(OUT, 1), Affine(OUT // 2))
    lower = View("%h", shape(TOKENS, OUT // 2), shape(OUT, 1))
    last = View("%h", shape(OUT), shape(1), Affine(-OUT, (("tokens", OUT),)))
    instructions = (
        Instruction("aten.embedding.default", (v("table"), v("ids")), (v("%e"),)),
        Instruction("copy", (View("%e", shape(WIDTH, TOKENS), shape(1, WIDTH)),), (v("%t"),)),
        Instruction("aten.mul.Tensor", (v("%t"), v("scale")), (v("%scaled"),)),
        Instruction("aten.add.Tensor", (v("%e"), transposed), (v("%sum"),)),
        Instruction("aten.linear.default", (v("%sum"), v("w"), v("bias")), (v("%h"),)),
        Instruction("aten.cat.default", ((upper, lower), -1), (v("%halves"),)),
        Instruction("aten.index_select.default", (v("%halves"), 0, v("rows")), (v("%r"),)),
        Instruction("aten.softmax.int", (v("%r"), -1, DType("float32")), (v("%p"),)),
        Instruction("copy", (v("%r"),), (v("%i"),)),
    )
    return Program(
        name="dense",
        maxima=MAXIMA,
        **{group: {name: SHAPES[name] for name in names} for group, names in GROUPS.items()},
        buffers={name: described for name, described in SHAPES.items() if name.startswith("%")},
        instructions=instructions,
        outputs={"probability": v("%p"), "integer": v("%i"), "last": last, "ids": v("ids")},
    )


def eager(weights: Mapping[str, torch.Tensor], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The same with torch, allocating as it likes."""
    ids, rows, scale = (torch.from_numpy(inputs[name]) for name in GROUPS["inputs"])
    embedded = F.embedding(ids, weights["table"])
    hidden = F.linear(embedded + embedded * scale[:, None], weights["w"], weights["bias"])
    picked = torch.cat((hidden[:, OUT // 2 :], hidden[:, : OUT // 2]), dim=-1)[rows]
    results = {"probability": picked.softmax(-1), "integer": picked.int(), "last": hidden[-1], "ids": ids}
    return {name: result.numpy() for name, result in results.items()}


def step_of(tokens: int, rows: int, seed: int = 0) -> tuple[dict[str, int], dict[str, Array]]:
    """Sizes, and inputs drawn for them."""
    random = np.random.default_rng(seed)
    inputs = {
        "ids": random.integers(0, VOCAB, tokens),
        "rows": random.integers(0, tokens, rows),
        "scale": random.standard_normal(tokens, np.float32),
    }
    return {"tokens": tokens, "rows": rows, "guided": 0, "segments": 1, "active": 0}, inputs


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights of the hand-written program."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: 3 * torch.randn([d.constant for d in SHAPES[name].shape], generator=generator)
        for name in GROUPS["weights"]
    }


@pytest.fixture
def executor(weights: dict[str, torch.Tensor]) -> Executor:
    """The hand-written program, planned, over an arena of its own."""
    return executor_of(planned(hand_written()), weights)


def check(executor: Executor, weights: Mapping[str, torch.Tensor], tokens: int, rows: int, seed: int = 0) -> None:
    """One step equals eager mode: values within float32 rounding, shapes and dtypes exactly."""
    sizes, inputs = step_of(tokens, rows, seed)
    found, expected = executor.run(sizes, inputs), eager(weights, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 1), (5, 3), (4, 5), (9, 1), (9, 5)])
def test_a_step_of_any_size_equals_eager(
    executor: Executor, weights: dict[str, torch.Tensor], tokens: int, rows: int
) -> None:
    check(executor, weights, tokens, rows)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32)), min_size=2, max_size=6))
def test_steps_leave_nothing_behind(steps: list[tuple[int, int, int]]) -> None:
    """Buffers share bytes, and steps of other sizes and inputs, or noise, were there before; outputs are right."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: torch.randn([d.constant for d in SHAPES[name].shape], generator=generator) for name in GROUPS["weights"]
    }
    executor = executor_of(planned(hand_written()), weights)
    for tokens, rows, seed in steps:
        check(executor, weights, tokens, rows, seed)
        executor.memory.arena.bytes.fill_(255)
        check(executor, weights, tokens, rows, seed + 1)


def test_the_arena_is_smaller_than_its_buffers_together(executor: Executor) -> None:
    """So the tests above run with buffers in each other's bytes."""
    program = executor.program
    assert executor.memory.arena.bytes.numel() == program.arena_bytes
    assert program.arena_bytes is not None
    assert program.arena_bytes < sum(b.size_bytes(MAXIMA) for b in program.buffers.values()) / 1.5


def test_outputs_stay_where_they_are(executor: Executor) -> None:
    """Every step of one shape returns the same memory, inside the arena or the state, and no other is allocated."""
    sizes, inputs = step_of(7, 4)
    first = {name: address(output) for name, output in executor.run(sizes, inputs).items()}
    blocks = (executor.memory.arena.bytes, executor.memory.state.bytes)
    before = [(block.data_ptr(), block.numel()) for block in blocks]
    for seed in range(3):
        executor.run(*step_of(3, 2, seed))
        again = executor.run(*step_of(7, 4, seed))
        assert {name: address(output) for name, output in again.items()} == first
    assert [(block.data_ptr(), block.numel()) for block in blocks] == before
    ranges = [range(start, start + size) for start, size in before]
    assert all(any(place in bytes_ for bytes_ in ranges) for place in first.values())


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators bound so far; at most three bindings are kept."""
    bound: list[str] = []

    def counting(name: str) -> Operator:
        bound.append(name)
        return operator(name)

    monkeypatch.setattr(binding_module, "operator", counting)
    monkeypatch.setattr(executor_module, "MAX_BINDINGS", 3)
    return bound


def test_a_shape_is_bound_once(executor: Executor, bindings: list[str]) -> None:
    for seed in range(4):
        executor.run(*step_of(5, 2, seed))
    assert bindings == [instruction.op for instruction in executor.program.instructions]


def test_the_least_recently_used_binding_goes_first(executor: Executor, bindings: list[str]) -> None:
    """With three kept: 1 2 3, then 1 again, so 4 displaces 2; 1 is still bound and 2 is bound again."""

    def binds(tokens: int) -> bool:
        before = len(bindings)
        executor.run(*step_of(tokens, 1))
        return len(bindings) > before

    assert [binds(tokens) for tokens in (1, 2, 3, 1, 4, 1, 3, 2, 4)] == [
        True, True, True, False, True, False, False, True, True,
    ]  # fmt: skip
    assert len(executor._bindings) == 3


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("ids", lambda a: a.astype(np.int32), r"int32 \[5\]"),
        ("ids", lambda a: a.astype(np.float64), r"float64 \[5\]"),
        ("scale", lambda a: a.astype(np.float64), r"float64 \[5\]"),
        ("ids", lambda a: a.astype(">i8"), r">i8 \[5\]"),
        ("ids", lambda a: a[:4], r"int64 \[4\]"),
        ("ids", lambda a: a[:1], r"int64 \[1\]"),  # numpy would broadcast it
        ("ids", lambda a: a[0], r"int64 \[\]"),
        ("ids", lambda a: a[None], r"int64 \[1, 5\]"),
        ("rows", lambda a: np.concatenate((a, a)), r"int64 \[4\]"),
        ("rows", lambda a: None, "nothing"),
    ],
)
def test_an_input_of_another_dtype_or_shape_is_refused_by_name(
    executor: Executor,
    weights: dict[str, torch.Tensor],
    name: str,
    change: Callable[[Array], Array | None],
    found: str,
) -> None:
    """And the executor goes on working."""
    sizes, inputs = step_of(5, 2)
    expected = rf"{inputs[name].dtype} \[{inputs[name].size}\]"
    changed: dict[str, Any] = {**inputs, name: change(inputs[name])}
    with pytest.raises(ProgramError, match=f"^input '{name}': expected {expected}, found {found}$"):
        executor.run(sizes, changed)
    with pytest.raises(ProgramError, match=f"^input '{name}': "):
        executor.run(sizes, {key: value for key, value in inputs.items() if key != name})
    check(executor, weights, 5, 2)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_sizes_that_were_not_planned_for_are_refused(executor: Executor, symbol: str) -> None:
    """Larger ones would not fit into their bytes of the arena; only guided rows and active tokens may be none."""
    sizes, inputs = step_of(5, 2)
    least = 0 if symbol in ("guided", "active") else 1
    for wrong in (MAXIMA[symbol] + 1, least - 1):
        limits = f"expected {least} to {MAXIMA[symbol]} {symbol} a step, found {wrong}"
        with pytest.raises(ProgramError, match=f"^program 'dense': {limits}$"):
            executor.run({**sizes, symbol: wrong}, inputs)


def test_inputs_that_the_program_does_not_take_are_left_out(executor: Executor) -> None:
    sizes, inputs = step_of(5, 2)
    assert executor.run(sizes, {**inputs, "positions": np.arange(5)}).keys() == {
        "probability",
        "integer",
        "last",
        "ids",
    }


def test_an_unsound_plan_is_refused_before_anything_runs(weights: dict[str, torch.Tensor]) -> None:
    good = planned(hand_written())
    together = {name: replace(buffer, offset=0) for name, buffer in good.buffers.items()}
    with pytest.raises(
        ProgramError, match=r"instruction 1 \(copy\): '%e' at \[0, 216\) is overwritten by '%t' at \[0, 216\)"
    ):
        executor_of(replace(good, buffers=together), weights)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_result_larger_than_its_buffer_is_refused() -> None:
    """Torch would resize the output and write on, into its neighbours' bytes."""
    ids, small = tensor(TOKENS, dtype="int64"), tensor(2, dtype="int64")
    too_small = Program(
        name="dense",
        maxima=MAXIMA,
        inputs={"ids": ids},
        weights={},
        buffers={"%a": small},
        instructions=(Instruction("aten.add.Tensor", (whole("ids", ids), 1), (whole("%a", small),)),),
        outputs={"a": whole("%a", small)},
    )
    executor = executor_of(planned(too_small), {})
    sizes, inputs = step_of(5, 1)
    for _ in range(2):
        with pytest.raises(ProgramError, match=r"0 \(aten\.add\.Tensor\): '%a' has shape \[2\], its result \[5\]$"):
            executor.run(sizes, inputs)


def test_weights_of_other_programs_are_not_mistaken_for_inputs(weights: dict[str, torch.Tensor]) -> None:
    """An artifact's weights are those of all its programs; only the names that this one declares are weights here."""
    executor = executor_of(planned(hand_written()), {**weights, "scale": torch.full((9,), 7.0), "%e": torch.zeros(1)})
    check(executor, weights, 5, 2)


def in_chunks(chunk: int) -> Program:
    """Rows of `x` squared in a chunk, `w` taken of them; then each row more by how many were before its iteration."""
    x, y, c = tensor(TOKENS, WIDTH), tensor(TOKENS, OUT), tensor(CHUNK, WIDTH)
    rows, squares, made = rows_of("x", x, TOKENS), whole("%c", c), rows_of("%y", y, TOKENS)
    body = (
        Instruction("aten.square.default", (rows,), (squares,)),
        Instruction("aten.linear.default", (squares, whole("w", SHAPES["w"]), None), (made,)),
        Instruction("aten.add.Scalar", (made, START), (made,)),
    )
    program = Program(
        "chunks",
        {**MAXIMA, "chunk": chunk},
        {"x": x},
        {"w": SHAPES["w"]},
        {"%y": y, "%c": c},
        (ForRows(TOKENS, body),),
        {"y": whole("%y", y)},
    )
    return planned(program)


@pytest.mark.parametrize("chunk", [1, 3, 5, 9, 20])
def test_a_loop_computes_every_row_once(chunk: int) -> None:
    """In chunks that fill the step, leave a short one, or are longer than it; again after steps of other sizes."""
    generator = np.random.default_rng(0)
    w = torch.from_numpy(generator.normal(size=(OUT, WIDTH)).astype(np.float32))
    executor = executor_of(in_chunks(chunk), {"w": w})
    for tokens in (9, 1, 4, 5, 9, 3):
        x = generator.normal(size=(tokens, WIDTH)).astype(np.float32)
        found = executor.run({**MAXIMA, "tokens": tokens}, {"x": x})["y"]
        expected = (x.astype(np.float64) ** 2) @ w.double().numpy().T + (np.arange(tokens) // chunk * chunk)[:, None]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_result_of_another_shape_in_a_loop_is_refused() -> None:
    """Torch resizes what it is given, or cannot, and the rows would be elsewhere: the error names the call."""
    program = in_chunks(4)
    (loop,) = program.instructions
    assert isinstance(loop, ForRows)
    wider = replace(loop.body[0], inputs=(whole("w", SHAPES["w"]),))
    bad = replace(program, instructions=(replace(loop, body=(wider, *loop.body[1:])),))
    executor = executor_of(bad, {"w": torch.ones(OUT, WIDTH)})
    with pytest.raises(ProgramError, match=r"instruction 0 \(aten.square.default\): .*(result \[8, 6\]|resize)"):
        executor.run({**MAXIMA, "tokens": 5}, {"x": np.ones((5, WIDTH), np.float32)})
