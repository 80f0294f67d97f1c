"""Half-split rotary embeddings become one operator each, with the gather of positions inside."""

import math
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import SymInt, fx

from dllmc.ir.step_graph import StepGraph
from dllmc.ops import rope  # noqa: F401  (registers the operator)
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.pattern import Call, Found, OneOf, Rule, Var, apply, is_float, is_number

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseRope(Pass):
    """The rotation of the two halves of each head against each other becomes `dllmc::rope`.

    Case 1: x * cos + cat(-x2, x1) * sin, the halves by slices, chunk, split, or view and unbind.
    Case 2: cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin), with tables of half the width.
    Case 3: where cos and sin are rows of tables gathered by position, the operator gathers them itself.
    Conversions may stand at x and at the end. x is [1, heads, tokens, head_dim] or [1, tokens, heads, head_dim].
    Refused: tables that differ between heads, a result of another dtype than x.
    """

    name = "fuse-rope"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        return apply(step, (Rope(),))


_WIDE = OneOf(Call(aten.to.dtype, Var("x"), Var("wide", is_float)), Var("x"))
_COS, _SIN = Var("cos"), Var("sin")
_LAST = Var("axis", is_number)
_MIDDLE = Var("middle", is_number)


def _half(index: int) -> OneOf:
    """The first or the second half of x; that it is one is for the rule to check."""
    chunks = Call(aten.chunk.default, _WIDE, 2, _LAST)
    parts = Call(aten.split.Tensor, _WIDE, _MIDDLE, _LAST)
    pairs = Call(
        aten.unbind.int, Call((aten.view.default, aten.reshape.default), _WIDE, Var("pairs", _is_shape)), _LAST
    )
    bounds = (0, _MIDDLE) if index == 0 else (_MIDDLE, Var("end", is_number))
    return OneOf(
        Call(aten.slice.Tensor, _WIDE, _LAST, *bounds),
        *(Call(getitem, results, index) for results in (chunks, parts, pairs)),
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 2 and value[-2] == 2


def _times(a: Any, b: Any) -> Call:
    return Call(aten.mul.Tensor, a, b, commutes=True)


_FIRST, _SECOND = _half(0), _half(1)
_TURNED = Call(aten.cat.default, [Call(aten.neg.default, _SECOND), _FIRST], -1)
_WHOLE = Call(aten.add.Tensor, _times(_WIDE, _COS), _times(_TURNED, _SIN), commutes=True)
_HALVES = Call(
    aten.cat.default,
    [
        Call(aten.sub.Tensor, _times(_FIRST, _COS), _times(_SECOND, _SIN)),
        Call(aten.add.Tensor, _times(_SECOND, _COS), _times(_FIRST, _SIN), commutes=True),
    ],
    -1,
)
_ROTATED = OneOf(_WHOLE, _HALVES)


class Rope(Rule):
    """Cases 1 to 3."""

    name = "ropes"
    pattern = OneOf(Call(aten.to.dtype, _ROTATED, Var("narrow", is_float)), _ROTATED)

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        x, result = found["x"].meta["val"], root.meta["val"]
        if x.dtype != result.dtype:
            return f"it makes {result.dtype} of {x.dtype}"
        if x.dim() != 4 or x.shape[0] != 1:
            return f"expected x of one sequence in four dimensions, found {list(map(str, x.shape))}"
        if not _is_in_half(found, x):
            return "x is not cut into two halves along its last axis"
        tokens = _token_axis(x)
        for name in ("cos", "sin"):
            table = found[name].meta["val"]
            axes = {axis: size for axis, size in enumerate(table.shape, start=x.dim() - table.dim()) if size != 1}
            if tokens is None or set(axes) != {tokens, 3} or axes[3] not in (x.shape[3], x.shape[3] // 2):
                return f"{name} {list(map(str, table.shape))} is not one row a token of {list(map(str, x.shape))}"
        return None

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        x = found["x"]
        by_token = _token_axis(x.meta["val"]) == 1
        flat = step.call(aten.select.int, x, 0, 0, origin=root)
        flat = flat if by_token else step.call(aten.transpose.int, flat, 0, 1, origin=root)
        tables, index = _gathered(_peeled(found["cos"]), _peeled(found["sin"]))
        rows = [_as_rows(step, table, root) for table in tables]
        rotated = step.call(torch.ops.dllmc.rope.default, flat, *rows, index, origin=root)
        back = rotated if by_token else step.call(aten.transpose.int, rotated, 0, 1, origin=root)
        step.replace(root, step.call(aten.unsqueeze.default, back, 0, origin=root))


def _token_axis(x: torch.Tensor) -> int | None:
    symbolic = [axis for axis, size in enumerate(x.shape) if isinstance(size, SymInt)]
    return symbolic[0] if len(symbolic) == 1 and symbolic[0] in (1, 2) else None


def _is_in_half(found: Found, x: torch.Tensor) -> bool:
    width = x.shape[-1]
    if "pairs" in found:
        return bool(found["pairs"][-1] * 2 == width) and found["axis"] in (-2, len(found["pairs"]) - 2)
    ends = found.get("middle", width // 2) == width // 2 and found.get("end", width) >= width
    return bool(ends) and width % 2 == 0 and found["axis"] % x.dim() == x.dim() - 1


def _peeled(table: fx.Node) -> fx.Node:
    """A table without the axes of size 1 that were put on it to broadcast."""
    while table.target is aten.unsqueeze.default:
        table = table.args[0]  # type: ignore[assignment]
    return table


def _gathered(cos: fx.Node, sin: fx.Node) -> tuple[list[Any], Any]:
    """The tables, and the positions that the rows of both are gathered by; no positions where they are not."""
    if cos.target is sin.target is aten.index_select.default and cos.args[2] is sin.args[2]:
        sources = [cos.args[0], sin.args[0]]
        shapes = [source.meta["val"].shape for source in sources]  # type: ignore[union-attr]
        axes = [argument(table, 1) % len(shape) for table, shape in zip((cos, sin), shapes, strict=True)]
        fixed = all(isinstance(size, int) for shape in shapes for size in shape)  # not values of this step's tokens
        if fixed and all(math.prod(s) == s[axis] * s[-1] for s, axis in zip(shapes, axes, strict=True)):
            return sources, cos.args[2]
    return [cos, sin], None


def _as_rows(step: StepGraph, table: fx.Node, origin: fx.Node) -> fx.Node:
    """The two axes of a table that are not 1, [rows, width], by views."""
    shape = list(table.meta["val"].shape)
    for axis in reversed(range(len(shape) - 1)):
        if len(shape) > 2 and shape[axis] == 1:
            table = step.call(aten.select.int, table, axis, 0, origin=origin)
            del shape[axis]
    return table
