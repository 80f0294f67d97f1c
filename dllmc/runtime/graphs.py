"""Runs a program on a GPU: each shape of a step call by call at first, then as a CUDA graph, one launch for all calls.

Inputs are written into page-locked memory and moved at once, outputs come back into such memory, and one event tells
that they are there. Until then the host is free: the next step may be launched behind one that runs.
`dllmc.runtime.buckets` keeps the shapes few.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from dllmc.errors import ProgramError
from dllmc.ir.program import DTYPE_BYTES, PAGES, Program, Sizes, aligned, element_count
from dllmc.runtime.arena import Block, Memory
from dllmc.runtime.binding import Array, Binding
from dllmc.runtime.executor import Executor, Key, key_of

# Graphs of one program. The driver has memory for each that no plan counts, about a KiB for each kernel.
MAX_GRAPHS = 128
# To record a shape takes as long as many steps. Where all graphs are there, another takes the place of one that has not
# run for so many steps alone: shapes that come by turns are not recorded by turns.
IDLE_STEPS = 10_000

_log = logging.getLogger(__name__)


class Stream(Protocol):
    """What is asked of `dllmc.runtime.cuda.Stream`."""

    def run(self, calls: Callable[[], object]) -> Callable[[], object]: ...
    def record(self, calls: Callable[[], object]) -> Callable[[], object]: ...


Bind = Callable[[Program, Memory, Sizes], Binding]


@dataclass
class _Graph:
    """A shape that is recorded. `binding` keeps what its calls use. `last`: the step in which it ran last."""

    binding: Binding
    replay: Callable[[], object]
    last: int


class Lanes:
    """What steps under way have of the host, by turns: a block that is given, and one that outputs return in."""

    def __init__(self, memory: Memory, programs: Iterable[Program]) -> None:
        size_bytes = max(_output_bytes(program) for program in programs)
        pinned = memory.device.type != "cpu"
        self.returned = [Block(size_bytes, pinned=pinned) for _ in memory.given]
        self._waits: list[Callable[[], object]] = [_nothing] * len(memory.given)
        self._turn = 0

    def free(self) -> int:
        """The lane whose turn it is, once the step that had it is over."""
        self._waits[self._turn]()
        return self._turn

    def next(self) -> int:
        """The same, for a step that is not waited for: the turn is another's then."""
        lane = self.free()
        self._turn = (lane + 1) % len(self._waits)
        return lane

    def busy(self, lane: int, wait: Callable[[], object]) -> None:
        """Say that a lane is used until `wait` returns."""
        self._waits[lane] = wait


