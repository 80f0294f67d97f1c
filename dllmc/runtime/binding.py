"""A program bound to one shape of a step: a list of calls over fixed memory."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dllmc.errors import ProgramError
from dllmc.ir.program import (
    CHUNK,
    LEAST,
    PAGES,
    START,
    SYMBOLS,
    Affine,
    DType,
    ForRows,
    Instruction,
    Operand,
    Program,
    Sizes,
    View,
)
from dllmc.ops.registry import operator
from dllmc.runtime.arena import Memory

Array = np.ndarray[Any, np.dtype[Any]]
_Written = tuple[Instruction, Sizes, list[torch.Tensor]]


class Binding:
    """A program resolved for one shape of a step: calls over memory, where inputs are written, where outputs lie.

    Raises `ProgramError` for sizes that were not planned for.
    """

    made_here: Collection[str] = ()
    """Inputs that no one gives, because the binding makes them itself."""

    def __init__(self, program: Program, memory: Memory, sizes: Sizes) -> None:
        self.program = program
        self._memory = memory
        for symbol in SYMBOLS:
            if not LEAST[symbol] <= sizes[symbol] <= program.maxima[symbol]:
                limits = f"{LEAST[symbol]} to {program.maxima[symbol]} {symbol}"
                raise ProgramError(f"program {program.name!r}: expected {limits} a step, found {sizes[symbol]}")
        if program.caches:
            sizes = {**sizes, PAGES: program.maxima[PAGES]}
        given = [name for name in program.inputs if name not in self.made_here]
        self.inputs = [
            {name: memory.given_input(program, name, sizes, lane).numpy() for name in given}
            for lane in range(len(memory.given))
        ]
        self.outputs = {name: memory.view(program, view, sizes) for name, view in program.outputs.items()}
        self.calls: list[Callable[[], object]] = []
        self.written: list[_Written] = []
        self._writes: list[_Written] = []  # of each call
        bound: dict[tuple[int, int], int] = {}  # what is the same in iterations of as many rows is bound once
        binds: list[Callable[[], object]] = []
        for instruction, here in unrolled(program, sizes):
            key = id(instruction), here.get(CHUNK, 0)
            if key not in bound or _moves(instruction):
                outs = [memory.view(program, view, here) for view in instruction.outputs]
                bound[key] = len(binds)
                binds.append(_bind(program, memory, here, instruction, outs))
                self.written.append((instruction, here, outs))
            self.calls.append(binds[bound[key]])
            self._writes.append(self.written[bound[key]])

    def run(self) -> None:
        """Make the calls, in order."""
        for call in self.calls:
            call()

    def run_first(self) -> None:
        """Run, and check each result: torch resizes an `out=` of the wrong shape, and then writes beyond it."""
        for call, (instruction, sizes, outs) in zip(self.calls, self._writes, strict=True):
            try:
                call()
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                raise ProgramError(f"{self._where(instruction)}: {error}") from error
            for view, out in zip(instruction.outputs, outs, strict=True):
                planned = [dim.at(sizes) for dim in view.shape]
                if list(out.shape) != planned:
                    found = f"{view.base!r} has shape {planned}, its result {list(out.shape)}"
                    raise ProgramError(f"{self._where(instruction)}: {found}")
        self._memory.require_in_place()

    def load(self, inputs: Mapping[str, Array], lane: int = 0) -> None:
        """Write a step's inputs where they are given. Raises `ProgramError` for one of another dtype or shape."""
        for name, target in self.inputs[lane].items():
            _load(name, inputs.get(name), target)

    def _where(self, instruction: Instruction) -> str:
        index = next(n for n, (call, _) in enumerate(self.program.calls()) if call is instruction)
        return f"program {self.program.name!r}: instruction {index} ({instruction.op})"


def unrolled(program: Program, sizes: Sizes) -> Iterator[tuple[Instruction, Sizes]]:
    """Every call of a step, those in a `ForRows` once an iteration, with the sizes that hold there."""
    for item in program.instructions:
        if isinstance(item, ForRows):
            for here in program.iterations(item, sizes):
                yield from ((instruction, here) for instruction in item.body)
        else:
            yield item, sizes


def _moves(instruction: Instruction) -> bool:
    """Whether a call depends on which iteration it is in, and not on how many rows that has alone."""
    views = (*instruction.reads(), *instruction.outputs)
    numbers = [operand for operand in instruction.inputs if isinstance(operand, Affine)]
    return any(number.of(START) for number in (*numbers, *(view.offset for view in views)))


def _load(name: str, given: Array | None, target: Array) -> None:
    if given is None or given.dtype != target.dtype or given.shape != target.shape:
        found = "nothing" if given is None else f"{given.dtype} {list(given.shape)}"
        raise ProgramError(f"input {name!r}: expected {target.dtype} {list(target.shape)}, found {found}")
    np.copyto(target, given)


def _bind(
    program: Program, memory: Memory, sizes: Sizes, instruction: Instruction, outs: list[torch.Tensor]
) -> Callable[[], object]:
    args = [resolved(program, memory, sizes, operand) for operand in instruction.inputs]
    workspace = None if instruction.workspace is None else memory.tensor(program, instruction.workspace, sizes)
    return operator(instruction.op).bind(args, outs, workspace)


def resolved(program: Program, memory: Memory, sizes: Sizes, operand: Operand) -> Any:
    """What an operator is given for an operand, in a step of given sizes."""
    if isinstance(operand, View):
        return memory.view(program, operand, sizes)
    if isinstance(operand, Affine):
        return operand.at(sizes)
    if isinstance(operand, DType):
        return getattr(torch, operand.name)
    if isinstance(operand, tuple):
        return [resolved(program, memory, sizes, item) for item in operand]
    return operand
