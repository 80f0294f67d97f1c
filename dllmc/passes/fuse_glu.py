"""The gate of a gated linear unit and its product with the other half become one operator."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.ops import glu  # noqa: F401  (registers the operator)
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.pattern import Call, Found, OneOf, Rule, Var, apply

aten = torch.ops.aten

_GATE = Var("gate")
_ACTIVATIONS: dict[str, Any] = {
    "silu": OneOf(
        Call(aten.silu.default, _GATE),
        Call(aten.mul.Tensor, _GATE, Call(aten.sigmoid.default, _GATE), commutes=True),
    ),
    "gelu": Call(aten.gelu.default, _GATE),
    "gelu_tanh": Call(aten.gelu.default, _GATE, "tanh"),
    "relu": Call(aten.relu.default, _GATE),
}


@dataclass(frozen=True)
class FuseGLU(Pass):
    """activation(gate) * up becomes `dllmc::glu` for gate and up of one shape and dtype.

    The activations are SiLU, also spelled x * sigmoid(x), GELU in both its forms, and ReLU.
    """

    name = "fuse-glu"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        return apply(step, [GLU(activation) for activation in _ACTIVATIONS])


class GLU(Rule):
    """A gated linear unit with one activation."""

    name = "glus"

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.pattern = Call(aten.mul.Tensor, _ACTIVATIONS[activation], Var("up"), commutes=True)

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        gate, up = found["gate"].meta["val"], found["up"].meta["val"]
        same = gate.dtype == up.dtype and [*map(str, gate.shape)] == [*map(str, up.shape)]
        return None if same else f"gate and up differ: {gate.dtype} {list(gate.shape)}, {up.dtype} {list(up.shape)}"

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        step.replace(
            root, step.call(torch.ops.dllmc.glu.default, found["gate"], found["up"], self.activation, origin=root)
        )
