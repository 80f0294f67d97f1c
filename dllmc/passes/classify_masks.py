"""Attention masks that say how far a token sees, not which tokens: dropped, or made a window."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import chain, combinations_with_replacement

import torch
from torch import Tensor, fx

from dllmc.errors import CaptureError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.ops import attention  # noqa: F401  (registers the operator)
from dllmc.ops.facts import argument
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.by_length import ByLength, by_length

aten = torch.ops.aten

# Bytes of the largest value that is made for a mask: bounds the lengths that it is evaluated at.
MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class ClassifyMasks(Pass):
    """Evaluate the mask of each scaled_dot_product_attention at several lengths, and do without it.

    The lengths are powers of two, those just beyond each number that the mask is computed with, and the longest that a
    request can have, or that `MOST_BYTES` allow.
    Case 1: every query sees every key: the mask is dropped. An additive mask is one where 0 is seen and the lowest
            number, or -inf, is not.
    Case 2: query i sees the keys j with |i - j| <= w: the call becomes `dllmc::window_attention`.
    Refused, with the lines of the call and the mask: a mask that depends on the values of tokens, that is causal, or
    that is any other; and one that may still change beyond the lengths that can be evaluated.
    """

    name = "classify-masks"
    requires = ("flat",)
    ensures = ("masks-classified",)

    def run(self, step: StepGraph) -> PassResult:
        windows: dict[fx.Node, int | None] = {}  # None: everything is seen
        stats = {"masks": 0, "dropped": 0, "windows": 0}
        for node in step.calls(aten.scaled_dot_product_attention.default):
            mask = argument(node, 3)
            if mask is None:
                continue
            if mask not in windows:
                windows[mask] = _window(step, node, mask)
                stats["masks"] += 1
            if windows[mask] is None:
                node.args = (*node.args[:3], None, *node.args[4:])
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
                stats["dropped"] += 1
            else:
                _set_window(step, node, windows[mask])
                stats["windows"] += 1
        return PassResult(stats["masks"] > 0, stats)


def _set_window(step: StepGraph, node: fx.Node, window: int | None) -> None:
    q, k, v, _, dropout, _, scale = (argument(node, i) for i in range(7))
    if dropout:
        raise CaptureError(f"{describe(node)}: attention with dropout {dropout}; expected none, as in evaluation mode")
    scale = 1 / math.sqrt(q.meta["val"].shape[-1]) if scale is None else float(scale)
    with step.graph.inserting_before(node):
        windowed = step.call(torch.ops.dllmc.window_attention.default, q, k, v, scale, window, origin=node)
    windowed.meta["val"] = node.meta["val"]
    step.replace(node, windowed)


def _window(step: StepGraph, node: fx.Node, mask: fx.Node) -> int | None:
    """How many tokens away a query sees; None for any number. Raises `CaptureError` for any other mask."""
    computed = by_length(step, mask)
    if isinstance(computed, str):
        raise _refusal(node, mask, f"depends on {computed}")
    reaches: dict[int, tuple[int, int]] = {}
    for length in _lengths(step, node, mask, computed):
        reach = _reach(computed.at(length), length)
        if isinstance(reach, str):
            raise _refusal(node, mask, f"{reach} (at length {length})")
        reaches[length] = reach
    longest = max(reaches)
    ahead, behind = (max(reach[side] for reach in reaches.values()) for side in (0, 1))
    for length, reach in reaches.items():
        if reach != (min(ahead, length - 1), min(behind, length - 1)):
            raise _refusal(node, mask, f"shows {reach[0]} tokens ahead and {reach[1]} behind at length {length} alone")
    if ahead == behind:
        return None if ahead == longest - 1 else ahead
    seen = [
        f"all tokens {where}" if n == longest - 1 else f"{n} tokens {where}"
        for n, where in ((ahead, "ahead"), (behind, "behind"))
    ]
    if ahead == 0:
        hint = "; in the config of a Hugging Face model, set is_causal = False"
        raise _refusal(node, mask, f"is causal: a token sees {seen[1]} and none ahead", hint)
    raise _refusal(node, mask, f"shows {seen[0]} and {seen[1]}")


def _refusal(node: fx.Node, mask: fx.Node, what: str, hint: str = "") -> CaptureError:
    return CaptureError(
        f"{describe(node)}: the mask of this attention {what}. It is {describe(mask)}. Expected a mask by which every "
        f"token sees all others, or all within a symmetric window, whatever the tokens are{hint}"
    )


def _lengths(step: StepGraph, node: fx.Node, mask: fx.Node, computed: ByLength) -> list[int]:
    """The lengths at which the mask is evaluated, ascending."""
    most = step.spec.max_positions
    longest = most
    if computed.largest_bytes(most) > MOST_BYTES:
        longest = bisect_right(range(most), MOST_BYTES, key=computed.largest_bytes) - 1
    numbers = sorted(computed.numbers())
    if longest < most:
        # A division moves a change to the product of two numbers. A window of n tokens is seen at length n + 2.
        products = (a * b for a, b in combinations_with_replacement(numbers, 2))
        unseen = [f"the number {n}" for n in chain(numbers, products) if longest < n + 2 and n + 1 <= most]
        if unseen := [*unseen, *map(repr, computed.large_constants())]:
            raise _refusal(
                node,
                mask,
                f"is computed with {unseen[0]}, but can be evaluated up to length {longest} only, for it would take "
                f"more than {MOST_BYTES >> 20} MiB; with max_positions={longest} in the spec it could",
            )
    powers = [1 << exponent for exponent in range(1, longest.bit_length())]
    changes = [n + more for n in numbers for more in (1, 2)]
    return sorted({length for length in (*powers, *changes, longest) if 2 <= length <= longest})


def _reach(mask: Tensor, length: int) -> tuple[int, int] | str:
    """How many tokens ahead and behind a token sees, if the mask shows a band; else what it does."""
    if not {*mask.shape[-2:]} <= {1, length}:
        return f"has the shape {[*mask.shape]}, not that of self-attention"
    seen = mask
    if mask.is_floating_point():
        seen = mask == 0
        if not (seen | (mask <= torch.finfo(mask.dtype).min)).all():
            return "adds to the scores"
    heads = seen.reshape(-1, *seen.shape[-2:])
    if not all(torch.equal(head, heads[0]) for head in heads[1:]):
        return "differs between heads"
    seen = heads[0].expand(length, length)
    ahead, behind = int(seen[0].sum()) - 1, int(seen[:, 0].sum()) - 1
    if min(ahead, behind) < 0 or not torch.equal(seen, torch.ones_like(seen).tril(ahead).triu(-behind)):
        return f"shows query {length // 2} the keys {seen[length // 2].nonzero().flatten().tolist()[:8]}, not a band"
    return ahead, behind
