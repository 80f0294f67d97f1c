"""Offsets for every buffer, planned at the program's largest sizes, and verified."""

from dataclasses import dataclass, replace

from dllmc.errors import PassError
from dllmc.ir.program import Program
from dllmc.ir.step_graph import StepGraph
from dllmc.memory import planner
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.sizing import planned_buffers


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Give each buffer its lifetime and its offset in one arena; buffers that nothing touches go."""

    name = "plan-memory"
    requires = ("lowered",)
    ensures = ("planned",)

    def run(self, step: StepGraph) -> PassResult:
        if step.program is None:
            raise PassError("pass 'plan-memory': the step has no program; run lower before it")
        step.program = program = planned(step.program)
        stats = {
            "buffers_bytes": sum(buffer.size for buffer in planned_buffers(program)),
            "arena_bytes": program.arena_bytes or 0,
            "bound_bytes": program.lower_bound_bytes or 0,
        }
        return PassResult(False, stats)


def planned(program: Program) -> Program:
    """The program with the lifetime of every buffer that a call touches, and its offset."""
    buffers = planned_buffers(program)
    plan = planner.plan(buffers)
    placed = {
        str(b.id): replace(program.buffers[str(b.id)], offset=plan.offsets[b.id], lifetime=(b.lower, b.upper))
        for b in buffers
    }
    return replace(program, buffers=placed, arena_bytes=plan.height, lower_bound_bytes=plan.lower_bound)
