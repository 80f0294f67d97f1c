"""The blocks of memory that a loaded engine owns: an arena of a step's values, the state of its inputs, the KV pool."""

from collections.abc import Mapping, Sequence

import torch

from dllmc.ir.program import Program, Sizes, Tensor, View, aligned


class Memory:
    """Everything that programs' operands live in, allocated once and touched, so that no step allocates.

    Programs of different phases run one at a time: they share the arena and the state, each in its own order, and
    they share caches by name. `weights`: every weight and constant of the programs, by name, dense.
    """

    def __init__(self, programs: Sequence[Program], weights: Mapping[str, torch.Tensor]) -> None:
        self.arena = _block(max(program.arena_bytes or 0 for program in programs))
        self.state = _block(max(program.state_bytes for program in programs))
        self.weights = weights
        largest = max(programs, key=lambda program: program.cache_bytes)
        self.pool = _block(largest.cache_bytes)
        self._cache_offsets = _offsets(largest.caches, largest.maxima)

    def tensor(self, program: Program, name: str, sizes: Sizes) -> torch.Tensor:
        """An input, weight, buffer or cache of a program as it lies in memory, for a step of given sizes.

        `sizes` has the pool's `pages` where the program has caches.
        """
        described = program.tensor(name)
        if name in program.weights:
            return self.weights[name]
        if name in program.caches:
            block, offset = self.pool, self._cache_offsets[name]
        elif name in program.inputs:
            block, offset = self.state, _offsets(program.inputs, program.maxima)[name]
        else:
            assert described.offset is not None
            block, offset = self.arena, described.offset
        size = described.size_bytes(sizes)
        shape = [dim.at(sizes) for dim in described.shape]
        return block[offset : offset + size].view(_dtype(described)).view(shape)

    def view(self, program: Program, operand: View, sizes: Sizes) -> torch.Tensor:
        """An operand's window on its tensor, for a step of given sizes."""
        base = self.tensor(program, operand.base, sizes)
        shape = [dim.at(sizes) for dim in operand.shape]
        strides = [dim.at(sizes) for dim in operand.strides]
        return base.as_strided(shape, strides, base.storage_offset() + operand.offset.at(sizes))


def _block(size_bytes: int) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)


def _offsets(tensors: Mapping[str, Tensor], maxima: Sizes) -> dict[str, int]:
    """Where each begins when they lie one behind the other at their largest."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += aligned(tensor.size_bytes(maxima))
    return offsets


def _dtype(tensor: Tensor) -> torch.dtype:
    found: torch.dtype = getattr(torch, tensor.dtype)
    return found
