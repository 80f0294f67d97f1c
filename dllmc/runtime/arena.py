"""The two blocks of memory that a loaded engine owns: the arena of a step's values, and the state of its inputs."""

from collections.abc import Mapping

import torch

from dllmc.ir.program import Program, Sizes, Tensor, View, aligned


class Memory:
    """Everything a program's operands live in, allocated once and touched, so that no step allocates.

    `weights`: every weight and constant of the program, by name, dense.
    """

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor]) -> None:
        assert program.arena_bytes is not None
        self.program = program
        self.arena = torch.zeros(program.arena_bytes, dtype=torch.uint8)
        self.state = torch.zeros(program.state_bytes, dtype=torch.uint8)
        self.weights = weights
        self._state_offsets: dict[str, int] = {}
        offset = 0
        for name, tensor in program.inputs.items():
            self._state_offsets[name] = offset
            offset += aligned(tensor.size_bytes(program.maxima))

    def tensor(self, name: str, sizes: Sizes) -> torch.Tensor:
        """An input, weight or buffer as it lies in memory, for a step of given sizes."""
        described = self.program.tensor(name)
        if name in self.program.weights:
            return self.weights[name]
        if name in self._state_offsets:
            block, offset = self.state, self._state_offsets[name]
        else:
            assert described.offset is not None
            block, offset = self.arena, described.offset
        size = described.size_bytes(sizes)
        shape = [dim.at(sizes) for dim in described.shape]
        return block[offset : offset + size].view(_dtype(described)).view(shape)

    def view(self, operand: View, sizes: Sizes) -> torch.Tensor:
        """An operand's window on its tensor, for a step of given sizes."""
        base = self.tensor(operand.base, sizes)
        shape = [dim.at(sizes) for dim in operand.shape]
        strides = [dim.at(sizes) for dim in operand.strides]
        return base.as_strided(shape, strides, base.storage_offset() + operand.offset.at(sizes))


def _dtype(tensor: Tensor) -> torch.dtype:
    found: torch.dtype = getattr(torch, tensor.dtype)
    return found
