"""Facts about a step graph that passes require and ensure, each with its checker.

A checker returns None where the fact holds, else a sentence that says which node breaks it.
"""

from collections.abc import Callable

import torch
from torch import fx

from dllmc.errors import CaptureError, ProgramError
from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph
from dllmc.memory.verifier import verify
from dllmc.ops.facts import argument, is_row_wise

aten = torch.ops.aten
ATTENTION = "dllmc.attention.default"
KEEP = "dllmc.keep.default"
DECODE_HEAD = "dllmc.decode_head.default"

# Operators to which a size of the step is a shape; to any other it would be a value.
_TAKE_SIZES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unflatten.int,
    aten.sym_size.int,
)


def mixing_call(step: StepGraph) -> str | None:
    """The first call that mixes the tokens of a packed step, and is not attention or for it; None if there is none."""
    for node in step.calls():
        if str(node.target) in (ATTENTION, KEEP) or not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            continue
        try:
            touched = [n for n in (node, *node.all_input_nodes) if step.axis_of(n) is not None]
        except CaptureError as error:
            return str(error)
        if touched and not is_row_wise(node, step.axis_of) and not _selects_rows(step, node):
            return f"{describe(node)}: it may mix the tokens of a sequence, and only attention may"
    return None


def _selects_rows(step: StepGraph, node: fx.Node) -> bool:
    """Whether a call gathers rows: those of the head (select-logit-rows), or of the active spans (cache-kv)."""
    index = node.args[2] if node.target is aten.index_select.default else None
    shapes = [str(n.meta["val"].shape) for n in map(step.input, ("rows", "active")) if n is not None]
    return isinstance(index, fx.Node) and str(index.meta["val"].shape) in shapes


def depends_on(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is computed from another one, or is it."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        if (current := queue.pop()) is source:
            return True
        if current not in seen:
            seen.add(current)
            queue += current.all_input_nodes
    return False


def _flat(step: StepGraph) -> str | None:
    odd = next((n for n in step.graph.nodes if n.op in ("get_attr", "call_module", "call_method")), None)
    return None if odd is None else f"{describe(odd)} is not a call of an operator"


def _masks_classified(step: StepGraph) -> str | None:
    masked = [n for n in step.calls(aten.scaled_dot_product_attention.default) if argument(n, 3) is not None]
    return f"{describe(masked[0])} has a mask" if masked else None


def _positions_lifted(step: StepGraph) -> str | None:
    for node in step.calls():
        sizes = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
        if sizes and node.target not in _TAKE_SIZES:
            return f"{describe(node)}: its value depends on the length of the sequence"
    return None


def _packed(step: StepGraph) -> str | None:
    dense = next(step.calls(aten.scaled_dot_product_attention.default), None)
    if dense is not None:
        return f"{describe(dense)} is not packed"
    return mixing_call(step)


def _rows_selected(step: StepGraph) -> str | None:
    full = next((n for n in step.output_nodes() if step.axis_of(n) is not None), None)
    return None if full is None else f"{describe(full)} is computed for every token"


def _head_fused(step: StepGraph) -> str | None:
    heads = [n for n in step.calls() if str(n.target) == DECODE_HEAD]
    picked = [n.args[0] for n in step.output_nodes() if n.args]
    ok = len(heads) == 1 and all(source is heads[0] for source in picked)
    return None if ok else f"the step returns {step.outputs}, not the results of one dllmc::decode_head"


def _lowered(step: StepGraph) -> str | None:
    return None if step.program is not None else "the step has no program"


def _planned(step: StepGraph) -> str | None:
    try:
        for program in (step.program, *step.phases.values()):
            verify(program) if program else None
    except ProgramError as error:
        return str(error)
    return None


FACTS: dict[str, Callable[[StepGraph], str | None]] = {
    "flat": _flat,
    "masks-classified": _masks_classified,
    "positions-lifted": _positions_lifted,
    "packed": _packed,
    "rows-selected": _rows_selected,
    "head-fused": _head_fused,
    "lowered": _lowered,
    "planned": _planned,
}


def token_size(step: StepGraph, value: object) -> bool:
    """Whether an argument of a call is the number of packed tokens."""
    size = value.meta.get("val") if isinstance(value, fx.Node) else value
    return isinstance(size, torch.SymInt) and str(step.size("tokens")) == str(size)
