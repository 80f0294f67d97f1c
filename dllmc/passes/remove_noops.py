"""Export leaves behind checks and conversions that change nothing once shapes and dtypes are known."""

from dataclasses import dataclass

import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass, PassResult

aten = torch.ops.aten

_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
_IDENTITIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default)
_CONVERSIONS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Remove what does not change a value.

    Case 1: checks of metadata and sizes: shapes and dtypes are facts of the graph by now.
    Case 2: alias, detach, clone: values are immutable here.
    Case 3: a conversion to the dtype the value already has; devices are the runtime's business. Any other
            conversion becomes `to.dtype`, whatever it was spelled as.
    Case 4: dropout outside training, or with probability 0.
    Case 5: contiguous: layouts are decided when lowering.
    Case 6: a slice or an expand that keeps the shape.
    """

    name = "remove-noops"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        removed = respelled = 0
        for node in step.calls():
            if node.target in _CHECKS and not node.users:
                step.graph.erase_node(node)
                removed += 1
            elif _is_identity(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                step.graph.erase_node(node)
                removed += 1
            elif node.target in _CONVERSIONS and node.target is not aten.to.dtype:
                node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
                respelled += 1
        return PassResult(removed + respelled > 0, {"removed": removed, "respelled": respelled})


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(source := node.args[0], fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target in _CONVERSIONS:
        return before.dtype == after.dtype
    if node.target is aten.dropout.default:
        return not node.args[2] or bool(node.args[1] == 0)
    if node.target in (aten.slice.Tensor, aten.expand.default):
        return len(before.shape) == len(after.shape) and all(
            a is b or str(a) == str(b) for a, b in zip(before.shape, after.shape, strict=True)
        )
    return node.target in _IDENTITIES or node.target is aten.contiguous.default
