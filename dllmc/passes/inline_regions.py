"""Published code wraps norms and rotary tables in autocast and no-grad regions; export keeps them as subgraphs."""

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled

from dllmc.errors import CaptureError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass, PassResult

# Operator -> how many leading arguments configure the region; the subgraph and its inputs follow.
_REGIONS: dict[object, int] = {wrap_with_autocast: 4, wrap_with_set_grad_enabled: 1}


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Put the bodies of wrapped regions into the graph, nested ones too.

    Case 1: a grad-mode region changes nothing in inference.
    Case 2: a disabled autocast region runs its body in the dtypes that it is given.
    Refused: an enabled autocast region, whose casts are not in the graph.
    """

    name = "inline-regions"
    ensures = ("flat",)

    def run(self, step: StepGraph) -> PassResult:
        inlined = 0
        while regions := list(step.calls(*_REGIONS)):
            for node in regions:
                _inline(step, node)
            inlined += len(regions)
        return PassResult(inlined > 0, {"inlined": inlined})


def _inline(step: StepGraph, node: fx.Node) -> None:
    body_attribute, *inputs = node.args[_REGIONS[node.target] :]
    assert isinstance(body_attribute, fx.Node)
    body = step.module.get_submodule(str(body_attribute.target))
    assert isinstance(body, fx.GraphModule)
    if node.target is wrap_with_autocast and node.args[2]:
        first = next((inner for inner in body.graph.nodes if inner.op == "call_function"), node)
        raise CaptureError(
            f"{describe(first)}: it runs in an autocast region that is enabled; "
            "convert the model to one dtype, or disable autocast there"
        )
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with step.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":  # a region nested in this one
                name = f"{body_attribute.target}_{inner.target}"
                step.module.add_submodule(name, body.get_submodule(inner.target))
                env[inner] = step.graph.get_attr(name)
            elif inner.op == "call_function":
                env[inner] = step.graph.node_copy(inner, lambda n: env[n])
    results: Any = fx.map_arg(body.graph.output_node().args[0], lambda n: env[n])
    for user in list(node.users):  # the region returns a tuple: its users pick from it
        user.replace_all_uses_with(results[user.args[1]])
        step.graph.erase_node(user)
    step.graph.erase_node(node)
    if not body_attribute.users:
        step.graph.erase_node(body_attribute)
