"""Which requests take part in a step: first come, first served, within what the program and the KV pool can take.

A request that does not fit waits for another step, and those behind it that fit go on. So the oldest always runs, and
none starves: pages are given out in order too, and whoever holds some needs no more to finish its block.
"""

from collections.abc import Iterable, Mapping

from dllmc.errors import RequestError
from dllmc.ir.program import SYMBOLS
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import Request

Demand = Mapping[str, int]


def demand(request: Request) -> Demand:
    """What a request's next step takes, in the program's symbols."""
    first, end = request.span
    tokens = end - first if request.phase == "reuse" else request.token_ids.size
    return _sizes(request, tokens, request.candidates().size, end - first if request.phase == "refresh" else 0)


def most(request: Request) -> Demand:
    """What any step of a request takes at most."""
    return _sizes(request, request.token_ids.size, request.longest_block, request.longest_span)


def _sizes(request: Request, tokens: int, rows: int, active: int) -> Demand:
    sides = request.sides
    return {
        "tokens": tokens * sides,
        "rows": rows,
        "guided": rows * (sides - 1),
        "segments": sides,
        "active": active * sides,
    }


def require_admissible(request: Request, limits: Demand, pool: KVPool | None, where: str) -> None:
    """Raise `RequestError`, with the numbers, for a request that no step of the program can hold, or no pool."""
    options = {
        "tokens": "max_tokens_per_step",
        "rows": "max_logit_rows",
        "guided": "max_logit_rows",
        "segments": "max_requests",
        "active": "max_logit_rows",
    }
    wanted = most(request)
    for symbol, option in options.items():
        if wanted[symbol] > limits[symbol]:
            raise RequestError(
                f"{where}: needs {wanted[symbol]} {symbol} a step, but the artifact was compiled for "
                f"{limits[symbol]}; shorten the request, or compile with {option} >= {wanted[symbol]}"
            )
    if request.cache.mode == "none":
        return
    if pool is None:
        raise RequestError(
            f"{where}: CachePolicy.mode is {request.cache.mode!r}, but the artifact has no cache; decode it with "
            "CachePolicy(mode='none'), or compile with the pass cache-kv (not for attention with a window)"
        )
    pages = request.sides * pool.pages_for(request.most_kept)
    if pages > pool.pages:
        raise RequestError(
            f"{where}: keeps {request.most_kept} keys a head, which take {pages} pages of {pool.page_tokens}, but the "
            f"KV pool has {pool.pages}; lower CachePolicy.retention, or load or compile with a larger memory budget"
        )


def next_step(requests: Iterable[Request], limits: Demand, pool: KVPool | None) -> list[Request]:
    """Those of the unfinished requests, oldest first, that run together now; a Refresh of theirs has its pages."""
    left = dict(limits)
    chosen = []
    short = False
    for request in requests:
        wanted = demand(request)
        if any(wanted[symbol] > left[symbol] for symbol in SYMBOLS):
            continue
        if request.phase == "refresh" and pool is not None and not _has_pages(request, pool, more=not short):
            short = True
            continue
        left |= {symbol: left[symbol] - wanted[symbol] for symbol in SYMBOLS}
        chosen.append(request)
    return chosen


def _has_pages(request: Request, pool: KVPool, more: bool) -> bool:
    """Whether a request holds the pages of its block, on either side; where there may be `more`, it is given them."""
    owners = [(request, side) for side in range(request.sides)]
    if all(map(pool.holds, owners)):
        return True
    if not more or len(owners) * pool.pages_for(request.kept) > pool.free:
        return False
    for owner in owners:
        pool.hold(owner, request.kept)
    return True
