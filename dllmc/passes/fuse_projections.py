"""Projections of one value, such as q, k and v or gate and up, share one GEMM."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph, loop_of
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Linears of the same input become one, with their weights one after the other, and slices of its result.

    Case 1: all have a bias or none has, and nothing else reads their weights.
    Case 2: a `view` of a result becomes a `reshape`, which a slice can have in any case.
    The joined weight is made when it is written or loaded, never kept beside its parts.
    """

    name = "fuse-projections"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in step.calls(aten.linear.default):
            x, weight, bias = (argument(node, i) for i in range(3))
            if all(_serves_alone(parameter) for parameter in (weight, bias) if parameter is not None):
                groups[x, weight.meta["val"].dtype, bias is None, loop_of(node)].append(node)
        fused = [group for group in groups.values() if len(group) > 1]
        for group in fused:
            _fuse(step, group)
        return PassResult(bool(fused), {"linears": sum(map(len, fused)), "gemms": len(fused)})


def _serves_alone(parameter: fx.Node) -> bool:
    return parameter.op == "placeholder" and len(parameter.users) == 1


def _fuse(step: StepGraph, group: list[fx.Node]) -> None:
    first = group[0]
    weights, biases = ([argument(node, i) for node in group] for i in (1, 2))
    weight = step.join_weights(weights)
    bias = None if biases[0] is None else step.join_weights(biases)
    ends = list(accumulate(part.meta["val"].shape[0] for part in weights))
    with step.graph.inserting_before(first):  # its input is defined there, and no result is read before
        whole = step.call(aten.linear.default, first.args[0], weight, bias, origin=first)
        bounds = zip(group, pairwise([0, *ends]), strict=True)
        slices = [step.call(aten.slice.Tensor, whole, -1, start, end, origin=node) for node, (start, end) in bounds]
    for node, part in zip(group, slices, strict=True):
        for user in [user for user in node.users if user.target is aten.view.default]:
            user.target = aten.reshape.default
        step.replace(node, part)
