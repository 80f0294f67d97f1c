"""Attention learns about segments: the sequence axis becomes packed tokens of any number of requests."""

import math
from dataclasses import dataclass

import torch
from torch import fx

from dllmc.errors import CaptureError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.ops import attention  # noqa: F401  (registers the operator)
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.facts import mixing_call

aten = torch.ops.aten
WINDOW_ATTENTION = torch.ops.dllmc.window_attention.default

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class PackTokens(Pass):
    """Replace attention of one sequence by `dllmc::attention` over packed tokens and `segments` [segments, 2].

    Case 1: scaled_dot_product_attention of q, k, v [1, heads, tokens, head_dim], not causal, no dropout.
    Case 2: `dllmc::window_attention` of the same: each token sees its segment's tokens within the window.
    Case 3: keys and values repeated for grouped queries, by repeat_interleave or by expand and reshape, before or
            after their axes are transposed: the operator reads the KV heads themselves.
    Refused, with the line in the user's model: causal or cross attention, and any other operator that mixes tokens.
    """

    name = "pack-tokens"
    requires = ("flat", "masks-classified", "positions-lifted")
    ensures = ("packed",)

    def run(self, step: StepGraph) -> PassResult:
        calls = list(step.calls(aten.scaled_dot_product_attention.default, WINDOW_ATTENTION))
        ungrouped = sum(_pack(step, node) for node in calls)
        if calls:
            step.graph.eliminate_dead_code()  # repeated keys that nothing reads any more
            step.propagate()
        if (problem := mixing_call(step)) is not None:
            raise CaptureError(f"requests cannot be packed into one step: {problem}")
        return PassResult(bool(calls), {"attentions": len(calls), "ungrouped": ungrouped})


def _pack(step: StepGraph, node: fx.Node) -> bool:
    q, k, v = (argument(node, i) for i in range(3))
    scale, window = _options(node)
    for operand in (q, k, v):
        if operand.meta["val"].dim() != 4 or step.axis_of(operand) != 2:
            shape = [str(d) for d in operand.meta["val"].shape]
            raise CaptureError(
                f"{describe(node)}: expected self-attention over [1, heads, tokens, head_dim], found an operand {shape}"
            )
    widths = [x.meta["val"].shape[-1] for x in (q, k, v)]
    if len(set(widths)) > 1:
        raise CaptureError(f"{describe(node)}: expected q, k and v of one head_dim, found {widths}")
    sources = _before_repetition(k), _before_repetition(v)
    if sources[0].heads != sources[1].heads:
        sources = _Heads(k), _Heads(v)
    segments = step.add_input("segments", (step.size("segments"), 2), torch.int64)
    with step.graph.inserting_before(node):
        operands = [q, *(source.moved(step) for source in sources)]
        packed = [_call(step, node, aten.transpose.int, _first(step, node, x), 0, 1) for x in operands]
        options = (scale,) if window is None else (scale, window)
        out = _call(step, node, torch.ops.dllmc.attention.default, *packed, segments, segments, *options)
        out = _call(step, node, aten.unsqueeze.default, _call(step, node, aten.transpose.int, out, 0, 1), 0)
    node.replace_all_uses_with(out)
    step.graph.erase_node(node)
    return sources[0].heads != _Heads(q).heads


def _options(node: fx.Node) -> tuple[float, int | None]:
    """Scale and window of a call. Raises `CaptureError` for options that a step cannot have."""
    if node.target is WINDOW_ATTENTION:
        return argument(node, 3), argument(node, 4)
    dropout, causal, scale = (argument(node, i) for i in (4, 5, 6))
    for refused, what in ((causal, "a causal mask"), (dropout, "dropout")):
        if refused:
            raise CaptureError(f"{describe(node)}: attention with {what}; expected bidirectional self-attention")
    return float(scale) if scale is not None else 1 / math.sqrt(node.args[0].meta["val"].shape[-1]), None  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Heads:
    """Keys or values with their heads on `axis`, and the calls that then move their axes, first to last."""

    value: fx.Node
    axis: int = 1
    moves: tuple[fx.Node, ...] = ()

    @property
    def heads(self) -> int:
        return int(self.value.meta["val"].shape[self.axis])

    def moved(self, step: StepGraph) -> fx.Node:
        """[1, heads, tokens, head_dim], where the graph is being edited."""
        value = self.value
        for move in self.moves:
            value = step.call(move.target, value, *move.args[1:], origin=move)
        return value


def _before_repetition(x: fx.Node) -> _Heads:
    """The KV heads that an operand [1, heads, tokens, head_dim] repeats for its query groups, or itself."""
    axis, source, moves = 1, x, list[fx.Node]()
    while source.target in (aten.transpose.int, aten.permute.default):
        order: list[int] = list(range(4))
        if source.target is aten.transpose.int:
            a, b = (int(dim) % 4 for dim in source.args[1:])  # type: ignore[arg-type]
            order[a], order[b] = b, a
        else:
            order = [dim % 4 for dim in source.args[1]]  # type: ignore[union-attr, operator, misc]
        axis = order[axis]
        moves.insert(0, source)
        source = source.args[0]  # type: ignore[assignment]
    heads = _repeated(source, axis)
    return _Heads(x) if heads is None else _Heads(heads, axis, tuple(moves))


def _repeated(x: fx.Node, axis: int) -> fx.Node | None:
    """What a value repeats along an axis, each element as often as the next and all copies together."""
    if x.target is aten.repeat_interleave.self_int:
        dim = argument(x, 2)
        return x.args[0] if dim is not None and dim % 4 == axis else None  # type: ignore[return-value]
    if x.target not in _RESHAPES or not isinstance(expanded := x.args[0], fx.Node):
        return None
    if expanded.target is not aten.expand.default or not isinstance(split := expanded.args[0], fx.Node):
        return None
    if split.target not in (aten.unsqueeze.default, *_RESHAPES) or not isinstance(heads := split.args[0], fx.Node):
        return None
    before, one, many, after = (_sizes(n) for n in (heads, split, expanded, x))
    times = many[axis + 1] if len(many) == 5 else ""
    spread = [(*before[: axis + 1], n, *before[axis + 1 :]) for n in ("1", times)]
    same = len(after) == 4 and before[:axis] == after[:axis] and before[axis + 1 :] == after[axis + 1 :]
    return heads if same and [one, many] == spread else None


def _sizes(x: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, x.meta["val"].shape))


def _first(step: StepGraph, origin: fx.Node, x: fx.Node) -> fx.Node:
    return _call(step, origin, aten.select.int, x, 0, 0)


def _call(step: StepGraph, origin: fx.Node, target: object, *args: object) -> fx.Node:
    """A call that is traced back to the line of the call it replaces."""
    node = step.graph.call_function(target, args)  # type: ignore[arg-type]
    if "stack_trace" in origin.meta:
        node.meta["stack_trace"] = origin.meta["stack_trace"]
    return node
