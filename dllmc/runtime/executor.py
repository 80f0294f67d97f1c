"""Runs a program: binds it once per shape of a step to a list of calls over fixed memory, then only calls."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
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
from dllmc.memory.verifier import verify
from dllmc.ops.registry import operator
from dllmc.runtime.arena import Memory

# Bindings kept, least recently used first out: a decode comes back to the same shapes. And calls bound in all of them:
# each holds a few KiB of objects, and a step in small chunks has thousands.
MAX_BINDINGS = 64
MAX_BOUND_CALLS = 1 << 13

Array = np.ndarray[Any, np.dtype[Any]]
_Written = tuple[Instruction, Sizes, list[torch.Tensor]]


class Executor:
    """A program over its memory, which others may share. Raises `ProgramError` for a plan that is unsound."""

    def __init__(self, program: Program, memory: Memory) -> None:
        verify(program)
        self.program = program
        self.memory = memory
        self._bindings: OrderedDict[tuple[int, ...], _Binding] = OrderedDict()

    @torch.inference_mode()
    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step. `inputs`: every input of the program, in its shape for `sizes`. Outputs live until the next step.

        Raises `ProgramError` for sizes beyond the program's maxima, and for an input of another dtype or shape.
        """
        key = tuple(sizes[symbol] for symbol in SYMBOLS)
        binding = self._bindings.get(key) or _Binding(self.program, self.memory, sizes)
        for name, target in binding.inputs.items():
            _load(name, inputs.get(name), target)
        if key in self._bindings:
            for call in binding.calls:
                call()
        else:
            binding.run_first()
            self._bindings[key] = binding
        self._bindings.move_to_end(key)
        while len(self._bindings) > 1 and (len(self._bindings) > MAX_BINDINGS or self._bound_calls() > MAX_BOUND_CALLS):
            self._bindings.popitem(last=False)
        return binding.outputs

    def _bound_calls(self) -> int:
        return sum(len(binding.written) for binding in self._bindings.values())


class _Binding:
    """A program resolved for one shape of a step. Raises `ProgramError` for sizes that were not planned for."""

    def __init__(self, program: Program, memory: Memory, sizes: Sizes) -> None:
        self.program = program
        for symbol in SYMBOLS:
            if not LEAST[symbol] <= sizes[symbol] <= program.maxima[symbol]:
                limits = f"{LEAST[symbol]} to {program.maxima[symbol]} {symbol}"
                raise ProgramError(f"program {program.name!r}: expected {limits} a step, found {sizes[symbol]}")
        if program.caches:
            sizes = {**sizes, PAGES: program.maxima[PAGES]}
        self.inputs: dict[str, Array] = {name: memory.tensor(program, name, sizes).numpy() for name in program.inputs}
        self.outputs: dict[str, Array] = {
            name: memory.view(program, view, sizes).numpy() for name, view in program.outputs.items()
        }
        self.calls: list[Callable[[], object]] = []
        self.written: list[_Written] = []
        self._writes: list[_Written] = []  # of each call
        bound: dict[tuple[int, int], int] = {}  # what is the same in iterations of as many rows is bound once
        binds: list[Callable[[], object]] = []
        for instruction, here in _unrolled(program, sizes):
            key = id(instruction), here.get(CHUNK, 0)
            if key not in bound or _moves(instruction):
                outs = [memory.view(program, view, here) for view in instruction.outputs]
                bound[key] = len(binds)
                binds.append(_bind(program, memory, here, instruction, outs))
                self.written.append((instruction, here, outs))
            self.calls.append(binds[bound[key]])
            self._writes.append(self.written[bound[key]])

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

    def _where(self, instruction: Instruction) -> str:
        index = next(n for n, (call, _) in enumerate(self.program.calls()) if call is instruction)
        return f"program {self.program.name!r}: instruction {index} ({instruction.op})"


def _unrolled(program: Program, sizes: Sizes) -> Iterator[tuple[Instruction, Sizes]]:
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
    args = [_resolve(program, memory, sizes, operand) for operand in instruction.inputs]
    workspace = None if instruction.workspace is None else memory.tensor(program, instruction.workspace, sizes)
    return operator(instruction.op).bind(args, outs, workspace)


def _resolve(program: Program, memory: Memory, sizes: Sizes, operand: Operand) -> Any:
    if isinstance(operand, View):
        return memory.view(program, operand, sizes)
    if isinstance(operand, Affine):
        return operand.at(sizes)
    if isinstance(operand, DType):
        return getattr(torch, operand.name)
    if isinstance(operand, tuple):
        return [_resolve(program, memory, sizes, item) for item in operand]
    return operand
