"""A program's calls of one step, bound to an engine's memory as its executor binds them, to be counted and timed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.work import Work, work_of
from dllmc.ir.program import PAGES, Instruction, Program, Sizes
from dllmc.ops.registry import operator
from dllmc.runtime.arena import Memory
from dllmc.runtime.binding import resolved, unrolled

GROUPS = {
    "GEMM": ("aten.linear.default", "aten.matmul.default"),
    "attention": ("dllmc.attention.default",),
    "head": ("dllmc.decode_head.default", "dllmc.guide_rows.default"),
    "keep": ("dllmc.keep.default",),
    "norms, rope, glu": (
        "aten.layer_norm.default",
        "aten.rms_norm.default",
        "dllmc.add_layer_norm.default",
        "dllmc.add_rms_norm.default",
        "dllmc.glu.default",
        "dllmc.rms_norm.default",
        "dllmc.rope.default",
    ),
}
OTHER = "gathers, copies, rest"
NAMES = (*GROUPS, OTHER)


def group_of(op: str) -> str:
    """Which part of a step an operator is."""
    return next((name for name, ops in GROUPS.items() if op in ops), OTHER)


@dataclass(frozen=True)
class BoundCall:
    """A call with its operands as tensors and numbers."""

    op: str
    args: list[Any]
    outs: list[Tensor]
    run: Callable[[], object]

    def work(self) -> Work:
        """What it must do, on the inputs that are loaded."""
        return work_of(self.op, self.args, self.outs)


def bind(program: Program, memory: Memory, sizes: Sizes) -> list[BoundCall]:
    """Every call of a step of these sizes, those of a loop once an iteration."""
    if program.caches:
        sizes = {**sizes, PAGES: program.maxima[PAGES]}
    return [_bound(program, memory, here, instruction) for instruction, here in unrolled(program, sizes)]


def load(program: Program, memory: Memory, sizes: Sizes, inputs: Mapping[str, Any]) -> None:
    """Write a step's inputs, numpy arrays, where the program reads them."""
    for name in program.inputs:
        memory.tensor(program, name, sizes).copy_(torch.from_numpy(inputs[name]))


def _bound(program: Program, memory: Memory, sizes: Sizes, instruction: Instruction) -> BoundCall:
    args = [resolved(program, memory, sizes, operand) for operand in instruction.inputs]
    outs = [memory.view(program, view, sizes) for view in instruction.outputs]
    workspace = None if instruction.workspace is None else memory.tensor(program, instruction.workspace, sizes)
    return BoundCall(instruction.op, args, outs, operator(instruction.op).bind(args, outs, workspace))
