"""Programs for steps that need a part of the whole one: only dense requests, only Refreshes beside them, only Reuse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from dllmc.errors import PassError
from dllmc.ir.program import PAGES, ForRows, Instruction, Operand, Program, View
from dllmc.ir.step_graph import StepGraph
from dllmc.ops.registry import OPERATORS
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.plan_memory import planned

# Phase -> whether a step of it writes what a Refresh keeps, and whether it reads what was kept.
PHASES = {"dense": (False, False), "refresh": (True, False), "reuse": (False, True)}

Item = Instruction | ForRows
T = TypeVar("T")


@dataclass(frozen=True)
class SpecializePhase(Pass):
    """Make of the planned program, which is for mixed steps, one more for each kind of step that needs less.

    Case 1: without a Refresh nothing is kept, and what is computed for that alone goes.
    Case 2: without Reuse attention reads no cache.
    They share the weights, and an arena, which none of them needs to be larger.
    """

    name = "specialize-phase"
    requires = ("planned",)

    def run(self, step: StepGraph) -> PassResult:
        if step.program is None:
            raise PassError("pass 'specialize-phase': the step has no program; run lower before it")
        if not step.program.caches:
            return PassResult(False)
        step.phases = {name: _part(step.program, name, *needs) for name, needs in PHASES.items()}
        return PassResult(False, {name: len(list(part.calls())) for name, part in step.phases.items()})


def _part(program: Program, name: str, writes: bool, reads: bool) -> Program:
    items: Sequence[Item] = program.instructions
    if not writes:
        items = _each(items, lambda call: None if _updated(call) is not None else call)
    if not reads:
        items = _each(items, lambda call: call if _updated(call) is not None else _without_caches(program, call))
    items, used = _needed(items, {view.base for view in program.outputs.values()})
    caches = _of(program.caches, used)
    part = replace(
        program,
        name=name,
        maxima={size: most for size, most in program.maxima.items() if caches or size != PAGES},
        inputs=_of(program.inputs, used),
        weights=_of(program.weights, used),
        buffers=_of(program.buffers, used),
        caches=caches,
        instructions=tuple(items),
    )
    alone = planned(part)
    return alone if (alone.arena_bytes or 0) <= (program.arena_bytes or 0) else _as_placed(alone, program)


def _as_placed(part: Program, program: Program) -> Program:
    """The part with the offsets that its buffers have in the whole program."""
    buffers = {name: replace(b, offset=program.buffers[name].offset) for name, b in part.buffers.items()}
    return replace(part, buffers=buffers, arena_bytes=program.arena_bytes)


def _each(items: Sequence[Item], change: Callable[[Instruction], Instruction | None]) -> list[Item]:
    """Every call changed, or left out; a loop without calls too."""
    found: list[Item] = []
    for item in items:
        body = (item,) if isinstance(item, Instruction) else item.body
        changed = tuple(call for call in map(change, body) if call is not None)
        found += changed if isinstance(item, Instruction) else [replace(item, body=changed)] if changed else []
    return found


def _updated(call: Instruction) -> int | None:
    """Which operand a call updates: of a Refresh, the cache."""
    return OPERATORS[call.op].updates


def _without_caches(program: Program, call: Instruction) -> Instruction:
    """The call as it is without the optional operands from the first cache on."""
    operands: Sequence[Operand] = call.inputs
    at = [i for i, operand in enumerate(operands) if isinstance(operand, View) and operand.base in program.caches]
    return replace(call, inputs=tuple(operands[: at[0]])) if at else call


def _needed(items: Sequence[Item], results: set[str]) -> tuple[list[Item], set[str]]:
    """The calls from which the results come, or which update something, and the names of all that they use."""
    used = set(results)

    def keep(call: Instruction) -> Instruction | None:
        if _updated(call) is None and used.isdisjoint(view.base for view in call.outputs):
            return None
        used.update(view.base for view in (*call.reads(), *call.outputs))
        used.update(() if call.workspace is None else (call.workspace,))
        return call

    backwards = _each([_reversed(item) for item in reversed(items)], keep)
    return [_reversed(item) for item in reversed(backwards)], used


def _reversed(item: Item) -> Item:
    return item if isinstance(item, Instruction) else replace(item, body=item.body[::-1])


def _of(named: dict[str, T], used: set[str]) -> dict[str, T]:
    return {name: value for name, value in named.items() if name in used}
