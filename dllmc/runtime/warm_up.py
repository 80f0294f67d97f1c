"""Which shapes of steps a workload has, so that they can be recorded before it begins."""

from collections.abc import Collection, Iterator

from dllmc.ir.program import Sizes
from dllmc.runtime.buckets import Buckets
from dllmc.runtime.request import RequestState


def shapes(
    like: RequestState, programs: Collection[str], main: str, buckets: Buckets
) -> list[tuple[str, dict[str, int]]]:
    """Program and shape of every step of requests that are all like one, and all in one phase; the largest first.

    As many as fit a step, and each number below, with a block that is masked or has one position left. A phase that is
    not among the `programs` is run by `main`.
    """
    found = {
        (phase if phase in programs else main, tuple(buckets.padded(sizes).items()))
        for phase, tokens, active in _phases(like)
        for sizes in _steps(like, tokens, active, buckets)
    }
    return [(phase, dict(sizes)) for phase, sizes in sorted(found, key=lambda one: one[1], reverse=True)]


def _phases(like: RequestState) -> Iterator[tuple[str, int, int]]:
    """Phases that a block goes through: the name, and tokens and active tokens of one side."""
    if like.cache.mode == "none" or like.cache.delay:
        yield "dense", like.length, 0
    if like.cache.mode != "none":
        yield "refresh", like.length, like.longest_span
        yield "reuse", like.longest_span, 0


def _steps(like: RequestState, tokens: int, active: int, buckets: Buckets) -> Iterator[Sizes]:
    """The least and the most rows of each number of requests, and every choice between."""
    most, sides = buckets.maxima, like.sides
    for requests in range(1, most["segments"] // sides + 1):
        sizes = {"tokens": requests * sides * tokens, "active": requests * sides * active}
        sizes["segments"] = requests * sides
        if any(sizes[size] > most[size] for size in sizes) or requests > most["rows"]:
            return
        fullest = min(requests * like.longest_block, most["rows"])
        between = [rows for rows in buckets.choices["rows"] if requests < rows < fullest]
        for rows in (requests, *between, fullest):
            yield {**sizes, "rows": rows, "guided": rows if sides > 1 else 0}
