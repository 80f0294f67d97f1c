"""What a planned program's memory does over a step: the bytes alive at each instruction, and the layers' stretches."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllmc.ir.program import CHUNK, ForRows, Instruction, Program, aligned

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class Placed:
    """A buffer with its plan: bytes `[offset, offset + size_bytes)` of the arena, in instructions `[start, stop)`."""

    name: str
    start: int
    stop: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Stretch:
    """Consecutive instructions `[start, stop)`, and what they have in common."""

    name: str
    start: int
    stop: int


def placed(program: Program) -> list[Placed]:
    """The buffers that have a plan, in the order in which they are written; sizes as the planner counts them."""
    found = [
        Placed(name, *buffer.lifetime, buffer.offset, aligned(buffer.size_bytes(program.maxima)))
        for name, buffer in program.buffers.items()
        if buffer.lifetime is not None and buffer.offset is not None
    ]
    return sorted(found, key=lambda b: b.start)


def live_bytes(program: Program, kinds: Mapping[str, str]) -> dict[str, NDArray[np.int64]]:
    """Kind -> bytes of it that are alive at each instruction: [instructions]. `kinds`: of each buffer."""
    count = sum(1 for _ in program.calls())
    changes = {kind: np.zeros(count + 1, np.int64) for kind in kinds.values()}
    for buffer in placed(program):
        changes[kinds[buffer.name]][buffer.start] += buffer.size_bytes
        changes[kinds[buffer.name]][buffer.stop] -= buffer.size_bytes
    return {kind: np.cumsum(change)[:-1] for kind, change in changes.items()}


def layers(program: Program) -> list[Stretch]:
    """The stretches of repeated layers, `model.layers.3` say, told from the weights that instructions read.

    One that reads none belongs to where the one before it does; one that reads another weight is outside of layers.
    """
    return [stretch for stretch in _stretches(_layer_of_each(program)) if stretch.name]


def loops(program: Program) -> list[Stretch]:
    """The stretches that run for one chunk of rows after another, named by how many rows of what."""
    found, index = [], 0
    for item in program.instructions:
        length = len(item.body) if isinstance(item, ForRows) else 1
        if isinstance(item, ForRows):
            found.append(Stretch(f"{program.maxima[CHUNK]} of {item.extent}", index, index + length))
        index += length
    return found


def _layer_of_each(program: Program) -> Iterator[str]:
    layer = ""
    for instruction, _ in program.calls():
        if (read := _weights(program, instruction)) is not None:
            match = _LAYER.match(read)
            layer = match[1] if match else ""
        yield layer


def _weights(program: Program, instruction: Instruction) -> str | None:
    """The first weight that an instruction reads; constants are of no layer."""
    names = (view.base for view in instruction.reads() if view.base in program.weights)
    return next((name for name in names if not name.startswith("constant.")), None)


def _stretches(names: Iterator[str]) -> list[Stretch]:
    found: list[Stretch] = []
    for index, name in enumerate(names):
        if found and found[-1].name == name:
            found[-1] = Stretch(name, found[-1].start, index + 1)
        else:
            found.append(Stretch(name, index, index + 1))
    return found
