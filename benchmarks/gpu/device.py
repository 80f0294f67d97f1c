"""A device's clock, its memory, and its two ceilings: the rates that products and copies reach on it.

On a GPU, time is that between two of its own events. A short call is captured some times in a row in a graph, whose
replays are timed, so that the host's launches are not. Calls take turns over several sets of inputs, which together
are larger than the caches. On a CPU the wall clock stands in, to try the benchmark itself.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]

CACHE_BYTES = 128 << 20
"""More than the caches of any GPU hold."""

SHORT_S = 2e-4
"""Calls that take less are captured in graphs, `IN_GRAPH` in a row."""

IN_GRAPH = 20
REPEATS = 15
MOST_S = 0.6
"""What the timed repeats of one call may take together."""


class Timing(NamedTuple):
    """Median seconds of a call; the middle half's spread as a part of it; "events", "graph" or "wall clock"."""

    seconds: float
    spread: float
    by: str


def slug(device: torch.device) -> str:
    """The device's name as a file is called."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def facts(device: torch.device) -> dict[str, Any]:
    """What of the device bears on figures."""
    if device.type != "cuda":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that tensors took since `release`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def sets_for(size_bytes: int) -> int:
    """How many sets of inputs of that size calls should take turns over, so that none is found in a cache."""
    return max(2, min(8, -(-CACHE_BYTES // max(size_bytes, 1))))


def timed(calls: Sequence[Call], device: torch.device, repeats: int = REPEATS, in_graph: bool = True) -> Timing:
    """How long one of these calls takes; they do the same on different memory. Each is run before any is timed.

    in_graph: whether short calls may be captured, which calls that launch a graph of their own may not.
    """
    for call in calls:
        call()
    synchronize(device)
    if device.type != "cuda":
        return _spread([_wall(calls[i % len(calls)]) for i in range(min(repeats, 5))], "wall clock")
    rough = _events([calls[i % len(calls)] for i in range(3)])
    seconds = statistics.median(rough)
    if in_graph and seconds < SHORT_S:
        return _by_graph(calls, repeats)
    count = max(3, min(repeats, int(MOST_S / seconds)))
    return _spread(_events([calls[i % len(calls)] for i in range(count)]), "events")


def _wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events(calls: Sequence[Call]) -> list[float]:
    """Seconds of each of these calls."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]


def _by_graph(calls: Sequence[Call], repeats: int) -> Timing:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(IN_GRAPH):
            calls[i % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return _spread([seconds / IN_GRAPH for seconds in _events([graph.replay] * repeats)], "graph")


def _spread(seconds: list[float], by: str) -> Timing:
    median = statistics.median(seconds)
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    return Timing(median, (quarters[2] - quarters[0]) / median, by)


class Ceilings(NamedTuple):
    """Operations a second of a large product on random data; bytes a second, read and written, of a large copy."""

    flops_per_s: float
    bytes_per_s: float


def ceilings(device: torch.device, small: bool) -> Ceilings:
    """Measure both."""
    size, count = (256, 1 << 22) if small else (8192, 1 << 32)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = timed([lambda: torch.mm(a, b, out=out)], device, repeats=30)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed([lambda: target.copy_(source)], device, repeats=30)
    return Ceilings(2 * size**3 / product.seconds, 2 * count / copy.seconds)


def error_of(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; not a number where either has one."""
    wide, reference = found.double(), expected.double()
    return float((wide - reference).norm() / reference.norm().clamp_min(1e-300))
