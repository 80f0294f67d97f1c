"""Row-wise facts against what operators do: a row of the input is changed, and the output is looked at.

Tensors have one axis of TOKENS, a prime that no other axis or product of axes equals; every other axis is small.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from dllmc.ops import facts
from dllmc.ops.facts import is_row_wise

aten = torch.ops.aten
dllmc = torch.ops.dllmc
TOKENS = 11

Draw = st.DrawFn


def axis_of(node: fx.Node) -> int | None:
    return token_axis(node.meta["val"])


def token_axis(value: object) -> int | None:
    return list(value.shape).index(TOKENS) if isinstance(value, Tensor) and TOKENS in value.shape else None


def claimed(target: Any, args: Sequence[Any]) -> bool:
    """What the facts say of a call on these tensors."""
    graph = fx.Graph()

    def lift(value: Any) -> Any:
        if isinstance(value, Tensor):
            node = graph.placeholder("x")
            node.meta["val"] = value
            return node
        return [lift(item) for item in value] if isinstance(value, list) else value

    node = graph.call_function(target, tuple(lift(arg) for arg in args))
    node.meta["val"] = target(*args)
    return is_row_wise(node, axis_of)


def observed(target: Any, args: Sequence[Any]) -> bool:
    """Whether a change of one row of every input that has rows leaves all other rows of every output as they were."""
    before = results(target(*args))
    if any(token_axis(value) is None for value in before):
        return False
    for row in (0, 4, TOKENS - 1):
        after = results(target(*(changed(arg, row) for arg in args)))
        for old, new in zip(before, after, strict=True):
            others = [i for i in range(TOKENS) if i != row]
            axis = token_axis(old)
            assert axis is not None
            index = torch.tensor(others)
            kept, now = (value.index_select(axis, index).double() for value in (old, new))
            if not torch.allclose(kept, now, rtol=0, atol=1e-9):
                return False
    return True


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def changed(value: Any, row: int) -> Any:
    """The same with other values in one row; what has no rows, unchanged."""
    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
        return [changed(item, row) for item in value]
    if (axis := token_axis(value)) is None:
        return value
    value = value.clone()
    part = value.select(axis, row)
    part.copy_((part + 1) % (int(value.max()) + 1) if value.dtype == torch.int64 else part * 1.5 + 0.25)
    return value


@st.composite
def tensors(draw: Draw, rank: int | None = None) -> Tensor:
    """Positive values with TOKENS along one axis."""
    rank = rank or draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    shape[draw(st.integers(0, rank - 1))] = TOKENS
    return filled(shape, draw(st.integers(0, 99)))


def filled(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.rand(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


def dims_of(x: Tensor) -> st.SearchStrategy[int]:
    return st.integers(-x.dim(), x.dim() - 1)


@st.composite
def unary(draw: Draw) -> list[Any]:
    return [draw(tensors())]


@st.composite
def with_number(draw: Draw) -> list[Any]:
    return [draw(tensors()), 0.75]


@st.composite
def number_first(draw: Draw) -> list[Any]:
    return [0.75, draw(tensors())]


@st.composite
def binary(draw: Draw) -> list[Any]:
    """Broadcast against the same shape, a part of it, or one without rows."""
    x = draw(tensors())
    keep = draw(st.lists(st.booleans(), min_size=x.dim(), max_size=x.dim()))
    shape = [size if kept else 1 for size, kept in zip(x.shape, keep, strict=True)]
    y = filled(shape[draw(st.integers(0, x.dim() - 1)) :], seed=100)
    return [x, y] if draw(st.booleans()) else [y, x]


@st.composite
def chosen(draw: Draw, numbers: int) -> list[Any]:
    """A condition, and values of which it chooses."""
    x, y = draw(binary())
    return [x > 1, x, y] if numbers == 0 else [x, y > 1, 0.75]


@st.composite
def of_integers(draw: Draw, arguments: st.SearchStrategy[list[Any]]) -> list[Any]:
    return [(x * 3).long() for x in draw(arguments)]


@st.composite
def along_a_dim(draw: Draw, *rest: Any) -> list[Any]:
    x = draw(tensors())
    return [x, draw(dims_of(x)), *rest]


@st.composite
def along_dims(draw: Draw, *rest: Any) -> list[Any]:
    x = draw(tensors())
    dims = draw(st.lists(st.integers(0, x.dim() - 1), max_size=x.dim(), unique=True))
    return [x, [d - x.dim() if draw(st.booleans()) else d for d in dims], *rest]


@st.composite
def reduced(draw: Draw) -> list[Any]:
    return [*draw(along_dims()), draw(st.booleans())]


@st.composite
def squeezed(draw: Draw, several: bool) -> list[Any]:
    """Axes of size 1 only: squeezing the tokens would depend on their number."""
    x = draw(tensors())
    ones = [d for d, size in enumerate(x.shape) if size == 1]
    assume(ones)
    return [x, ones] if several else [x, ones[0] - x.dim()]


@st.composite
def split(draw: Draw, how: str) -> list[Any]:
    x = draw(tensors())
    dim = draw(dims_of(x))
    size = x.shape[dim]
    sizes = {"chunk": 2, "split": max(1, size // 2), "sizes": [1, size - 1]}
    assume(how != "sizes" or size > 1)
    return [x, sizes[how], dim]


@st.composite
def picked(draw: Draw) -> list[Any]:
    x, dim = draw(along_a_dim())
    return [x, dim, draw(st.integers(0, x.shape[dim] - 1))]


@st.composite
def sliced(draw: Draw) -> list[Any]:
    x, dim = draw(along_a_dim())
    return [x, dim, 0, x.shape[dim] - 1 if x.shape[dim] > 1 else 1]


@st.composite
def concatenated(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [[x, x * 2], draw(dims_of(x))]


@st.composite
def stacked(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [[x, x * 2], draw(st.integers(-x.dim() - 1, x.dim()))]


@st.composite
def linear(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, filled((5, x.shape[-1])), filled((5,)) if draw(st.booleans()) else None]


@st.composite
def matmul(draw: Draw) -> list[Any]:
    """Matrices, vectors, and stacks of them, rows in one factor."""
    x = draw(tensors())
    if draw(st.booleans()):
        return [x, filled((x.shape[-1], 3) if draw(st.booleans()) else (x.shape[-1],))]
    summed = x.shape[-2] if x.dim() > 1 else x.shape[-1]
    return [filled((3, summed) if draw(st.booleans()) else (summed,)), x]


@st.composite
def normalised(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, list(x.shape[draw(st.integers(0, x.dim() - 1)) :])]


@st.composite
def normed(draw: Draw, addends: int) -> list[Any]:
    """The addends of what is normed; weight and bias, given or not."""
    x = draw(tensors())
    affine = [filled(x.shape[-1:], seed) if draw(st.booleans()) else None for seed in (1, 2)]
    return [x, *(filled(x.shape, seed) for seed in range(100, 99 + addends)), *affine, 1e-5]


@st.composite
def rotated(draw: Draw) -> list[Any]:
    """Rows among the tokens, the heads, or the positions of a table."""
    rows = draw(st.sampled_from([("tokens",), ("heads",), ("table",), ("tokens", "table")]))
    tokens, heads, most = (
        TOKENS if name in rows else size for name, size in (("tokens", 3), ("heads", 2), ("table", 5))
    )
    positions = torch.arange(tokens) % 5 if "table" in rows or draw(st.booleans()) else None
    shape = (tokens if positions is None else most, draw(st.sampled_from((2, 4))))
    return [filled((tokens, heads, 4)), filled(shape, 1), filled(shape, 2), positions]


@st.composite
def gated(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, filled(x.shape, 100), "silu"]


@st.composite
def transposed(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, draw(dims_of(x)), draw(dims_of(x))]


@st.composite
def permuted(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, draw(st.permutations(range(x.dim())))]


@st.composite
def unsqueezed(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, draw(st.integers(-x.dim() - 1, x.dim()))]


@st.composite
def expanded(draw: Draw) -> list[Any]:
    x = draw(tensors())
    return [x, [3, *(2 if size == 1 else size for size in x.shape)]]


@st.composite
def reshaped(draw: Draw) -> list[Any]:
    """Any order of the axes, some of them merged: the elements stay in row-major order, so rows may come apart."""
    x = draw(tensors())
    sizes = list(draw(st.permutations(list(x.shape))) if draw(st.booleans()) else x.shape)
    at = sizes.index(TOKENS)
    before, after = sizes[:at], sizes[at + 1 :]
    if draw(st.booleans()):
        before = [math.prod(before)]
    if draw(st.booleans()):
        after = [math.prod(after)]
    assume(TOKENS not in before + after)
    return [x, [*before, TOKENS, *after]]


@st.composite
def flattened(draw: Draw) -> list[Any]:
    x = draw(tensors())
    first, last = sorted(draw(st.tuples(*[st.integers(0, x.dim() - 1)] * 2)))
    return [x, first, last - x.dim()]


@st.composite
def unflattened(draw: Draw) -> list[Any]:
    x, dim = draw(along_a_dim())
    size = x.shape[dim]
    return [x, dim, draw(st.sampled_from(([size, 1], [1, size], [2, size // 2] if size % 2 == 0 else [-1, size])))]


@st.composite
def embedded(draw: Draw) -> list[Any]:
    """Rows among the ids, or among the vocabulary of the table."""
    if draw(st.booleans()):
        return [filled((6, 3)), (draw(tensors()) * 3).long()]
    return [filled((TOKENS, 3)), torch.tensor([[1, 2], [3, 4]])]


@st.composite
def gathered(draw: Draw) -> list[Any]:
    """Rows of a table at positions; other axes of what has rows; rows of rows."""
    x = filled((3, 5, 4)) if draw(st.booleans()) else draw(tensors())
    dim = draw(dims_of(x))
    length = draw(st.sampled_from((2, TOKENS)))
    assume(length != TOKENS or token_axis(x) in (None, dim % x.dim()))  # else two axes of rows come out
    return [x, dim, torch.arange(length) % min(x.shape[dim], 5)]


@st.composite
def attended(draw: Draw) -> list[Any]:
    """Rows among the queries alone, among the tokens alone or too, or within a head."""
    rows = draw(st.sampled_from(("queries", "tokens", "both", "within")))
    queries, tokens = (TOKENS if rows in (of, "both") else 3 for of in ("queries", "tokens"))
    width = TOKENS if rows == "within" else 4
    q, k, v = (filled((n, heads, width), seed) for n, heads, seed in ((queries, 2, 0), (tokens, 1, 1), (tokens, 1, 2)))
    spans, segments = torch.tensor([[0, queries - 1]]), torch.tensor([[0, tokens]])
    return [q, k, v, spans, segments, 0.7, *draw(st.sampled_from(((), (None,), (None, 0))))]


@st.composite
def decoded(draw: Draw) -> list[Any]:
    """Rows that are decoded; or a vocabulary as large, or a hidden state as wide."""
    rows, vocab, width = draw(st.permutations((TOKENS, 3, 5)))
    none = torch.zeros(1, dtype=torch.int64)
    of_rows = [torch.zeros(rows, dtype=torch.int64), torch.arange(rows), torch.zeros(rows, dtype=torch.int64)]
    sampling = [none.float(), none, none.float() + 1, none, none, none, none[None] - 1]
    return [filled((rows, width)).float(), filled((vocab, width), 1).float() - 1, None, 1.5, *of_rows, *sampling]


POINTWISE: dict[str, Callable[[], st.SearchStrategy[list[Any]]]] = {
    **dict.fromkeys(("add.Scalar", "div.Scalar", "mul.Scalar", "sub.Scalar", "rsub.Scalar"), with_number),
    **dict.fromkeys(("clamp.default", "clamp_max.default", "clamp_min.default", "pow.Tensor_Scalar"), with_number),
    **dict.fromkeys(("add.Tensor", "div.Tensor", "mul.Tensor", "sub.Tensor", "pow.Tensor_Tensor"), binary),
    **dict.fromkeys(("maximum.default", "minimum.default"), binary),
    **dict.fromkeys(("eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar"), with_number),
    **dict.fromkeys(("eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor"), binary),
    **dict.fromkeys(("__and__.Tensor", "bitwise_and.Tensor"), lambda: of_integers(binary())),
    "bitwise_not.default": lambda: of_integers(unary()),
    "masked_fill.Scalar": lambda: chosen(numbers=1),
    "where.self": lambda: chosen(numbers=0),
    "pow.Scalar": number_first,
    "dllmc.glu.default": gated,
    "to.dtype": lambda: tensors().map(lambda x: [x, torch.float32]),
}
CALLS: dict[Any, st.SearchStrategy[list[Any]]] = {
    **{target: POINTWISE.get(str(target).removeprefix("aten."), unary)() for target in facts.POINTWISE},
    aten.amax.default: reduced(),
    aten.cat.default: concatenated(),
    aten.chunk.default: split("chunk"),
    aten.log_softmax.int: along_a_dim(),
    aten.mean.dim: reduced(),
    aten.select.int: picked(),
    aten.slice.Tensor: sliced(),
    aten.softmax.int: along_a_dim(),
    aten.stack.default: stacked(),
    aten.split.Tensor: split("split"),
    aten.split_with_sizes.default: split("sizes"),
    aten.squeeze.dim: squeezed(several=False),
    aten.squeeze.dims: squeezed(several=True),
    aten.sum.dim_IntList: reduced(),
    aten.unbind.int: along_a_dim(),
    aten.var.correction: along_dims(),
    aten.var.dim: along_dims(False),
    aten.linear.default: linear(),
    aten.matmul.default: matmul(),
    aten.layer_norm.default: normalised(),
    aten.rms_norm.default: normalised(),
    aten.transpose.int: transposed(),
    aten.permute.default: permuted(),
    aten.unsqueeze.default: unsqueezed(),
    aten.t.default: st.one_of(tensors(1), tensors(2)).map(lambda x: [x]),
    aten.expand.default: expanded(),
    aten.view.default: reshaped(),
    aten.reshape.default: reshaped(),
    aten._unsafe_view.default: reshaped(),
    aten.flatten.using_ints: flattened(),
    aten.unflatten.int: unflattened(),
    aten.embedding.default: embedded(),
    aten.index_select.default: gathered(),
    dllmc.add_layer_norm.default: normed(2),
    dllmc.add_rms_norm.default: normed(2),
    dllmc.rms_norm.default: normed(1),
    dllmc.attention.default: attended(),
    dllmc.decode_head.default: decoded(),
    dllmc.rope.default: rotated(),
}


def test_every_operator_of_the_tables_is_tried() -> None:
    """An operator that is added to the facts must be added here."""
    tables = (
        facts.POINTWISE,
        facts._ALONG_DIMS,
        facts._ALONG_LAST,
        facts._ALONG_TRAILING,
        set(facts._ALONG_AXES),
        facts.MOVES,
        facts.RESHAPES,
    )
    alone = {aten.embedding.default, aten.index_select.default, aten.matmul.default}
    assert set().union(*tables) | alone == set(CALLS)


@pytest.mark.parametrize("target", sorted(CALLS, key=str), ids=str)
def test_row_wise_is_what_keeps_rows_apart(target: Any) -> None:
    """A call is row-wise exactly if a change of one row changes no other row of its results."""
    seen = set()

    @settings(deadline=None, derandomize=True, max_examples=25)
    @given(CALLS[target])
    def compare(args: list[Any]) -> None:
        assume(any(token_axis(a) is not None for arg in args for a in (arg if isinstance(arg, list) else [arg])))
        expected = observed(target, args)
        seen.add(expected)
        assert claimed(target, args) == expected

    compare()
    never_mixes = facts.POINTWISE | facts.MOVES | {aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int}
    assert seen == ({True} if target in never_mixes else {True, False})


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.cumsum.default, [filled((3, TOKENS)), 1]),
        (aten.flip.default, [filled((3, TOKENS)), [1]]),
        (aten.roll.default, [filled((3, TOKENS)), [1], [1]]),
        (aten.sort.default, [filled((3, TOKENS))]),
        (aten.mean.default, [filled((3, TOKENS))]),
        (aten.matmul.default, [filled((3, TOKENS)), filled((TOKENS, 3))]),
        (aten.matmul.default, [filled((TOKENS, 2, 3)), filled((TOKENS, 3, 2))]),
        (aten.embedding.default, [filled((TOKENS, 3)), torch.arange(TOKENS)]),
        (aten.amax.default, [filled((3, TOKENS))]),
        (aten.cumsum.default, [filled((TOKENS, 3)), 1]),
    ],
)
def test_what_the_tables_do_not_know_is_not_row_wise(target: Any, args: list[Any]) -> None:
    """Without a fact nothing is assumed, even of an operator that would keep these rows apart."""
    assert not claimed(target, args)
