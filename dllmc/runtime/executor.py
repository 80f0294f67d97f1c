"""Runs a program: binds it once per shape of a step to a list of calls over fixed memory, then only calls."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dllmc.ir.program import SYMBOLS, DType, Instruction, Operand, Program, Sizes, View
from dllmc.memory.verifier import verify
from dllmc.ops.registry import operator
from dllmc.runtime.arena import Memory

# Bindings kept, least recently used first out: a decode comes back to the same shapes.
MAX_BINDINGS = 64

Array = np.ndarray[Any, np.dtype[Any]]


class Executor:
    """A program over its memory. `weights` as in `Memory`. Raises `ProgramError` for a plan that is unsound."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor]) -> None:
        verify(program)
        self.program = program
        self.memory = Memory(program, weights)
        self._bindings: OrderedDict[tuple[int, ...], _Binding] = OrderedDict()

    @torch.inference_mode()
    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step. `inputs`: every input of the program, in its shape for `sizes`. Outputs live until the next step."""
        key = tuple(sizes[symbol] for symbol in SYMBOLS)
        binding = self._bindings.pop(key, None) or _Binding(self.memory, sizes)
        self._bindings[key] = binding
        if len(self._bindings) > MAX_BINDINGS:
            self._bindings.popitem(last=False)
        for name, target in binding.inputs.items():
            np.copyto(target, inputs[name], casting="no")
        for call in binding.calls:
            call()
        return binding.outputs


class _Binding:
    """A program resolved for one shape of a step."""

    def __init__(self, memory: Memory, sizes: Sizes) -> None:
        program = memory.program
        self.inputs: dict[str, Array] = {name: memory.tensor(name, sizes).numpy() for name in program.inputs}
        self.outputs: dict[str, Array] = {n: memory.view(v, sizes).numpy() for n, v in program.outputs.items()}
        self.calls = [_bind(memory, sizes, instruction) for instruction in program.instructions]


def _bind(memory: Memory, sizes: Sizes, instruction: Instruction) -> Callable[[], object]:
    args = [_resolve(memory, sizes, operand) for operand in instruction.inputs]
    outs = [memory.view(view, sizes) for view in instruction.outputs]
    workspace = None if instruction.workspace is None else memory.tensor(instruction.workspace, sizes)
    return operator(instruction.op).bind(args, outs, workspace)


def _resolve(memory: Memory, sizes: Sizes, operand: Operand) -> Any:
    if isinstance(operand, View):
        return memory.view(operand, sizes)
    if isinstance(operand, DType):
        return getattr(torch, operand.name)
    if isinstance(operand, tuple):
        return [_resolve(memory, sizes, item) for item in operand]
    return operand
