"""A step whose rows the GPU picks and whose choices it commits: `dllmc.ops.kernels.commit` around a program's calls."""

from collections.abc import Callable
from functools import partial

from dllmc.ir.program import Program, Sizes
from dllmc.ops.kernels import commit as kernels
from dllmc.runtime.arena import Memory
from dllmc.runtime.binding import Binding


class DecodingBinding(Binding):
    """A program between the picking of its rows and the commit of what it predicts, for one shape of a step.

    Beside the inputs of the program it is given `places`; its only output is `committed` (`dllmc.ir.places`).
    """

    made_here = kernels.PICKED

    def __init__(self, program: Program, memory: Memory, sizes: Sizes, mask_id: int) -> None:
        super().__init__(program, memory, sizes)
        segments, rows, guided = sizes["segments"], sizes["rows"], sizes["guided"]
        for lane, given in enumerate(self.inputs):
            given["places"] = memory.given_places(lane)[:segments].numpy()
        places = memory.placed("places")[:segments]
        kept = places, memory.placed("sequences"), memory.placed("counts")
        wanted = ("token_ids", *kernels.PICKED)
        inputs = {name: memory.tensor(program, name, sizes) for name in wanted if name in program.inputs}
        inputs = dict.fromkeys(wanted, memory.placed("unread")) | inputs
        committed = memory.placed("committed").view(-1)[: 2 * rows].view(2, rows)  # dense, to be copied at once
        outputs, self.outputs = self.outputs, {"committed": committed}
        self._pick: Callable[[], None] = partial(kernels.select, *kept, inputs, rows, guided, mask_id)
        self._commit: Callable[[], None] = partial(kernels.commit, *kept, inputs["row_position"], outputs, committed)

    def run(self) -> None:
        self._pick()
        super().run()
        self._commit()

    def run_first(self) -> None:
        self._pick()
        super().run_first()
        self._commit()
