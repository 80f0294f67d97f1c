"""Norms become one operator each, with the residual add before them inside."""

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph, loop_of
from dllmc.ops import norms  # noqa: F401  (registers the operators)
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.pattern import Call, Found, OneOf, Rule, Var, apply, is_float, is_number, is_tensor

aten = torch.ops.aten
dllmc = torch.ops.dllmc


@dataclass(frozen=True)
class FuseNorm(Pass):
    """RMS norms become `dllmc::rms_norm`; a norm of a sum becomes `dllmc::add_rms_norm` or `dllmc::add_layer_norm`.

    Case 1: x * rsqrt(mean(x^2) + eps), or x / sqrt(mean(x^2) + eps), over the last axis; the square as pow, square or
            a product. Conversions may stand at x, before the weight and at the end, as in LLaDA, Llama and Qwen2. A
            weight and a bias may follow.
    Case 2: torch's own rms_norm.
    Case 3: the norm's input, torch's layer_norm's too, is a sum of two values of one shape: the operator adds them,
            and returns the sum to whatever else reads it.
    Refused: a norm whose result has another dtype than its input, statistics over another axis.
    """

    name = "fuse-norm"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        return apply(step, (RMSNorm(), TorchRMSNorm(), LayerNorm()))


def _is_vector(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder" and value.meta["val"].dim() == 1


def _converted(pattern: Any, name: str) -> OneOf:
    return OneOf(Call(aten.to.dtype, pattern, Var(name, is_float)), pattern)


def _commutes(target: object, first: Any, second: Any) -> Call:
    return Call(target, first, second, commutes=True)


_WEIGHT, _BIAS = Var("weight", _is_vector), Var("bias", _is_vector)
_WIDE = _converted(Var("x"), "wide")
_SQUARE = OneOf(
    Call(aten.pow.Tensor_Scalar, _WIDE, 2), Call(aten.mul.Tensor, _WIDE, _WIDE), Call(aten.square.default, _WIDE)
)
_MEAN = Call(aten.mean.dim, _SQUARE, Var("axes", lambda value: isinstance(value, list | tuple)), True)
_VARIANCE = _commutes((aten.add.Tensor, aten.add.Scalar), _MEAN, Var("eps", is_number))
_ROOT = Call(aten.sqrt.default, _VARIANCE)
_NORMED = OneOf(
    _commutes(aten.mul.Tensor, _WIDE, OneOf(Call(aten.rsqrt.default, _VARIANCE), Call(aten.reciprocal.default, _ROOT))),
    Call(aten.div.Tensor, _WIDE, _ROOT),
)
_PLAIN = _converted(_NORMED, "narrow")
_WEIGHTED = _commutes(aten.mul.Tensor, _WEIGHT, _PLAIN)
_BIASED = _commutes(aten.add.Tensor, _WEIGHTED, _BIAS)


class RMSNorm(Rule):
    """Case 1."""

    name = "rms_norms"
    pattern = _converted(OneOf(_BIASED, _WEIGHTED, _NORMED), "last")

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        x, result = found["x"].meta["val"], root.meta["val"]
        if [axis % x.dim() for axis in found["axes"]] != [x.dim() - 1]:
            return f"its statistics are over the axes {list(found['axes'])}, not the last"
        return _unlike(x, result) or _ill_fitting(found, x)

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        _fuse(step, root, found, dllmc.rms_norm.default, dllmc.add_rms_norm.default)


class TorchRMSNorm(Rule):
    """Case 2."""

    name = "torch_rms_norms"
    pattern = Call(
        aten.rms_norm.default,
        Var("x"),
        [Var("width", is_number)],
        OneOf(_WEIGHT, None),
        OneOf(Var("eps", is_number), None),
    )

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        widest = torch.promote_types(found["x"].meta["val"].dtype, torch.float32)
        found = {"eps": torch.finfo(widest).eps, **found}
        _fuse(step, root, found, dllmc.rms_norm.default, dllmc.add_rms_norm.default)


class LayerNorm(Rule):
    """Case 3, of torch's layer norm; without a sum before it there is nothing to gain."""

    name = "layer_norms"
    pattern = Call(
        aten.layer_norm.default,
        Call(aten.add.Tensor, Var("a"), Var("b")),
        [Var("width", is_number)],
        OneOf(_WEIGHT, None),
        OneOf(_BIAS, None),
        Var("eps", is_number),
        Var("cudnn", lambda value: isinstance(value, bool)),  # whether it may be used; as torch is set when exporting
    )

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        return None if _is_residual(root.args[0]) else "its two summands have different shapes or dtypes"

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        _fuse(step, root, {**found, "x": root.args[0]}, None, dllmc.add_layer_norm.default)


def _unlike(x: torch.Tensor, result: torch.Tensor) -> str | None:
    return None if x.dtype == result.dtype else f"it makes {result.dtype} of {x.dtype}"


def _ill_fitting(found: Found, x: torch.Tensor) -> str | None:
    for name in ("weight", "bias"):
        if name in found and found[name].meta["val"].shape != x.shape[-1:]:
            return f"its {name} has the shape {list(found[name].meta['val'].shape)}, not [{x.shape[-1]}]"
    return None


def _is_residual(x: Any) -> bool:
    """Whether a value is the sum of two of its own shape and dtype."""
    if x.target is not aten.add.Tensor or len(x.args) != 2 or x.kwargs:
        return False
    values = [n.meta["val"] for n in (x, *x.args) if is_tensor(n)]
    like = [(v.dtype, [str(size) for size in v.shape]) for v in values]
    return len(values) == 3 and like[0] == like[1] == like[2]


def _fuse(step: StepGraph, root: fx.Node, found: Found, alone: Any, with_sum: Any) -> None:
    x = found["x"]
    options = found.get("weight"), found.get("bias"), float(found["eps"])
    if not _is_residual(x) or loop_of(x) != loop_of(root):
        step.replace(root, step.call(alone, x, *options, origin=root))
        return
    with step.graph.inserting_before(x):  # the sum may be read before the norm
        both = step.call(with_sum, *x.args, *options, origin=root)
        normed, total = (step.call(getitem, both, i, origin=root) for i in (0, 1))
    total.meta["val"] = x.meta["val"]  # another norm of the same sum asks for it
    step.replace(root, normed)
    if x.users:
        step.replace(x, total)
