"""What is said of operators' calls before they run, against what torch does when they run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllmc.errors import ProgramError
from dllmc.ir.program import Affine, Instruction, Operand, Program, Tensor, View
from dllmc.ops import elementwise, shapes, signatures
from dllmc.ops.registry import OPERATORS
from tests.programs import GUIDED, ROWS, TOKENS, planned, program, tensor, whole

ATEN = sorted(name for name in OPERATORS if name.startswith("aten."))


def function_of(name: str) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[Any]]:
    """An operator, and operands of the kinds of its schema, in shapes that may or may not fit."""
    name = draw(st.sampled_from(ATEN))
    dims = st.integers(1, 3)
    rank = draw(st.integers(1, 3))
    like = draw(st.lists(dims, min_size=rank, max_size=rank))
    near = st.one_of(st.just(like), st.just(like), st.just(like[-1:]), st.lists(dims, min_size=1, max_size=3))

    def drawn(kind: str, parameter: str) -> Any:
        if kind.startswith("Optional"):
            return drawn(kind[9:-1], parameter) if draw(st.booleans()) else None
        if kind == "Tensor":
            if parameter in ("index", "indices"):
                return torch.zeros(draw(st.lists(dims, min_size=1, max_size=2)), dtype=torch.int64)
            boolean = parameter in ("mask", "condition") or "bitwise" in name or "and" in name
            return torch.ones(draw(near), dtype=torch.bool if boolean else torch.float32)
        if kind == "List[Tensor]":
            return [torch.ones(draw(near)) for _ in range(draw(st.integers(1, 3)))]
        if kind == "List[int]":
            dims_given = st.lists(st.integers(-3, 2), max_size=2, unique=True)
            return like[-1:] if parameter == "normalized_shape" else draw(dims_given)
        if kind == "bool":
            return draw(st.booleans())
        if kind == "str":
            return draw(st.sampled_from(("none", "tanh")))
        if kind == "ScalarType":
            return torch.float32
        return draw(st.integers(-3, 2)) if kind == "int" else 1.5

    parameters = signatures._parameters(name)
    return name, [drawn(kind, parameter) for parameter, kind, _ in parameters]


@settings(deadline=None, derandomize=True, max_examples=1500)
@given(call=calls())
def test_shapes_are_those_that_torch_gives(call: tuple[str, list[Any]]) -> None:
    """Where torch computes a result, its shape is the predicted one; what torch refuses may be refused here too."""
    name, operands = call
    options = elementwise.OPTIONS.get(name, ())
    count = len(operands) - len(options)
    try:
        result = function_of(name)(*operands[:count], **dict(zip(options, operands[count:], strict=True)))
    except (RuntimeError, IndexError):
        assume(False)
    if name == "aten.linear.default":  # programs have none of a vector, or with a bias that is stretched
        assume(operands[1].dim() == 2 and (operands[2] is None or operands[2].shape == operands[1].shape[:1]))
    if name == "aten.matmul.default" and min(x.dim() for x in operands) > 2:
        assume(operands[0].shape[:-2] == operands[1].shape[:-2])
    given = signatures._given(name, [seen(operand) for operand in operands])
    shapes.check_operands(name, given)
    assert shapes.results(name, given) == [list(result.shape)]


def seen(operand: Any) -> Any:
    """An operand as rules see it."""
    if isinstance(operand, list):
        return [seen(item) for item in operand]
    return shapes.Operand(operand.dtype, tuple(operand.shape)) if isinstance(operand, torch.Tensor) else operand


def test_every_operator_is_known() -> None:
    """Rules name operators that there are; what has no rule is elementwise."""
    assert (shapes.OPERANDS.keys() | shapes.CONDITIONS.keys() | shapes._RESULTS.keys()) <= OPERATORS.keys()
    ruled = shapes._RESULTS.keys()
    assert {name for name in OPERATORS if name not in ruled} <= set(signatures.POINTWISE)
    assert {name for name in OPERATORS if name.startswith("dllmc.")} <= shapes.OPERANDS.keys()


AMPLE = Affine(1 << 16)


def attention(**changes: Tensor | None) -> Program:
    """A call of `dllmc::attention` with a cache; `changes` are other operands."""
    tensors = {
        "q": tensor(ROWS, 4, 8),
        "k": tensor(TOKENS, 2, 8),
        "v": tensor(TOKENS, 2, 8),
        "spans": tensor(2, 2, dtype="int64"),
        "segments": tensor(2, 2, dtype="int64"),
        "cache": tensor(2, 2, 3, 16, 8),
        "cached": tensor(2, dtype="int64"),
        "page_table": tensor(2, 5, dtype="int64"),
    } | changes
    views: dict[str, Operand] = {name: None if t is None else whole(name, t) for name, t in tensors.items()}
    operands = [views[name] for name in ("q", "k", "v", "spans", "segments")]
    operands += [1.0, None, 0, *(views[name] for name in ("cache", "cached", "page_table"))]
    return one_call("dllmc.attention.default", operands, tensor(ROWS, 4, 8), tensors)


def one_call(
    op: str,
    operands: Sequence[Operand],
    out: Tensor,
    tensors: Mapping[str, Tensor | None],
    workspace: Affine = AMPLE,
) -> Program:
    """A planned program of one call, whose operands are weights."""
    weights = {name: described for name, described in tensors.items() if described is not None}
    buffers = {"%out": out, "%workspace": tensor(workspace, dtype="uint8")}
    plain = program(buffers, [], weights=weights, returns=["%out"])
    call = Instruction(op, tuple(operands), (whole("%out", out),), workspace="%workspace")
    return planned(replace(plain, instructions=(call,)))


def test_a_right_call_is_let_through() -> None:
    signatures.check(attention())
    signatures.check(attention(cache=None, cached=None, page_table=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": tensor(TOKENS, 2, 4)}, r"expected k as x \[T, H, D\] where .*D = 8"),
        ({"v": tensor(ROWS, 2, 8)}, r"expected v as x \[T, H, D\]"),
        ({"k": tensor(TOKENS, 3, 8), "v": tensor(TOKENS, 3, 8), "cache": tensor(2, 3, 3, 16, 8)}, "heads and angles"),
        ({"v": tensor(TOKENS, 2, 8, dtype="float16")}, r"expected v as x .*, found torch.float16"),
        ({"spans": tensor(2, 2)}, r"expected spans as int64 \[S, 2\] .*, found torch.float32"),
        ({"segments": tensor(3, 2, dtype="int64")}, r"expected segments as int64 \[S, 2\] where .*S = 2"),
        ({"cache": tensor(2, 2, 3, 16, 4)}, r"expected cache as x \[2, H, P, N, D\]"),
        ({"cache": tensor(1, 2, 3, 16, 8)}, r"expected cache as x \[2, H, P, N, D\]"),
        ({"page_table": tensor(2, dtype="int64")}, r"expected page_table as int64 \[S, B\]"),
        ({"cached": None, "page_table": None}, "expected cache, cached, page_table, or none of them"),
        ({"q": None}, "operand 0, q: expected a Tensor, found None"),
    ],
)
def test_a_call_that_would_read_beyond_is_refused(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ProgramError, match=rf"^instruction 0 \(dllmc.attention.default\): .*{message}"):
        signatures.check(attention(**changes))


def product_of(rows: Affine, out: Affine) -> Program:
    """A call of `aten.linear`, its rows so many, and those of its result."""
    x, weight = tensor(rows, 8), tensor(4, 8)
    views = [whole("x", x), whole("weight", weight)]
    return one_call("aten.linear.default", views, tensor(out, 4), {"x": x, "weight": weight})


# Not as many as tokens: but for the largest step, which has 9 tokens and 5 rows; in none.
OTHERS = Affine(9), Affine(4) + ROWS, TOKENS + TOKENS


@pytest.mark.parametrize("out", OTHERS, ids=str)
def test_a_result_of_another_shape_is_refused(out: Affine) -> None:
    """In any step, however many others it is right in."""
    signatures.check(product_of(TOKENS, TOKENS))
    wrong = rf"its results have the shapes \[tokens, 4\], but it writes \[{re.escape(str(out))}, 4\]"
    with pytest.raises(ProgramError, match=wrong):
        signatures.check(product_of(TOKENS, out))


@pytest.mark.parametrize("other", [*OTHERS, ROWS], ids=str)
def test_operands_that_fit_in_some_steps_are_refused(other: Affine) -> None:
    """A dimension is stretched where it is 1 in every step, not where it can be 1."""
    a, b = tensor(TOKENS, 8), tensor(other, 8)
    made = one_call("aten.add.Tensor", [whole("a", a), whole("b", b)], a, {"a": a, "b": b})
    with pytest.raises(ProgramError, match=r"operands do not fit .*\[tokens, 8\] and .* do not broadcast"):
        signatures.check(made)


def test_twins_are_fewer_than_rows_in_every_step() -> None:
    """Where there may be more rows than twins, and fewer, what is left is refused."""
    tensors = {"x": tensor(ROWS, 8), "guided": tensor(GUIDED, dtype="int64"), "guidance": tensor(GUIDED)}
    views = [whole(name, each) for name, each in tensors.items()]
    fixed = {"x": tensor(5, 8), "guided": tensor(2, dtype="int64"), "guidance": tensor(2)}
    views_of_fixed = [whole(name, each) for name, each in fixed.items()]
    signatures.check(one_call("dllmc.guide_rows.default", views_of_fixed, tensor(3, 8), fixed))
    with pytest.raises(ProgramError, match="guided twins of rows rows"):
        signatures.check(one_call("dllmc.guide_rows.default", views, tensor(ROWS, 8), tensors))


def test_a_stride_beyond_64_bits_is_refused() -> None:
    """No element is that far, since there is one alone."""
    x = tensor(9)
    view = View("x", (Affine(1),), (Affine(1 << 62, (("tokens", 1 << 62),)),))
    with pytest.raises(
        ProgramError, match=r"^instruction 0 \(copy\): its operands do not fit the operator: .*Overflow.*$"
    ):
        signatures.check(one_call("copy", [view], tensor(1), {"x": x}))


def test_a_workspace_that_is_too_small_is_refused() -> None:
    """In any step: what suffices for the largest, and shrinks with smaller ones, does not."""
    hidden, weight = tensor(ROWS, 8, dtype="bfloat16"), tensor(4, 8, dtype="bfloat16")
    views = [whole("x", hidden), whole("weight", weight)]
    out, tensors = tensor(ROWS, 4, dtype="bfloat16"), {"x": hidden, "weight": weight}
    needed = OPERATORS["aten.linear.default"].workspace_bytes(
        [torch.empty(5, 8, dtype=torch.bfloat16), torch.empty(4, 8, dtype=torch.bfloat16)], "cpu"
    )
    signatures.check(one_call("aten.linear.default", views, out, tensors, Affine(needed)))
    a_row = needed // 5 + 1
    for short, least in ((Affine(needed - 1), needed - 1), (Affine(0, (("rows", a_row),)), a_row)):
        made = one_call("aten.linear.default", views, out, tensors, short)
        with pytest.raises(ProgramError, match=rf"expected a workspace of {needed} bytes \(uint8\) .* found {least}"):
            signatures.check(made)


def test_views_in_lists_are_checked() -> None:
    x = tensor(TOKENS, 8)
    views: tuple[View, ...] = (whole("x", x), whole("x", x))
    signatures.check(one_call("aten.cat.default", [views, 0], tensor(TOKENS + TOKENS, 8), {"x": x}))
    with pytest.raises(ProgramError, match="operand 0, tensors: expected a List"):
        signatures.check(one_call("aten.cat.default", [(views[0], 3), 0], tensor(TOKENS, 8), {"x": x}))


def test_batches_of_a_product_are_not_stretched() -> None:
    """Torch would copy both, far beyond the memory that a program declares."""
    a, b = tensor(6, 1, 1, 8), tensor(1, 6, 8, 1)
    made = one_call("aten.matmul.default", [whole("a", a), whole("b", b)], tensor(6, 6, 1, 1), {"a": a, "b": b})
    with pytest.raises(ProgramError, match=r"expected batches of one shape, found \[6, 1, 1, 8\] by \[1, 6, 8, 1\]"):
        signatures.check(made)
