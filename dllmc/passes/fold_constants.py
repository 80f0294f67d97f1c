"""What depends on no input is computed once, at compile time: rotary frequencies, masks of fixed size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate calls whose inputs are all constants, and keep the results that others use as constants.

    Weights are not constants: their bytes need not be at hand when compiling. Nor is a buffer on the meta device.
    """

    name = "fold-constants"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        constants = {node: step.tensors[role.name] for node, role in step.placeholders() if role.kind == "constant"}
        known: dict[fx.Node, Any] = {node: value for node, value in constants.items() if not value.is_meta}
        folded: list[fx.Node] = []
        for node in step.calls():
            if all(n in known for n in node.all_input_nodes) and isinstance(node.meta.get("val"), torch.Tensor):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                folded.append(node)
        kept = [node for node in folded if any(user not in known for user in node.users)]
        for node in kept:
            value = known[node]
            assert isinstance(value, torch.Tensor)
            own = value.clone(memory_format=torch.contiguous_format)  # a view would share another constant's bytes
            node.replace_all_uses_with(step.add_constant(f"constant.{node.name}", own))
        return PassResult(bool(kept), {"folded": len(folded), "constants": len(kept)})
