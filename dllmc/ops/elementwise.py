"""Torch's own operators that a program may name: each writes into a given output, none allocates one.

On CUDA none of them waits for the GPU. A reduction of few rows and many columns may take some of torch's own memory
there, to add what several blocks found, and a number to the power of a tensor takes a number's.
Names are those of the functional overloads. A program's operand list is the overload's positional arguments, then
those of its keyword options that `OPTIONS` names.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

# Functional overload -> torch function that takes the same positional arguments and `out=`.
_WITH_OUT: Mapping[str, Callable[..., object]] = {
    "aten.__and__.Tensor": torch.bitwise_and,
    "aten.abs.default": torch.abs,
    "aten.add.Scalar": torch.add,
    "aten.add.Tensor": torch.add,
    "aten.amax.default": torch.amax,
    "aten.bitwise_and.Tensor": torch.bitwise_and,
    "aten.bitwise_not.default": torch.bitwise_not,
    "aten.cat.default": torch.cat,
    "aten.clamp.default": torch.clamp,
    "aten.clamp_max.default": torch.clamp_max,
    "aten.clamp_min.default": torch.clamp_min,
    "aten.cos.default": torch.cos,
    "aten.div.Scalar": torch.div,
    "aten.div.Tensor": torch.div,
    "aten.eq.Scalar": torch.eq,
    "aten.eq.Tensor": torch.eq,
    "aten.erf.default": torch.erf,
    "aten.exp.default": torch.exp,
    "aten.ge.Scalar": torch.ge,
    "aten.ge.Tensor": torch.ge,
    "aten.gelu.default": torch.ops.aten.gelu.out,
    "aten.gt.Scalar": torch.gt,
    "aten.gt.Tensor": torch.gt,
    "aten.index_select.default": torch.index_select,
    "aten.le.Scalar": torch.le,
    "aten.le.Tensor": torch.le,
    "aten.log.default": torch.log,
    "aten.log_softmax.int": torch.ops.aten.log_softmax.int_out,
    "aten.lt.Scalar": torch.lt,
    "aten.lt.Tensor": torch.lt,
    "aten.matmul.default": torch.matmul,
    "aten.maximum.default": torch.maximum,
    "aten.mean.dim": torch.mean,
    "aten.minimum.default": torch.minimum,
    "aten.mul.Scalar": torch.mul,
    "aten.mul.Tensor": torch.mul,
    "aten.ne.Scalar": torch.ne,
    "aten.ne.Tensor": torch.ne,
    "aten.neg.default": torch.neg,
    "aten.pow.Scalar": torch.pow,
    "aten.pow.Tensor_Tensor": torch.pow,
    "aten.reciprocal.default": torch.reciprocal,
    "aten.relu.default": partial(torch.clamp_min, min=0),  # `relu.out` copies from a transient
    "aten.rsqrt.default": torch.rsqrt,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.silu.default": torch.ops.aten.silu.out,
    "aten.sin.default": torch.sin,
    "aten.softmax.int": torch.softmax,
    "aten.sqrt.default": torch.sqrt,
    "aten.stack.default": torch.stack,
    "aten.sub.Scalar": torch.sub,
    "aten.sub.Tensor": torch.sub,
    "aten.sum.dim_IntList": torch.sum,
    "aten.tanh.default": torch.tanh,
    "aten.where.self": torch.where,
}


# Keyword options that an operator takes as trailing operands, in the order of its schema.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "aten.add.Tensor": ("alpha",),
    "aten.gelu.default": ("approximate",),
    "aten.mean.dim": ("dtype",),
    "aten.sub.Tensor": ("alpha",),
    "aten.sum.dim_IntList": ("dtype",),
}


def _bind_with_out(name: str) -> Callable[[Sequence[Any], Sequence[Tensor], Tensor | None], Call]:
    _, packet, overload = name.split(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
    positional = sum(not argument.kwarg_only for argument in schema.arguments)

    def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
        options = dict(zip(OPTIONS.get(name, ()), args[positional:], strict=False))
        return partial(_WITH_OUT[name], *args[:positional], out=outs[0], **options)

    return bind


def _bind_square(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """As a product, which is the same numbers: torch squares float16 element by element, ten times slower."""
    x = args[0]
    return partial(torch.mul, x, x, out=outs[0])


def _bind_power(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    x, exponent = args
    if exponent == 2 and x.is_floating_point():
        return _bind_square(args, outs, workspace)
    return partial(torch.pow, x, exponent, out=outs[0])


def _bind_reversed_subtraction(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`rsub(x, number, alpha)`: number - alpha * x; `rsub.out` copies from a transient.

    The number stays on the CPU, whence torch passes it to a GPU's kernel by value.
    """
    x, number, alpha = (*args, 1)[:3]
    minuend = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)
    return partial(torch.sub, minuend, x, alpha=alpha, out=outs[0])


def _bind_masked_fill(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    x, mask, value = args
    return lambda: outs[0].copy_(x).masked_fill_(mask, value)


BINDERS = {
    **{name: _bind_with_out(name) for name in _WITH_OUT},
    "aten.masked_fill.Scalar": _bind_masked_fill,
    "aten.pow.Tensor_Scalar": _bind_power,
    "aten.rsub.Scalar": _bind_reversed_subtraction,
    "aten.square.default": _bind_square,
}


def bind_copy(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`copy(source)`: the same elements in the output's layout and dtype."""
    return partial(outs[0].copy_, args[0])


def bind_embedding(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`aten.embedding(weight [V, D], ids [...])`: rows of the table."""
    weight, ids = args[:2]
    return partial(torch.index_select, weight, 0, ids.view(-1), out=as_rows(outs[0]))


def as_rows(x: Tensor) -> Tensor:
    """[..., width] -> [n, width] over the same memory; raises where the layout does not allow it."""
    return x.view(-1, x.shape[-1])
