"""Offsets for every buffer, planned at the program's largest sizes, and verified."""

from dataclasses import dataclass, replace

from dllmc.errors import PassError
from dllmc.ir.program import ALIGNMENT_BYTES, aligned
from dllmc.ir.step_graph import StepGraph
from dllmc.memory import planner
from dllmc.memory.liveness import lifetimes
from dllmc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Give each buffer its lifetime and its offset in one arena; buffers that nothing touches go."""

    name = "plan-memory"
    requires = ("lowered",)
    ensures = ("planned",)

    def run(self, step: StepGraph) -> PassResult:
        program = step.program
        if program is None:
            raise PassError("pass 'plan-memory': the step has no program; run lower before it")
        spans = lifetimes(program)
        sizes = {name: aligned(program.buffers[name].size_bytes(program.maxima)) for name in spans}
        plan = planner.plan([planner.Buffer(name, *spans[name], size, ALIGNMENT_BYTES) for name, size in sizes.items()])
        buffers = {
            name: replace(program.buffers[name], offset=plan.offsets[name], lifetime=span)
            for name, span in spans.items()
        }
        step.program = replace(program, buffers=buffers, arena_bytes=plan.height, lower_bound_bytes=plan.lower_bound)
        stats = {"buffers_bytes": sum(sizes.values()), "arena_bytes": plan.height, "bound_bytes": plan.lower_bound}
        return PassResult(False, stats)
