"""Who runs together in a step, and who has a place: pure functions of what requests want and what is free.

A step is heavy for a request (Full and Refresh compute all of its tokens) or light (Reuse computes its block). The
policy "multiplexed" takes the light ones first, and of the heavy ones beside them so few that the step stays short:
they are spread over steps. What does not fit lets those behind it go on. Nobody starves. With a place: who has waited
for `PATIENCE` steps goes first, so that of n requests each runs at least once in any `PATIENCE + n` steps. In line:
places are given in the order in which requests are due, and nobody passes one that is due; `LATENCY` says when that
is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dllmc.errors import RequestError
from dllmc.ir.program import SYMBOLS
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.table import REFRESH, REUSE, BoolArray, DoubleArray, IntArray, Table

Demand = Mapping[str, int]

PATIENCE = 16
"""Steps that a request with a place waits before it goes first."""

LATENCY = 60.0
"""Seconds: a request is due so long after it was submitted, or at its deadline, and for each point of priority so
much earlier. It may take the places of requests that are due more than this later."""

IN_SIGHT = 64
"""Requests in line that are looked at for one that fits."""

HEAVY_SHARE = 4
"""Beside light ones, heavy requests beyond the first share this part of a step's tokens, 1 / HEAVY_SHARE."""


@dataclass(frozen=True)
class Policy:
    """How steps are composed and places given.

    skips: what does not fit lets those behind it go on. multiplexes: light steps go first, heavy ones are spread, who
    has waited long goes before all; places go by when requests are due, not by arrival. together: requests are given
    places together, as many as fit one step, and the next ones when all of these are done.
    """

    skips: bool = False
    multiplexes: bool = False
    together: bool = False


POLICIES = {"multiplexed": Policy(skips=True, multiplexes=True), "fcfs": Policy(), "static": Policy(together=True)}
"""The choices of `load(scheduler=...)`; "fcfs" and "static" are for comparison."""


@dataclass(frozen=True)
class Wanted:
    """What the next steps of requests take, and what bears on their order: an entry a request, in order of arrival.

    sizes: [requests, symbols] of the program. due: seconds. waited: steps since it last ran.
    """

    sizes: IntArray
    heavy: BoolArray
    due: DoubleArray
    waited: IntArray


@dataclass(frozen=True)
class Claim:
    """What a place for a request takes: pages of the KV pool, and at most these sizes of any step."""

    pages: int
    sizes: tuple[int, ...]
    due: float


def wanted(table: Table, rows: IntArray) -> Wanted:
    """What the next steps of these rows take."""
    phases, sides = table.phases(rows), table.sides(rows)
    light = phases == REUSE
    span = table.end[rows] - table.span[rows]
    asked = np.where(table.lost[rows], 0, table.left[rows])
    tokens = np.where(light, span, table.length[rows])
    active = np.where(phases == REFRESH, span, 0)
    sizes = np.stack((tokens * sides, asked, asked * (sides - 1), sides, active * sides), axis=1)
    return Wanted(sizes, ~light, table.due[rows], table.waited[rows])


def choose(wanted: Wanted, limits: Sequence[int], policy: Policy) -> list[int]:
    """Compose a step: which requests run, ascending; at least one if there is any. limits: of each symbol."""
    count = len(wanted.sizes)
    tokens, few = wanted.sizes[:, 0], limits[0] // HEAVY_SHARE
    spread = policy.multiplexes and not wanted.heavy.all() and tokens[wanted.heavy].sum() > few
    if not spread and (wanted.sizes.sum(axis=0) <= limits).all():
        return list(range(count))
    order = _order(wanted) if policy.multiplexes else range(count)
    sizes, heavy, overdue = wanted.sizes.tolist(), wanted.heavy.tolist(), (wanted.waited >= PATIENCE).tolist()
    left, heavy_tokens = list(limits), 0
    run: list[int] = []
    for index in order:
        size = sizes[index]
        later = spread and heavy[index] and heavy_tokens and not overdue[index] and heavy_tokens + size[0] > few
        if not later and all(a <= b for a, b in zip(size, left, strict=True)):
            left = [b - a for a, b in zip(size, left, strict=True)]
            heavy_tokens += size[0] if heavy[index] else 0
            run.append(index)
        elif not policy.skips:
            break
    return sorted(run)


def _order(wanted: Wanted) -> list[int]:
    patient = wanted.waited < PATIENCE
    keys = (wanted.due, wanted.heavy & patient, np.where(patient, 0, -wanted.waited))
    order: list[int] = np.lexsort(keys).tolist()  # the last key is the primary one, ties go by arrival
    return order


def admitted(
    line: Sequence[Claim],
    seated: Sequence[Claim],
    places: int,
    pages: int,
    limits: Sequence[int],
    now: float,
    policy: Policy,
) -> tuple[list[int], list[int]]:
    """Who in line is given a place, and whose place among the seated is taken for that: indices of both.

    line: in the order in which they are served. places, pages: free ones. now: seconds.
    """
    taken: list[int] = []
    if line and policy.multiplexes:
        taken = _preempted(line[0], seated, places, pages)
        places, pages = places + len(taken), pages + sum(seated[index].pages for index in taken)
    if policy.together and seated:
        return [], []
    left = list(limits)
    chosen: list[int] = []
    for index, claim in enumerate(line[:IN_SIGHT]):
        if not places:
            break
        fits = claim.pages <= pages
        if policy.together:
            fits = fits and all(a <= b for a, b in zip(claim.sizes, left, strict=True))
        if fits:
            left = [b - a for a, b in zip(claim.sizes, left, strict=True)]
            places, pages = places - 1, pages - claim.pages
            chosen.append(index)
        elif not policy.skips or claim.due <= now:
            break
    return chosen, taken


def _preempted(first: Claim, seated: Sequence[Claim], places: int, pages: int) -> list[int]:
    """Whose places the first in line takes: of the latest due, as few as do, all due `LATENCY` later than it."""
    if places and first.pages <= pages:
        return []
    taken: list[int] = []
    for index in sorted(range(len(seated)), key=lambda i: -seated[i].due):
        if seated[index].due - first.due <= LATENCY:
            return []
        taken.append(index)
        places, pages = places + 1, pages + seated[index].pages
        if first.pages <= pages:
            return taken
    return []


def due(now: float, priority: int, deadline: float | None) -> float:
    """When a request that is submitted now is due: seconds on the same clock. deadline: seconds from now."""
    return now + min(LATENCY, np.inf if deadline is None else deadline) - priority * LATENCY


def most(request: RequestState) -> Demand:
    """What any step of a request takes at most."""
    rows, sides = request.longest_block, request.sides
    active = request.longest_span if request.cache.mode != "none" else 0
    sizes = request.length * sides, rows, rows * (sides - 1), sides, active * sides
    return dict(zip(SYMBOLS, sizes, strict=True))


def require_admissible(request: RequestState, limits: Demand, pool: KVPool | None, where: str) -> None:
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
