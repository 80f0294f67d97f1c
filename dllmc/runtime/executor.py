"""Runs a program: binds it once per shape of a step to a list of calls over fixed memory, then only calls it.

On a GPU `dllmc.runtime.graphs` runs it instead, which records the calls.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch

from dllmc.ir.program import SYMBOLS, Program, Sizes
from dllmc.memory.verifier import verify
from dllmc.runtime.arena import Memory
from dllmc.runtime.binding import Array, Binding

# Bindings kept, least recently used first out: a decode comes back to the same shapes. And calls bound in all of them:
# each holds a few KiB of objects, and a step in small chunks has thousands.
MAX_BINDINGS = 64
MAX_BOUND_CALLS = 1 << 13

Key = tuple[int, ...]


class Executor:
    """A program over its memory, which others may share. Raises `ProgramError` for a plan that is unsound."""

    def __init__(self, program: Program, memory: Memory) -> None:
        verify(program)
        self.program = program
        self.memory = memory
        self._bindings: OrderedDict[Key, Binding] = OrderedDict()

    @torch.inference_mode()
    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step. `inputs`: every input of the program, in its shape for `sizes`. Outputs live until the next step.

        Raises `ProgramError` for sizes beyond the program's maxima, and for an input of another dtype or shape.
        """
        key = key_of(sizes)
        binding = self._bindings.get(key) or Binding(self.program, self.memory, sizes)
        binding.load(inputs)
        self._call(key, binding)
        return {name: output.numpy() for name, output in binding.outputs.items()}

    def _call(self, key: Key, binding: Binding) -> None:
        """Make a binding's calls, with checks where it is new, and keep it."""
        if key in self._bindings:
            binding.run()
        else:
            binding.run_first()
            self._bindings[key] = binding
        self._bindings.move_to_end(key)
        while len(self._bindings) > 1 and (len(self._bindings) > MAX_BINDINGS or self._bound_calls() > MAX_BOUND_CALLS):
            self._bindings.popitem(last=False)

    def _bound_calls(self) -> int:
        return sum(len(binding.written) for binding in self._bindings.values())


def key_of(sizes: Sizes) -> Key:
    """A shape of a step, to look it up by."""
    return tuple(sizes[symbol] for symbol in SYMBOLS)
