"""The blocks of memory that a loaded engine owns: an arena of a step's values, the state of its inputs, the KV pool."""

from collections.abc import Mapping, Sequence

import torch

from dllmc.ir.program import DTYPE_BYTES, Program, Sizes, Tensor, View, aligned, dense_strides


class Memory:
    """Everything that programs' operands live in, allocated once and touched, so that no step allocates.

    Programs of different phases run one at a time: they share the arena and the state, each in its own order, and
    they share caches by name. `weights`: every weight and constant of the programs, by name, dense.
    """

    def __init__(self, programs: Sequence[Program], weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = weights
        largest = max(programs, key=lambda program: program.cache_bytes)
        self.arena = Block(max(program.arena_bytes or 0 for program in programs))
        self.state = Block(max(program.state_bytes for program in programs))
        self.pool = Block(largest.cache_bytes)
        self._caches = _offsets(largest.caches, largest.maxima)
        self._inputs = {program.name: _offsets(program.inputs, program.maxima) for program in programs}

    def tensor(self, program: Program, name: str, sizes: Sizes) -> torch.Tensor:
        """An input, weight, buffer or cache of a program as it lies in memory, for a step of given sizes.

        `sizes` has the pool's `pages` where the program has caches.
        """
        shape = program.tensor(name).shape
        return self.view(program, View(name, shape, dense_strides(shape)), sizes)

    def view(self, program: Program, operand: View, sizes: Sizes) -> torch.Tensor:
        """An operand's window on its tensor, for a step of given sizes."""
        base, start = self._place(program, operand.base)
        shape = [dim.at(sizes) for dim in operand.shape]
        strides = [dim.at(sizes) for dim in operand.strides]
        return base.as_strided(shape, strides, start + operand.offset.at(sizes))

    def _place(self, program: Program, name: str) -> tuple[torch.Tensor, int]:
        """Memory of a tensor's dtype, and where the tensor begins in it, in elements."""
        if name in program.weights:
            return self.weights[name], int(self.weights[name].storage_offset())
        tensor = program.tensor(name)
        if name in program.caches:
            block, offset = self.pool, self._caches[name]
        elif name in program.inputs:
            block, offset = self.state, self._inputs[program.name][name]
        else:
            assert tensor.offset is not None
            block, offset = self.arena, tensor.offset
        return block.of(tensor.dtype), offset // DTYPE_BYTES[tensor.dtype]


class Block:
    """Bytes, touched, and views of all of them as other dtypes."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = torch.zeros(size_bytes, dtype=torch.uint8)
        self.bytes.numpy()  # torch resizes an `out=` of the wrong shape, but no memory that numpy has seen
        self._views: dict[str, torch.Tensor] = {}

    def of(self, dtype: str) -> torch.Tensor:
        """All of them, as elements of that dtype."""
        if dtype not in self._views:
            whole = self.bytes.numel() // DTYPE_BYTES[dtype] * DTYPE_BYTES[dtype]
            self._views[dtype] = self.bytes[:whole].view(getattr(torch, dtype))
        return self._views[dtype]


def _offsets(tensors: Mapping[str, Tensor], maxima: Sizes) -> dict[str, int]:
    """Where each begins when they lie one behind the other at their largest."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += aligned(tensor.size_bytes(maxima))
    return offsets
