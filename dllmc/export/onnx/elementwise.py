"""Torch's own operators in standard ONNX: each function here writes one, given operands as the program lists them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dllmc.export.onnx.graph import WIDER, Graph, Operand, Value

Emit = Callable[[Graph, Sequence[Operand], str], str]
"""(graph, operands, dtype of the result) -> the result's name."""


def wide(dtype: str) -> str:
    """The dtype of statistics: float32, or float64 of float64."""
    return "float64" if dtype == "float64" else "float32"


def as_dtype(g: Graph, operand: Operand, dtype: str) -> str:
    """An operand, a value or a number, in a dtype."""
    if not isinstance(operand, Value):
        return g.constant(operand, dtype)
    return operand.name if operand.dtype == dtype else g.cast(operand.name, dtype)


def common(operands: Sequence[Operand]) -> str:
    """The dtype in which operands are compared: the widest of the values', where a float number makes an integer one
    float32.
    """
    dtypes = {operand.dtype for operand in operands if isinstance(operand, Value)}
    if {"float16", "bfloat16"} <= dtypes:
        return "float32"
    widest = max(dtypes, key=WIDER.index)
    floats = any(isinstance(operand, float) for operand in operands)
    return "float32" if floats and "float" not in widest else widest


def _unary(op: str) -> Emit:
    return lambda g, args, dtype: g(op, as_dtype(g, args[0], dtype))


def _binary(op: str, swapped: bool = False) -> Emit:
    """`self op other`, where a third operand is a factor of the other (`alpha`)."""

    def emit(g: Graph, args: Sequence[Operand], dtype: str) -> str:
        left, right = (as_dtype(g, operand, dtype) for operand in args[:2])
        if len(args) > 2 and args[2] != 1:
            scaled = g("Mul", left if swapped else right, g.constant(args[2], dtype))
            left, right = (scaled, right) if swapped else (left, scaled)
        return g(op, right, left) if swapped else g(op, left, right)

    return emit


def _compare(*ops: str) -> Emit:
    def emit(g: Graph, args: Sequence[Operand], dtype: str) -> str:
        kind = common(args)
        found = g(ops[0], *(as_dtype(g, operand, kind) for operand in args))
        return found if len(ops) == 1 else g(ops[1], found)

    return emit


def _bitwise(logical: str, bitwise: str) -> Emit:
    return lambda g, args, dtype: g(logical if dtype == "bool" else bitwise, *(as_dtype(g, x, dtype) for x in args))


def _reduction(op: str) -> Emit:
    def emit(g: Graph, args: Sequence[Operand], dtype: str) -> str:
        x, dims, keep = [*args[:3], None, False][:3] if len(args) < 2 else [*args[:3], False][:3]
        axes = list(range(len(x.dims))) if not dims else list(dims)
        return g(op, as_dtype(g, x, dtype), g.constant(np.array(axes, np.int64)), keepdims=int(bool(keep)))

    return emit


def _along(op: str) -> Emit:
    return lambda g, args, dtype: g(op, as_dtype(g, args[0], dtype), axis=args[1])


