"""A step whose rows the GPU picks and whose choices it commits: `dllmc.ops.kernels.commit` around a program's calls.

The host keeps the table (`dllmc.runtime.table`); of it the GPU knows each request's tokens, from when it has a place.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from dllmc.ir.interface import INPUTS
from dllmc.ir.program import Program, Sizes
from dllmc.ops.kernels import commit as kernels
from dllmc.runtime.arena import Memory
from dllmc.runtime.binding import Binding
from dllmc.runtime.table import IntArray, Table


class DecodingBinding(Binding):
    """A program between the picking of its rows and the commit of what it predicts, for one shape of a step.

    Beside the inputs of the program it is given `places`; its only output is `committed` (`dllmc.ir.places`).
    """

    made_here = kernels.PICKED

    def __init__(self, program: Program, memory: Memory, sizes: Sizes, mask_id: int) -> None:
        super().__init__(program, memory, sizes)
        segments, rows = sizes["segments"], sizes["rows"]
        for lane, given in enumerate(self.inputs):
            given["places"] = memory.given_places(lane)[:segments].numpy()
        places = memory.placed("places")[:segments]
        kept = places, memory.placed("sequences"), memory.placed("counts")
        inputs = {
            name: memory.tensor(program, name, sizes) if name in program.inputs else _unread(name, sizes, memory.device)
            for name in ("token_ids", *kernels.PICKED)
        }
        committed = memory.placed("committed").view(-1)[: 2 * rows].view(2, rows)  # dense, to be copied at once
        outputs, self.outputs = self.outputs, {"committed": committed}
        self._pick: Callable[[], None] = partial(kernels.select, *kept, inputs, mask_id)
        self._commit: Callable[[], None] = partial(kernels.commit, *kept, inputs["row_position"], outputs, committed)

    def run(self) -> None:
        self._pick()
        super().run()
        self._commit()

    def run_first(self) -> None:
        self._pick()
        super().run_first()
        self._commit()


def unknown(table: Table, rows: IntArray) -> dict[int, npt.NDArray[np.int32]]:
    """What a GPU must be told of rows before their step, once: a part of `sequences` [2, length] by row."""
    found = {}
    for row in rows[table.fresh[rows]].tolist():
        length = int(table.length[row])
        tokens = np.where(table.masked[row, :length], -1, table.token_ids[row, :length])
        found[row] = np.stack((tokens, table.reference[row, :length])).astype(np.int32)
    table.fresh[rows] = False
    return found


def tell(memory: Memory, parts: dict[int, npt.NDArray[np.int32]]) -> None:
    """Move what is `unknown` to the GPU, which waits for the steps before."""
    sequences = memory.placed("sequences")
    for row, part in parts.items():
        for side, values in enumerate(torch.from_numpy(part)):
            sequences[row, side, : len(values)].copy_(values)


def _unread(name: str, sizes: Sizes, device: torch.device) -> torch.Tensor:
    """A place for an input that the program does without."""
    dtype, shape = INPUTS[name]
    return torch.empty([dim.at(sizes) for dim in shape], dtype=getattr(torch, dtype), device=device)
