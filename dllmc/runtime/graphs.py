"""Runs a program on a GPU: each shape of a step call by call at first, then as a CUDA graph, one launch for all calls.

Inputs are written into page-locked memory and moved at once, outputs come back into such memory, and one event tells
that they are there. `dllmc.runtime.buckets` keeps the shapes few.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from dllmc.errors import ProgramError
from dllmc.ir.program import PAGES, Program, Sizes
from dllmc.runtime.arena import Memory
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

    def active(self) -> AbstractContextManager[object]: ...
    def record(self, run: Callable[[], object]) -> Callable[[], object]: ...
    def host(self, elements: int, dtype: torch.dtype) -> torch.Tensor: ...
    def finish(self) -> None: ...


@dataclass
class _Graph:
    """A shape that is recorded. `binding` keeps what its calls use. `last`: the step in which it ran last."""

    binding: Binding
    replay: Callable[[], object]
    last: int


class GraphExecutor(Executor):
    """A program over the memory of a GPU.

    A shape's first two steps are made call by call: the first checks each result, the second is recorded behind it, by
    the thread that has just made the same calls. A shape that comes once costs no recording.
    """

    def __init__(self, program: Program, memory: Memory, stream: Stream) -> None:
        super().__init__(program, memory)
        self._stream = stream
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._steps = 0
        self._full = False  # whether a shape was found to have no place
        largest = {PAGES: 1, **program.maxima}
        self._outputs = {
            name: stream.host(
                prod(dim.at(largest) for dim in view.shape), getattr(torch, program.tensor(view.base).dtype)
            )
            for name, view in program.outputs.items()
        }

    @torch.inference_mode()
    def run(self, sizes: Sizes, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One step, as `Executor.run`. Raises `ProgramError` too where the GPU cannot record the step."""
        key = key_of(sizes)
        graph = self._graphs.get(key)
        binding = graph.binding if graph else self._bindings.get(key) or Binding(self.program, self.memory, sizes)
        self.memory.require_in_place()
        binding.load(inputs)
        self._steps += 1
        with self._stream.active():
            self.memory.upload(self.program)
            if graph is not None:
                graph.replay()
                graph.last = self._steps
                self._graphs.move_to_end(key)
            else:
                again = key in self._bindings
                self._call(key, binding)
                if again and self._has_place():
                    self._record(key, binding)
            outputs = self._read_back(binding)
        self._stream.finish()
        return outputs

    @torch.inference_mode()
    def record(self, sizes: Sizes) -> bool:
        """Record a shape before a step has it; False where it is recorded already, or there is no place.

        The step that runs for it has zeros for inputs: no segment has tokens, and nothing is kept.
        """
        key = key_of(sizes)
        if key in self._graphs or not self._has_place():
            return False
        binding = Binding(self.program, self.memory, sizes)
        self.memory.require_in_place()
        self.memory.given.bytes.zero_()
        with self._stream.active():
            self.memory.upload(self.program)
            self._call(key, binding)
            self._record(key, binding)
        self._stream.finish()
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

    def _read_back(self, binding: Binding) -> dict[str, Array]:
        """Begin to copy the outputs to where the host reads them."""
        found = {}
        for name, output in binding.outputs.items():
            place = self._outputs[name][: output.numel()].view(output.shape)
            found[name] = place.copy_(output, non_blocking=True).numpy()
        return found


def executors(programs: Mapping[str, Program], memory: Memory) -> dict[str, Executor]:
    """An executor for each program, on the device where their memory is."""
    if memory.device.type == "cpu":
        return {name: Executor(program, memory) for name, program in programs.items()}
    from dllmc.runtime.cuda import Stream as CudaStream

    stream = CudaStream(memory.device)
    return {name: GraphExecutor(program, memory, stream) for name, program in programs.items()}
