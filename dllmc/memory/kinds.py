"""What a buffer holds, told from the program alone: who writes it, and what reads it.

The operators' part of it is the table `WRITES`. Buffers of any other operator are told by their use (what attention
and rope take, however it is prepared) or else by what they are made of.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from dllmc.ir.program import Instruction, Program, View

RESIDUAL = "residual stream"
NORM = "norms"
QUERIES = "queries"
KEYS_VALUES = "keys and values"
QKV = "fused q, k and v"
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
PROJECTION = "output projections"
HEAD = "head"
POSITIONS = "positions"
WORKSPACE = "workspace"
OTHER = "other"

KINDS = (
    RESIDUAL,
    KEYS_VALUES,
    QUERIES,
    QKV,
    ATTENTION,
    NORM,
    FEED_FORWARD,
    PROJECTION,
    HEAD,
    POSITIONS,
    WORKSPACE,
    OTHER,
)
"""Every kind, in the order in which pictures stack them: those that live longest first."""

# Operator -> kind of each of its results, the last one standing for all behind it.
WRITES: Mapping[str, tuple[str, ...]] = {
    "aten.embedding.default": (RESIDUAL,),
    "aten.layer_norm.default": (NORM,),
    "aten.rms_norm.default": (NORM,),
    "dllmc.rms_norm.default": (NORM,),
    "dllmc.add_layer_norm.default": (NORM, RESIDUAL),
    "dllmc.add_rms_norm.default": (NORM, RESIDUAL),
    "dllmc.attention.default": (ATTENTION,),
    "dllmc.glu.default": (FEED_FORWARD,),
    "aten.gelu.default": (FEED_FORWARD,),
    "aten.relu.default": (FEED_FORWARD,),
    "aten.silu.default": (FEED_FORWARD,),
    "dllmc.guide_rows.default": (HEAD,),
    "dllmc.decode_head.default": (HEAD,),
}
_LINEAR = ("aten.linear.default", "aten.matmul.default")
_ADD = "aten.add.Tensor"
# These carry the residual stream on; whatever else is made of it is part of a norm.
_CARRIES = (_ADD, "copy", "aten.cat.default", "aten.index_select.default")
# What stands between a projection and its use is of the projection's kind; these are where one ends.
_ENDS = (*_LINEAR, "aten.embedding.default", "dllmc.attention.default", "dllmc.decode_head.default")
_OPERANDS = {0: QUERIES, 1: KEYS_VALUES, 2: KEYS_VALUES}  # of attention


def kinds(program: Program) -> dict[str, str]:
    """Buffer -> one of `KINDS`; what several instructions write is what the first of them makes it."""
    instructions = [instruction for instruction, _ in program.calls()]
    taken = _taken_by_attention(instructions)
    activated = {base for i in instructions if FEED_FORWARD in WRITES.get(i.op, ()) for base in _bases(i.reads())}
    found: dict[str, str] = {}
    for instruction in instructions:
        for number, view in enumerate(instruction.outputs):
            if view.base not in found:
                by_use = taken.get(view.base) or (FEED_FORWARD if view.base in activated else None)
                found[view.base] = _kind(program, instruction, number, by_use, found)
        if instruction.workspace is not None:
            found[instruction.workspace] = WORKSPACE
    return {name: found.get(name, OTHER) for name in program.buffers}


def _kind(program: Program, writer: Instruction, number: int, by_use: str | None, found: Mapping[str, str]) -> str:
    """The kind of an instruction's result of that number; `found`: of the buffers written so far."""
    known = WRITES.get(writer.op)
    # A norm may be one of queries or keys alone, an activation never.
    if by_use is not None and (known is None or by_use != FEED_FORWARD):
        return by_use
    if known is not None:
        return known[min(number, len(known) - 1)]
    if writer.op in _LINEAR:
        return PROJECTION
    made_of = [found.get(base, OTHER) for base in _bases(writer.reads()) if base in program.buffers]
    if set(made_of) <= {POSITIONS}:
        return POSITIONS
    if writer.op == _ADD and PROJECTION in made_of:
        return RESIDUAL
    first = next(kind for kind in made_of if kind != POSITIONS)
    return NORM if first == RESIDUAL and writer.op not in _CARRIES else first


def _taken_by_attention(instructions: list[Instruction]) -> dict[str, str]:
    """Buffer -> the kind that attention takes it as, itself or what only prepares it: rope, a norm, a copy."""
    taken: dict[str, set[str]] = defaultdict(set)
    for instruction in reversed(instructions):
        if instruction.op == "dllmc.attention.default":
            for number, kind in _OPERANDS.items():
                for base in _bases(_views(instruction, number)):
                    taken[base].add(kind)
        elif instruction.op not in _ENDS:
            through = set().union(*(taken[view.base] for view in instruction.outputs))
            for base in _bases(_views(instruction, 0)):
                taken[base] |= through
    return {base: next(iter(kinds)) if len(kinds) == 1 else QKV for base, kinds in taken.items() if kinds}


def _views(instruction: Instruction, number: int) -> Iterable[View]:
    """The views in one operand of an instruction."""
    return Instruction(instruction.op, instruction.inputs[number : number + 1], ()).reads()


def _bases(views: Iterable[View]) -> list[str]:
    return list(dict.fromkeys(view.base for view in views))