class GraphExecutor(Executor):
    """A program over the memory of a GPU. `bind`: what makes its bindings.

    A shape's first two steps are made call by call: the first checks each result, the second is recorded behind it, by
    the thread that has just made the same calls. A shape that comes once costs no recording.
    """

    def __init__(
        self, program: Program, memory: Memory, stream: Stream, lanes: Lanes | None = None, bind: Bind = Binding
    ) -> None:
        super().__init__(program, memory)
        self._stream = stream
        self._lanes = lanes or Lanes(memory, [program])
        self._bind = bind
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._steps = 0
        self._full = False  # whether a shape was found to have no place

    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step, as `Executor.run`. Raises `ProgramError` too where the GPU cannot record the step."""
        return self.launch(sizes, inputs)()

    @torch.inference_mode()
    def launch(
        self, sizes: Sizes, inputs: Mapping[str, Array], before: Callable[[], object] | None = None
    ) -> Callable[[], dict[str, Array]]:
        """Begin a step behind those under way; the result waits for its outputs, which live until the next but one.

        before: made on the GPU's stream ahead of the step. Raises what `run` raises.
        """
        key = key_of(sizes)
        graph = self._graphs.get(key)
        binding = graph.binding if graph else self._bindings.get(key) or self._bind(self.program, self.memory, sizes)
        self.memory.require_in_place()
        lane = self._lanes.next()
        binding.load(inputs, lane)
        self._steps += 1
        outputs: dict[str, Array] = {}

        @torch.inference_mode()
        def step() -> None:
            if before is not None:
                before()
            self.memory.upload(self.program, lane)
            if graph is not None:
                graph.replay()
                graph.last = self._steps
                self._graphs.move_to_end(key)
            else:
                again = key in self._bindings
                self._call(key, binding)
                if again and self._has_place():
                    self._record(key, binding)
            outputs.update(self._read_back(binding, lane))

        wait = self._stream.run(step)
        self._lanes.busy(lane, wait)

        def finish() -> dict[str, Array]:
            wait()
            return outputs

        return finish

    @torch.inference_mode()
    def record(self, sizes: Sizes) -> bool:
        """Record a shape before a step has it; False where it is recorded already, or there is no place.

        The step that runs for it has zeros for inputs: no segment has tokens, and nothing is kept.
        """
        key = key_of(sizes)
        if key in self._graphs or not self._has_place():
            return False
        binding = self._bind(self.program, self.memory, sizes)
        self.memory.require_in_place()
        lane = self._lanes.free()
        self.memory.given[lane].bytes.zero_()

        def step() -> None:
            self.memory.upload(self.program, lane)
            self._call(key, binding)
            self._record(key, binding)

        self._stream.run(step)()
        return True

    def _record(self, key: Key, binding: Binding) -> None:
        try:
            replay = self._stream.record(binding.run)
        except RuntimeError as error:
            raise ProgramError(
                f"program {self.program.name!r}: a step of {key} cannot be recorded as a CUDA graph: {error}; "
                "its operators must neither wait for the GPU nor allocate outside of torch"
            ) from error
        self._bindings.pop(key, None)
        self._graphs[key] = _Graph(binding, replay, self._steps)

    def _has_place(self) -> bool:
        """Whether another shape can be recorded, be it in place of one that long has not run."""
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest = next(iter(self._graphs), None)
        if oldest is None or self._steps - self._graphs[oldest].last < IDLE_STEPS:
            if not self._full:
                _log.warning(
                    "program %r: %d shapes of steps are recorded as CUDA graphs, as many as may be; "
                    "others run call by call, which is slower",
                    self.program.name,
                    len(self._graphs),
                )
            self._full = True
            return False
        del self._graphs[oldest]
        return True

    def _read_back(self, binding: Binding, lane: int) -> dict[str, Array]:
        """Begin to copy the outputs to where the host reads them."""
        found, at = {}, 0
        for name, output in binding.outputs.items():
            place = self._lanes.returned[lane].bytes[at : at + output.nbytes].view(output.dtype).view(output.shape)
            found[name] = place.copy_(output, non_blocking=True).numpy()
            at += aligned(output.nbytes)
        return found


def executors(programs: Mapping[str, Program], memory: Memory, mask_id: int) -> dict[str, Executor]:
    """An executor for each program, on the device where their memory is; a GPU's commits too (`on_device`)."""
    if memory.device.type == "cpu":
        return {name: Executor(program, memory) for name, program in programs.items()}
    from dllmc.runtime.cuda import Stream as CudaStream

    return on_stream(programs, memory, CudaStream(memory.device, memory.tensors()), mask_id)


def on_stream(programs: Mapping[str, Program], memory: Memory, stream: Stream, mask_id: int) -> dict[str, Executor]:
    """Executors of a GPU whose steps pick their rows and commit."""
    from dllmc.runtime.on_device import DecodingBinding

    lanes = Lanes(memory, programs.values())
    bind = partial(DecodingBinding, mask_id=mask_id)
    return {name: GraphExecutor(program, memory, stream, lanes, bind) for name, program in programs.items()}


def _output_bytes(program: Program) -> int:
    """Bytes of all outputs in the largest step, or of what a decoding step returns, which is less."""
    largest = {PAGES: 1, **program.maxima}
    tensors = [(program.tensor(view.base).dtype, view.shape) for view in program.outputs.values()]
    return sum(aligned(DTYPE_BYTES[dtype] * element_count(shape).at(largest)) for dtype, shape in tensors)


def _nothing() -> None:
    """There is no step to wait for."""
