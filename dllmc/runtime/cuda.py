"""The stream of a GPU on which an engine's steps run, one after the other, and the graphs that are recorded there."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


class Stream:
    """A stream of its own, so that what libraries hold for each stream is there before anything is recorded.

    Its graphs share one pool for what their calls allocate: they run in turn, and nothing there outlives a step.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # weights and blocks were made on other streams
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def active(self) -> AbstractContextManager[object]:
        """Calls within are made on this stream, whatever thread makes them."""
        return torch.cuda.stream(self._stream)

    def record(self, run: Callable[[], object]) -> Callable[[], object]:
        """Record calls, which have been made before by this thread, without making them; the result makes them."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU for something else meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def host(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory, which the GPU writes without the host waiting."""
        return torch.empty(elements, dtype=dtype, pin_memory=True)

    def finish(self) -> None:
        """Wait for all calls so far. Other threads of Python go on."""
        self._done.record(self._stream)
        self._done.synchronize()
