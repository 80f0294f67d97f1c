"""What a program takes at given sizes of a step: its workspaces, and all that an engine allocates for it."""

from collections.abc import Mapping
from dataclasses import replace

from dllmc.ir.program import ALIGNMENT_BYTES, CHUNK, PAGES, Affine, Program, Tensor, aligned
from dllmc.memory import planner
from dllmc.memory.liveness import lifetimes
from dllmc.ops.signatures import workspace_bytes


def with_rows(maxima: Mapping[str, int], rows: int) -> dict[str, int]:
    """The largest sizes of a step with that many rows of the head.

    All of them may be guided. The active spans that a Refresh caches are as long as the blocks whose rows these are,
    on either side of a guided request, and a token longer in a shifted model.
    """
    return {**maxima, "rows": rows, "guided": rows, "active": 2 * rows + maxima["segments"]}


def with_tokens(program: Program, maxima: Mapping[str, int], tokens: int) -> dict[str, int]:
    """The largest sizes of a step with that many tokens; a chunk has no more, and the pool holds a request as long.

    It has a page more, since both sides of a guided request may end within one.
    """
    changed = {**maxima, "tokens": tokens}
    if CHUNK in changed:
        changed[CHUNK] = min(changed[CHUNK], tokens)
    if program.caches:
        changed[PAGES] = -(-tokens // program.page_tokens) + 1
    return changed


def resized(program: Program, maxima: Mapping[str, int]) -> Program:
    """The program, without a plan, for steps of other sizes, none larger than it was lowered for."""
    buffers = dict(program.buffers)
    for instruction, _ in program.calls():
        if instruction.workspace is not None:
            needed = workspace_bytes(instruction, program.tensor, maxima, program.device)
            buffers[instruction.workspace] = Tensor("uint8", (Affine(needed),))
    return replace(program, maxima=dict(maxima), buffers=buffers, arena_bytes=None, lower_bound_bytes=None)


def planned_buffers(program: Program) -> list[planner.Buffer]:
    """The program's buffers as the planner takes them: lifetimes, and sizes in the largest step."""
    sizes = {name: aligned(buffer.size_bytes(program.maxima)) for name, buffer in program.buffers.items()}
    spans = lifetimes(program)
    return [planner.Buffer(name, *span, sizes[name], ALIGNMENT_BYTES) for name, span in spans.items()]


def total_bytes(program: Program) -> int:
    """Weights, state, the KV pool, and the arena: as planned, or else as no plan can undercut."""
    arena = program.arena_bytes
    if arena is None:
        arena = planner.lower_bound(planned_buffers(program))
    return program.weight_bytes + program.state_bytes + program.cache_bytes + arena
