"""Products of activations with a weight matrix, however they are written, become `linear`."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.pattern import Call, Found, Rule, Var, apply

aten = torch.ops.aten

# x, weight -> result: the axes of x but its last are kept.
_EQUATION = re.compile(r"((?:\.\.\.)?[a-zA-Z]*)([a-zA-Z]),([a-zA-Z]{2})->((?:\.\.\.)?[a-zA-Z]*)([a-zA-Z])")


@dataclass(frozen=True)
class RespellLinears(Pass):
    """x [..., in] times a weight becomes linear(x, W [out, in]), which other passes know.

    Case 1: x @ W.T, in any spelling of the transposition; x @ W of a weight [in, out] becomes linear(x, W.T).
    Case 2: addmm(bias, x, W), as in GPT-2's Conv1D, the bias inside.
    Case 3: einsum over the last axis of x: "btd,vd->btv", "...d,dv->...v".
    """

    name = "respell-linears"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        return apply(step, (Product(step), WithBias(step), Einsum(step)))


class _OfWeight(Rule):
    """A product with a parameter: one with any other matrix mixes what it must not, or is no layer."""

    def __init__(self, step: StepGraph) -> None:
        self._weights = {node for node, role in step.placeholders() if role.kind == "weight"}

    def is_weight(self, matrix: Any) -> bool:
        if not isinstance(matrix, fx.Node) or matrix.meta["val"].dim() != 2:
            return False
        return (_untransposed(matrix) or matrix) in self._weights


class Product(_OfWeight):
    """Case 1."""

    name = "products"

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step)
        x, weight = Var("x", _has_rows), Var("weight", self.is_weight)
        self.pattern = Call((aten.matmul.default, aten.mm.default), x, weight)

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        weight = _transposed(step, found["weight"])
        step.replace(root, step.call(aten.linear.default, found["x"], weight, origin=root))


class WithBias(_OfWeight):
    """Case 2."""

    name = "biased"

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step)
        bias = Var("bias", lambda node: isinstance(node, fx.Node) and node.meta["val"].dim() == 1)
        self.pattern = Call(aten.addmm.default, bias, Var("x", _has_rows), Var("weight", self.is_weight))

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        weight = _transposed(step, found["weight"])
        step.replace(root, step.call(aten.linear.default, found["x"], weight, found["bias"], origin=root))


class Einsum(_OfWeight):
    """Case 3."""

    name = "einsums"

    def __init__(self, step: StepGraph) -> None:
        super().__init__(step)
        operands = [Var("x", _has_rows), Var("weight", self.is_weight)]
        equation = Var("equation", lambda text: _weight_axes(text) is not None)
        self.pattern = Call(aten.einsum.default, equation, operands)

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        weight = found["weight"]
        if _weight_axes(found["equation"]) == "in, out":
            weight = _transposed(step, weight)
        step.replace(root, step.call(aten.linear.default, found["x"], weight, origin=root))


def _has_rows(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.meta["val"].dim() >= 2


def _weight_axes(equation: str) -> str | None:
    """The order of the weight's axes in an equation that is a linear; None for any other."""
    match = _EQUATION.fullmatch(equation.replace(" ", ""))
    if match is None:
        return None
    kept, summed, weight, still_kept, new = match.groups()
    if kept != still_kept or new in kept + summed or summed in kept:
        return None
    return {new + summed: "out, in", summed + new: "in, out"}.get(weight)


def _transposed(step: StepGraph, weight: fx.Node) -> fx.Node:
    return _untransposed(weight) or step.call(aten.transpose.int, weight, 0, 1, origin=weight)


def _untransposed(matrix: fx.Node) -> fx.Node | None:
    """What a matrix is the transpose of, if it is one."""
    axes: Any = matrix.args[1:]
    if matrix.target is aten.transpose.int:
        swaps = axes[0] % 2 != axes[1] % 2
    elif matrix.target is aten.permute.default:
        swaps = axes[0][0] % 2 == 1
    else:
        swaps = matrix.target in (aten.t.default, aten.numpy_T.default, aten.mT.default)
    return matrix.args[0] if swaps else None  # type: ignore[return-value]