def _clamp(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    x, low, high = (*args, None, None)[:3]
    found = as_dtype(g, x, dtype)
    for op, limit in (("Max", low), ("Min", high)):
        found = found if limit is None else g(op, found, g.constant(limit, dtype))
    return found


def _gelu(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    return g("Gelu", as_dtype(g, args[0], dtype), approximate=args[1] if len(args) > 1 else "none")


def _silu(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    x = as_dtype(g, args[0], dtype)
    return g("Mul", x, g("Sigmoid", x))


def _where(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    return g("Where", args[0].name, as_dtype(g, args[1], dtype), as_dtype(g, args[2], dtype))


def _masked_fill(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    return g("Where", args[1].name, g.constant(args[2], dtype), as_dtype(g, args[0], dtype))


def _concatenate(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    return g("Concat", *(as_dtype(g, x, dtype) for x in args[0]), axis=args[1] if len(args) > 1 else 0)


def _stack(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    axis = (args[1] if len(args) > 1 else 0) % (len(args[0][0].dims) + 1)
    return g("Concat", *(g.unsqueeze(as_dtype(g, x, dtype), axis) for x in args[0]), axis=axis)


def _index_select(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    x, axis, index = args
    return g("Gather", x.name, index.name, axis=axis)


def _linear(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    """One product over all leading axes."""
    x, weight, bias = (*args, None)[:3]
    rows = g.reshape(x.name, -1, weight.dims[1])
    product = g("Gemm", rows, weight.name, None if bias is None else bias.name, transB=1)
    return g.reshape(product, *(g.dim(x, axis) for axis in range(len(x.dims) - 1)), weight.dims[0])


def layer_norm(g: Graph, x: str, weight: Value | None, bias: Value | None, eps: float, dtype: str) -> str:
    """Over the last axis; statistics in the wide dtype, rounded once."""
    wider = wide(dtype)
    x = g.cast(x, wider)
    centred = g("Sub", x, g.reduce("ReduceMean", x, -1, keepdims=True))
    return _normed(g, centred, weight, bias, eps, wider, dtype)


def rms_norm(g: Graph, x: str, weight: Value | None, bias: Value | None, eps: float, dtype: str) -> str:
    """The same of x itself."""
    wider = wide(dtype)
    return _normed(g, g.cast(x, wider), weight, bias, eps, wider, dtype)


def _normed(g: Graph, x: str, weight: Value | None, bias: Value | None, eps: float, wider: str, dtype: str) -> str:
    mean = g.reduce("ReduceMean", g("Mul", x, x), -1, keepdims=True)
    x = g("Div", x, g("Sqrt", g("Add", mean, g.constant(eps, wider))))
    if weight is not None:
        x = g("Mul", x, as_dtype(g, weight, wider))
    if bias is not None:
        x = g("Add", x, as_dtype(g, bias, wider))
    return g.cast(x, dtype)


def _torch_layer_norm(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    given = [*args[:5]]
    x, _shape, weight, bias, eps = given + [None, None, 1e-5][len(given) - 2 :]
    return layer_norm(g, x.name, weight, bias, eps, dtype)


def _torch_rms_norm(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    x, _shape, weight, eps = (*args, None, None)[:4]
    return rms_norm(g, x.name, weight, None, float(np.finfo(wide(dtype)).eps) if eps is None else eps, dtype)


def _square(g: Graph, args: Sequence[Operand], dtype: str) -> str:
    x = as_dtype(g, args[0], dtype)
    return g("Mul", x, x)


EMIT: Mapping[str, Emit] = {
    "copy": lambda g, args, dtype: as_dtype(g, args[0], dtype),
    "aten.__and__.Tensor": _bitwise("And", "BitwiseAnd"),
    "aten.abs.default": _unary("Abs"),
    "aten.add.Scalar": _binary("Add"),
    "aten.add.Tensor": _binary("Add"),
    "aten.amax.default": _reduction("ReduceMax"),
    "aten.bitwise_and.Tensor": _bitwise("And", "BitwiseAnd"),
    "aten.bitwise_not.default": _bitwise("Not", "BitwiseNot"),
    "aten.cat.default": _concatenate,
    "aten.clamp.default": _clamp,
    "aten.clamp_max.default": lambda g, args, dtype: _clamp(g, [args[0], None, args[1]], dtype),
    "aten.clamp_min.default": _clamp,
    "aten.cos.default": _unary("Cos"),
    "aten.div.Scalar": _binary("Div"),
    "aten.div.Tensor": _binary("Div"),
    "aten.embedding.default": lambda g, args, dtype: g("Gather", args[0].name, args[1].name, axis=0),
    "aten.eq.Scalar": _compare("Equal"),
    "aten.eq.Tensor": _compare("Equal"),
    "aten.erf.default": _unary("Erf"),
    "aten.exp.default": _unary("Exp"),
    "aten.ge.Scalar": _compare("GreaterOrEqual"),
    "aten.ge.Tensor": _compare("GreaterOrEqual"),
    "aten.gelu.default": _gelu,
    "aten.gt.Scalar": _compare("Greater"),
    "aten.gt.Tensor": _compare("Greater"),
    "aten.index_select.default": _index_select,
    "aten.layer_norm.default": _torch_layer_norm,
    "aten.le.Scalar": _compare("LessOrEqual"),
    "aten.le.Tensor": _compare("LessOrEqual"),
    "aten.linear.default": _linear,
    "aten.log.default": _unary("Log"),
    "aten.log_softmax.int": _along("LogSoftmax"),
    "aten.lt.Scalar": _compare("Less"),
    "aten.lt.Tensor": _compare("Less"),
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.matmul.default": _binary("MatMul"),
    "aten.maximum.default": _binary("Max"),
    "aten.mean.dim": _reduction("ReduceMean"),
    "aten.minimum.default": _binary("Min"),
    "aten.mul.Scalar": _binary("Mul"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.ne.Scalar": _compare("Equal", "Not"),
    "aten.ne.Tensor": _compare("Equal", "Not"),
    "aten.neg.default": _unary("Neg"),
    "aten.pow.Scalar": _binary("Pow"),
    "aten.pow.Tensor_Scalar": _binary("Pow"),
    "aten.pow.Tensor_Tensor": _binary("Pow"),
    "aten.reciprocal.default": _unary("Reciprocal"),
    "aten.relu.default": _unary("Relu"),
    "aten.rms_norm.default": _torch_rms_norm,
    "aten.rsqrt.default": lambda g, args, dtype: g("Reciprocal", g("Sqrt", as_dtype(g, args[0], dtype))),
    "aten.rsub.Scalar": _binary("Sub", swapped=True),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.silu.default": _silu,
    "aten.sin.default": _unary("Sin"),
    "aten.softmax.int": _along("Softmax"),
    "aten.sqrt.default": _unary("Sqrt"),
    "aten.square.default": _square,
    "aten.stack.default": _stack,
    "aten.sub.Scalar": _binary("Sub"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.sum.dim_IntList": _reduction("ReduceSum"),
    "aten.tanh.default": _unary("Tanh"),
    "aten.where.self": _where,
}
