"""The stream of a GPU on which an engine's steps run, one after the other, and the graphs that are recorded there."""

from collections.abc import Callable, Iterable

import torch


class Stream:
    """A stream of its own, so that what libraries hold for each stream is there before anything is recorded.

    Its graphs share one pool for what their calls allocate: they run in turn, and nothing there outlives a step.
    """

    def __init__(self, device: torch.device, tensors: Iterable[torch.Tensor]) -> None:
        """tensors: what its calls use, on that device; what is freed of it is given to no one else before they end."""
        torch.cuda.synchronize(device)  # weights and blocks were made on other streams
        self._stream = torch.cuda.Stream(device)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, calls: Callable[[], object]) -> Callable[[], object]:
        """Make calls on this stream, behind all before; the result waits for them while other threads go on."""
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            calls()
            done.record(self._stream)
        return done.synchronize

    def record(self, calls: Callable[[], object]) -> Callable[[], object]:
        """Record calls, which have been made before by this thread, without making them; the result makes them."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU for something else meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            calls()
        return graph.replay
