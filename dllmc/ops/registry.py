"""The operators that a program may name: the allow-list of `dllmc.ir.program`.

An operator's `bind` resolves a call once, over fixed memory, to a function of no arguments; the executor then
only calls it. `workspace_bytes` is what a call needs besides its outputs, at the program's largest sizes, on the kind
of device that the program is for; what suffices on "cuda" suffices on a CPU too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops import attention, decode_head, elementwise, facts, glu, guide_rows, keep, linear, norms, rope

POINTWISE = frozenset(map(str, facts.POINTWISE))
"""Names of the operators that work on each element alone."""

Bind = Callable[[Sequence[Any], Sequence[Tensor], Tensor | None], Callable[[], object]]
WorkspaceBytes = Callable[[Sequence[Tensor], str], int]


def on_any(workspace_of: Callable[[Sequence[Tensor]], int]) -> WorkspaceBytes:
    """What a CPU needs, on every device."""
    return lambda tensors, device: workspace_of(tensors)


@dataclass(frozen=True)
class Operator:
    """How a named operator runs. `workspace_bytes` maps a call's tensors, in order, and a kind of device to bytes.

    `options`: the keyword options that `bind` takes, behind the positional operands, in the order of the schema.
    `first_row`: the operand, if any, that tells a call on some rows how many are before them.
    `in_place`: the operands whose memory the first output may be, element for element.
    `updates`: the operand, if any, that the call writes where it is; it is the output.
    `version`: of what a call means. An artifact names it, and is refused where it is another.
    """

    bind: Bind
    workspace_bytes: WorkspaceBytes = lambda tensors, device: 0
    options: tuple[str, ...] = ()
    first_row: int | None = None
    in_place: tuple[int, ...] = ()
    updates: int | None = None
    version: int = 1


OPERATORS: dict[str, Operator] = {
    "copy": Operator(elementwise.bind_copy),
    "aten.embedding.default": Operator(elementwise.bind_embedding),
    "aten.layer_norm.default": Operator(norms.bind_layer_norm, in_place=(0,)),
    "aten.linear.default": Operator(linear.bind, on_any(linear.workspace_of)),
    "aten.rms_norm.default": Operator(norms.bind_torch_rms_norm, on_any(norms.rms_norm_workspace), in_place=(0,)),
    "dllmc.add_layer_norm.default": Operator(norms.bind_add_layer_norm),
    "dllmc.add_rms_norm.default": Operator(norms.bind_add_rms_norm, on_any(norms.add_rms_norm_workspace)),
    "dllmc.attention.default": Operator(attention.bind, attention.workspace_of, first_row=7),
    "dllmc.decode_head.default": Operator(decode_head.bind, decode_head.workspace_of),
    "dllmc.glu.default": Operator(glu.bind, in_place=(0,)),
    "dllmc.guide_rows.default": Operator(guide_rows.bind),
    "dllmc.keep.default": Operator(keep.bind, keep.workspace_of, updates=0),
    "dllmc.rms_norm.default": Operator(norms.bind_rms_norm, on_any(norms.rms_norm_workspace), in_place=(0,)),
    "dllmc.rope.default": Operator(rope.bind, on_any(rope.workspace_of), in_place=(0,)),
    **{
        name: Operator(bind, options=elementwise.OPTIONS.get(name, ()), in_place=(0, 1, 2) if name in POINTWISE else ())
        for name, bind in elementwise.BINDERS.items()
    },
    # copied to the output before the mask is read
    "aten.masked_fill.Scalar": Operator(elementwise.BINDERS["aten.masked_fill.Scalar"], in_place=(0,)),
}


def operator(name: str) -> Operator:
    """The operator of that name. Raises `ProgramError`: a program may name no other."""
    if name not in OPERATORS:
        choices = ", ".join(sorted(OPERATORS))
        raise ProgramError(f"operator {name!r} is not on the allow-list; this version has: {choices}")
    return OPERATORS[name]
