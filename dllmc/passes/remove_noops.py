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
_IDENTITIES = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_CONVERSIONS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Remove what does not change a value.

    Case 1: checks of metadata and sizes: shapes and dtypes are facts of the graph by now.
    Case 2: alias, detach, clone, contiguous: values are immutable here, and layouts are decided when lowering. A view
            of such a copy becomes a reshape, which demands no layout.
    Case 3: a conversion to the dtype the value already has; devices are the runtime's business. Any other
            conversion becomes `to.dtype`, whatever it was spelled as.
    Case 4: dropout outside training, or with probability 0.
    Case 5: a slice or an expand that keeps the shape, a sum of integers with 0, as positions have it.
    Case 6: a concatenation of one value with empty ones, as from a cache that was made for this step.
    """

    name = "remove-noops"
    requires = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        removed = respelled = 0
        for node in step.calls():
            if node.target in _CHECKS and not node.users:
                step.graph.erase_node(node)
                removed += 1
            elif (same := _same(node)) is not None:
                views = [user for user in node.users if user.target in _VIEWS] if node.target in _IDENTITIES else []
                for view in views:
                    view.target = aten.reshape.default
                respelled += len(views)
                node.replace_all_uses_with(same)
                step.graph.erase_node(node)
                removed += 1
            elif node.target in _CONVERSIONS and node.target is not aten.to.dtype:
                node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
                respelled += 1
        return PassResult(removed + respelled > 0, {"removed": removed, "respelled": respelled})


def _same(node: fx.Node) -> fx.Node | None:
    """The input that a call returns as it is, if it does."""
    source = node.args[0] if node.args else None
    if node.target is aten.cat.default:
        full = [part for part in source if part.meta["val"].shape != (0,)]  # type: ignore[union-attr]
        return full[0] if len(full) == 1 else None  # type: ignore[return-value]
    if not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    return source if _is_identity(node, before, after) else None


def _is_identity(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    if node.target in _CONVERSIONS:
        return before.dtype == after.dtype
    if node.target is aten.dropout.default:
        return not node.args[2] or bool(node.args[1] == 0)
    if node.target in (aten.slice.Tensor, aten.expand.default):
        return [*map(str, before.shape)] == [*map(str, after.shape)]
    if node.target is aten.add.Tensor:
        zero = isinstance(node.args[1], int) and node.args[1] == 0
        return zero and before.dtype == after.dtype == torch.int64
    return node.target in _IDENTITIES
