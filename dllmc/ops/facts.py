"""What is true of each graph operator: whether it keeps the rows of an axis apart.

An operator is *row-wise* along an axis when every row of its output is a function of the same row of its inputs
alone: then requests may be packed along the axis, and a gather of rows may move above it.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dllmc.ops import attention, decode_head, glu, keep, norms, rope  # noqa: F401  (they register what is named here)

aten = torch.ops.aten
dllmc = torch.ops.dllmc

POINTWISE = frozenset(
    (
        aten.__and__.Tensor,
        aten.abs.default,
        aten.add.Scalar,
        aten.add.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_not.default,
        aten.clamp.default,
        aten.clamp_max.default,
        aten.clamp_min.default,
        aten.clone.default,
        aten.cos.default,
        aten.div.Scalar,
        aten.div.Tensor,
        aten.eq.Scalar,
        aten.eq.Tensor,
        aten.erf.default,
        aten.exp.default,
        aten.ge.Scalar,
        aten.ge.Tensor,
        aten.gelu.default,
        aten.gt.Scalar,
        aten.gt.Tensor,
        aten.le.Scalar,
        aten.le.Tensor,
        aten.log.default,
        aten.lt.Scalar,
        aten.lt.Tensor,
        aten.masked_fill.Scalar,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.ne.Scalar,
        aten.ne.Tensor,
        aten.neg.default,
        aten.pow.Scalar,
        aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor,
        aten.reciprocal.default,
        aten.relu.default,
        aten.rsqrt.default,
        aten.rsub.Scalar,
        aten.sigmoid.default,
        aten.silu.default,
        aten.sin.default,
        aten.sqrt.default,
        aten.square.default,
        aten.sub.Scalar,
        aten.sub.Tensor,
        aten.tanh.default,
        aten.to.dtype,
        aten.where.self,
        dllmc.glu.default,
    )
)

# Operators that work along dimensions given by an argument (its position), and keep all others apart.
_ALONG_DIMS: Mapping[object, int] = {
    aten.amax.default: 1,
    aten.cat.default: 1,
    aten.chunk.default: 2,
    aten.log_softmax.int: 1,
    aten.mean.dim: 1,
    aten.select.int: 1,
    aten.slice.Tensor: 1,
    aten.softmax.int: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.squeeze.dim: 1,
    aten.squeeze.dims: 1,
    aten.sum.dim_IntList: 1,
    aten.unbind.int: 1,
    aten.var.correction: 1,
    aten.var.dim: 1,
}
# Operators on the last dimension, or on the trailing shape that argument 1 gives.
_ALONG_LAST = frozenset(
    (
        aten.linear.default,
        dllmc.add_layer_norm.default,
        dllmc.add_rms_norm.default,
        dllmc.rms_norm.default,
    )
)
_ALONG_TRAILING = frozenset((aten.layer_norm.default, aten.rms_norm.default))
# Operators that keep rows apart along these axes of their operands, taken together (None: the operand has no rows).
_ALONG_AXES: Mapping[object, Sequence[tuple[int | None, ...]]] = {
    dllmc.attention.default: tuple((0, *[None] * others) for others in (5, 6, 7, 10)),
    dllmc.decode_head.default: ((0, None, None, None, 0, 0, 0, *[None] * 7),),
    dllmc.rope.default: ((0, 0, 0, None), (0, None, None, 0), (1, None, None, None)),
}
WHOLE_OPERANDS: Mapping[object, Sequence[int]] = {dllmc.attention.default: (1, 2)}
"""Operands that an operator on rows reads whole even though they may have as many rows: keys and values."""

MOVES = frozenset(
    (
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.t.default,
        aten.expand.default,
        aten.stack.default,
    )
)
RESHAPES = frozenset(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    )
)

AxisOf = Callable[[fx.Node], int | None]


def is_row_wise(node: fx.Node, axis_of: AxisOf) -> bool:
    """Whether a call keeps the rows of an axis apart; `axis_of` gives that axis of a value (None: it has none)."""
    target = node.target
    inputs = [(n, axis) for n in node.all_input_nodes if (axis := axis_of(n)) is not None]
    if target is operator.getitem:
        return True  # an output of its producer, which is judged itself
    if target in POINTWISE:
        out = axis_of(node)
        return out is not None and all(_from_right(n, axis) == _from_right(node, out) for n, axis in inputs)
    if target is aten.embedding.default:
        return axis_of(node.args[0]) is None  # type: ignore[arg-type]
    if target is aten.index_select.default:
        source, index = axis_of(node.args[0]), axis_of(node.args[2])  # type: ignore[arg-type]
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return source is None or (index is None and source != argument(node, 1) % rank)
    if target is aten.matmul.default:
        factors = [axis_of(factor) for factor in node.args]  # type: ignore[arg-type]
        return None in factors  # what is summed over, or multiplied row by row, both factors have
    if target in _ALONG_AXES:
        return tuple(axis_of(n) if isinstance(n, fx.Node) else None for n in node.args) in _ALONG_AXES[target]
    if target in MOVES:
        return True
    if target in RESHAPES:
        return _keeps_prefix(node, axis_of)
    dims = _dims_worked_along(node)
    return dims is not None and all(axis not in dims for _, axis in inputs)


def _dims_worked_along(node: fx.Node) -> set[int] | None:
    source = node.args[0]
    first = source[0] if isinstance(source, list | tuple) else source
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), torch.Tensor):
        return None
    rank = first.meta["val"].dim()
    if node.target in _ALONG_LAST:
        return {rank - 1}
    if node.target in _ALONG_TRAILING:
        normalised: Any = node.args[1]
        return set(range(rank - len(normalised), rank))
    if node.target not in _ALONG_DIMS:
        return None
    dims = argument(node, _ALONG_DIMS[node.target])
    if dims is None or dims == []:  # a reduction over everything
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, Sequence) else (dims,))}


def argument(node: fx.Node, position: int) -> Any:
    """A call's argument by its position in the operator's schema, given or default."""
    schema = node.target._schema.arguments[position]  # type: ignore[union-attr]
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(schema.name, schema.default_value if schema.has_default_value() else None)


def _from_right(node: fx.Node, axis: int) -> int:
    return axis - int(node.meta["val"].dim())


def _keeps_prefix(node: fx.Node, axis_of: AxisOf) -> bool:
    """A reshape keeps rows apart iff as many elements lie before the axis as did: row-major order then agrees."""
    source: Any = node.args[0]
    before, after = axis_of(source), axis_of(node)
    if before is None or after is None:
        return before is after
    shapes = source.meta["val"].shape, node.meta["val"].shape
    return bool(math.prod(shapes[0][:before]) == math.prod(shapes[1][:after]))
