"""The blocks of memory that a loaded engine owns: an arena of a step's values, the state of its inputs, the KV pool."""

from collections.abc import Mapping, Sequence
from math import prod

import torch

from dllmc.errors import ProgramError
from dllmc.ir import places
from dllmc.ir.program import DTYPE_BYTES, Program, Sizes, Tensor, View, aligned, dense_strides

LANES = 2
"""Steps that may be under way on a GPU at once: one runs, the next is behind it in line."""


class Memory:
    """Everything that programs' operands live in, allocated once and touched, so that no step allocates.

    Programs of different phases run one at a time: they share the arena and the state, each in its own order, and
    they share caches by name. `weights`: every weight and constant of the programs, by name, dense, on `device`.

    The host writes a step's inputs into `given`: on a CPU that is the state itself, else page-locked memory of the
    host, from which `upload` moves them; of it there are `LANES` blocks, which steps use in turn.
    """

    def __init__(
        self, programs: Sequence[Program], weights: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.weights = weights
        largest = max(programs, key=lambda program: program.cache_bytes)
        self._placed, inputs_from = _placed(largest)
        state_bytes = max(program.state_bytes for program in programs)
        self.arena = Block(max(program.arena_bytes or 0 for program in programs), self.device)
        self.state = Block(state_bytes, self.device)
        self.pool = Block(largest.cache_bytes, self.device)
        self.given: tuple[Block, ...] = (self.state,)
        self._given_from = 0  # which byte of the state the first one of these is
        if self.device.type != "cpu":
            self.set_apart(pinned=True)
        self._caches = _offsets(largest.caches, largest.maxima)
        self._inputs = {program.name: _offsets(program.inputs, program.maxima, inputs_from) for program in programs}

    def tensors(self) -> list[torch.Tensor]:
        """All of it on the device."""
        return [*self.weights.values(), self.arena.bytes, self.state.bytes, self.pool.bytes]

    def set_apart(self, pinned: bool) -> None:
        """Give the host blocks of its own to write into. `pinned`: page-locked."""
        self._given_from = self._placed["places"][1] if self._placed else 0
        size_bytes = self.state.bytes.numel() - self._given_from
        self.given = tuple(Block(size_bytes, pinned=pinned) for _ in range(LANES))

    def tensor(self, program: Program, name: str, sizes: Sizes) -> torch.Tensor:
        """An input, weight, buffer or cache of a program as it lies in memory, for a step of given sizes.

        `sizes` has the pool's `pages` where the program has caches.
        """
        shape = program.tensor(name).shape
        return self.view(program, View(name, shape, dense_strides(shape)), sizes)

    def view(self, program: Program, operand: View, sizes: Sizes) -> torch.Tensor:
        """An operand's window on its tensor, for a step of given sizes."""
        base, start = self._place(program, operand.base)
        return _window(base, start, operand, sizes)

    def given_input(self, program: Program, name: str, sizes: Sizes, lane: int = 0) -> torch.Tensor:
        """Where the host writes an input of a step of given sizes."""
        tensor, offset = program.inputs[name], self._inputs[program.name][name] - self._given_from
        whole = View(name, tensor.shape, dense_strides(tensor.shape))
        return _window(self.given[lane].of(tensor.dtype), offset // DTYPE_BYTES[tensor.dtype], whole, sizes)

    def placed(self, name: str) -> torch.Tensor:
        """One of what `dllmc.ir.places` tells of, at its largest; there where programs are for a GPU."""
        (dtype, shape), offset = self._placed[name]
        return self.state.of(dtype)[offset // DTYPE_BYTES[dtype] :][: prod(shape)].view(shape)

    def given_places(self, lane: int = 0) -> torch.Tensor:
        """Where the host writes the `places` of a step, at their largest."""
        (dtype, shape), offset = self._placed["places"]
        return (
            self.given[lane].of(dtype)[(offset - self._given_from) // DTYPE_BYTES[dtype] :][: prod(shape)].view(shape)
        )

    def upload(self, program: Program, lane: int = 0) -> None:
        """Begin to move what was given to a program, all of it, since that is little, behind the steps so far."""
        target = self.state.bytes[self._given_from : program.state_bytes]
        target.copy_(self.given[lane].bytes[: target.numel()], non_blocking=True)

    def require_in_place(self) -> None:
        """Raise `ProgramError` where a block has moved: its views, and graphs that were recorded, are of old memory."""
        for name, block in (("arena", self.arena), ("state", self.state), ("KV pool", self.pool)):
            if block.moved:
                raise ProgramError(f"the {name} moved: a result did not fit its place in it; load the artifact again")

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
    """Bytes, touched, and views of all of them as other dtypes. `pinned`: page-locked, so that a GPU can copy them."""

    def __init__(self, size_bytes: int, device: torch.device | str = "cpu", pinned: bool = False) -> None:
        self.bytes = torch.zeros(size_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        if self.bytes.device.type == "cpu":
            self.bytes.numpy()  # torch resizes an `out=` of the wrong shape, but no memory that numpy has seen
        self._allocated = self._place
        self._views: dict[str, torch.Tensor] = {}

    @property
    def moved(self) -> bool:
        """Whether torch has resized it, as it does on a GPU for an `out=` that reaches beyond its end."""
        return self._place != self._allocated

    @property
    def _place(self) -> tuple[int, int]:
        storage = self.bytes.untyped_storage()
        return storage.data_ptr(), storage.nbytes()

    def of(self, dtype: str) -> torch.Tensor:
        """All of them, as elements of that dtype."""
        if dtype not in self._views:
            whole = self.bytes.numel() // DTYPE_BYTES[dtype] * DTYPE_BYTES[dtype]
            self._views[dtype] = self.bytes[:whole].view(getattr(torch, dtype))
        return self._views[dtype]


def require_weights(
    programs: Sequence[Program], weights: Mapping[str, torch.Tensor], device: torch.device | str
) -> None:
    """Raise `ProgramError` where a weight is not what programs read: its dtype, its shape, dense, on the device."""
    for program in programs:
        for name, tensor in program.weights.items():
            given, shape = weights.get(name), [dim.at(program.maxima) for dim in tensor.shape]
            fits = given is not None and given.is_contiguous() and given.device == torch.device(device)
            if given is None or not fits or (list(given.shape), _name(given.dtype)) != (shape, tensor.dtype):
                found = "nothing" if given is None else f"{_name(given.dtype)} {list(given.shape)} on {given.device}"
                raise ProgramError(
                    f"weight {name!r}: expected {tensor.dtype} {shape}, dense, on {device}, found {found}"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _window(base: torch.Tensor, start: int, operand: View, sizes: Sizes) -> torch.Tensor:
    shape = [dim.at(sizes) for dim in operand.shape]
    strides = [dim.at(sizes) for dim in operand.strides]
    return base.as_strided(shape, strides, start + operand.offset.at(sizes))


def _placed(program: Program) -> tuple[dict[str, tuple[tuple[str, tuple[int, ...]], int]], int]:
    """Dtype, shape and offset of what is kept of requests, and where it ends; nothing for a CPU's program."""
    found, end = {}, 0
    if program.place_bytes:
        for name, (dtype, shape) in places.shapes(program.maxima).items():
            found[name] = (dtype, shape), end
            end += aligned(DTYPE_BYTES[dtype] * prod(shape))
    return found, end


def _offsets(tensors: Mapping[str, Tensor], maxima: Sizes, end: int = 0) -> dict[str, int]:
    """Where each begins when they lie one behind the other at their largest, from `end` on."""
    offsets = {}
    for name, tensor in tensors.items():
        offsets[name] = end
        end += aligned(tensor.size_bytes(maxima))
    return offsets
