"""Counts launches of Triton kernels; and records a GPU's calls, which may not wait for it, to replay them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel is launched inside, by name."""
    from triton.runtime.jit import KernelInterface

    launches: Counter[str] = Counter()
    launch = KernelInterface.__getitem__

    def counting(kernel: Any, grid: tuple[int, ...]) -> Any:
        launches[kernel.fn.__name__] += 1
        return launch(kernel, grid)

    with patch.object(KernelInterface, "__getitem__", counting):
        yield launches


def replayed(run: Callable[[], object], change: Callable[[], object]) -> None:
    """Record a call, which may not wait for the GPU; change what it reads; replay it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        run()
    change()
    graph.replay()
    torch.cuda.synchronize()
