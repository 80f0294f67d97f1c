"""Who is in line, who has a place, and who runs next. A place is a row of the table with pages of the KV pool.

Decisions are those of `dllmc.runtime.scheduler`; here is their bookkeeping, without device or threads, so that the
simulator (`benchmarks/simulate.py`) runs the same. A place has all pages that its request will need at most: no request
with a place ever lacks one. Whoever loses its place is in line again, and replays its Refresh when it has one.
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dllmc.ir.program import SYMBOLS
from dllmc.runtime import scheduler
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.scheduler import Claim, Policy
from dllmc.runtime.table import IntArray, Table


@dataclass(eq=False)
class Entry:
    """A request as the roster knows it. due: seconds, see `scheduler.due`. number: of its arrival, the roster's.

    row: of the table, while it has a place.
    """

    state: RequestState
    due: float = 0.0
    number: int = field(default=-1, init=False)
    row: int | None = field(default=None, init=False)
    claim: Claim = field(init=False)


class Roster:
    """Requests in line and, at most `limits["segments"]`, with a place; each of these keeps its state in the table.

    table: with a row a place. pool: None without caches. preemptions: places that were taken for others so far.
    """

    def __init__(self, table: Table, limits: Mapping[str, int], pool: KVPool | None, policy: Policy) -> None:
        self.table = table
        self.pool = pool
        self.policy = policy
        self.preemptions = 0
        self._limits = [limits[symbol] for symbol in SYMBOLS]
        self._line: list[Entry] = []  # ascending by `_key`
        self._free = list(range(limits["segments"]))[::-1]
        self._seated: dict[int, Entry] = {}  # by row
        self._rows = np.zeros(0, np.int64)  # of those with a place, in order of arrival
        self._arrivals = 0
        self._changed = False  # whether anyone came or went since places were given

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Requests with a place."""
        return len(self._seated)

    def __len__(self) -> int:
        return len(self._line) + len(self._seated)

    def add(self, entry: Entry) -> None:
        """Put a request in line. It can be served (`scheduler.require_admissible`)."""
        entry.number = self._arrivals
        self._arrivals += 1
        pages = 0
        if self.pool is not None and entry.state.cache.mode != "none":
            pages = entry.state.sides * self.pool.pages_for(entry.state.most_kept)
        sizes = scheduler.most(entry.state)
        entry.claim = Claim(pages, tuple(sizes[symbol] for symbol in SYMBOLS), entry.due)
        self._queue(entry)

    def remove(self, entry: Entry) -> None:
        """Take a request out of line, or its place and its pages away. Its state goes on in a table of its own."""
        if entry.row is None:
            self._line.remove(entry)
        else:
            self._unseat(entry)
            self._rows = self._in_order()
        self._changed = True

    def next(self, now: float) -> IntArray:
        """Give places, and say which rows of the table run the next step; none if there are no requests."""
        self._give_places(now)
        rows = self._chosen()
        self.ran(rows)
        return rows

    def ahead(self) -> IntArray:
        """Which rows run the step behind the one that runs, if that ends none of their blocks; none if it is open."""
        return self._rows[:0] if self._changed else self._chosen()

    def ran(self, rows: IntArray) -> None:
        """Count a step of these rows, which `next` has done for its own."""
        self.table.waited[self._rows] += 1
        self.table.waited[rows] = 0

    def at(self, rows: Iterable[int]) -> list[Entry]:
        """Whose rows these are, where they are anyone's."""
        return [self._seated[int(row)] for row in rows if int(row) in self._seated]

    def _chosen(self) -> IntArray:
        if not self._rows.size:
            return self._rows
        wanted = scheduler.wanted(self.table, self._rows)
        return self._rows[scheduler.choose(wanted, self._limits, self.policy)]

    def _key(self, entry: Entry) -> tuple[float, int]:
        return (entry.due if self.policy.multiplexes else 0.0, entry.number)

    def _queue(self, entry: Entry) -> None:
        bisect.insort(self._line, entry, key=self._key)
        self._changed = True

    def _give_places(self, now: float) -> None:
        if not self._changed:  # nobody fits because time has passed
            return
        self._changed = False
        seated = list(self._seated.values())
        line = [entry.claim for entry in self._line[: scheduler.IN_SIGHT]]
        places, pages = len(self._free), self.pool.free if self.pool is not None else 0
        claims = [entry.claim for entry in seated]
        chosen, taken = scheduler.admitted(line, claims, places, pages, self._limits, now, self.policy)
        entering = [self._line[index] for index in chosen]
        for index in reversed(chosen):
            del self._line[index]
        for index in taken:
            seated[index].state.lose_cache()
            self._unseat(seated[index])
            self._queue(seated[index])
            self.preemptions += 1
        for entry in entering:
            self._seat(entry)
        self._changed = bool(entering) and bool(self._line)  # more than are in sight may fit
        self._rows = self._in_order()

    def _seat(self, entry: Entry) -> None:
        row = self._free.pop()
        entry.state.move(self.table, row)
        entry.row = row
        self._seated[row] = entry
        self.table.due[row], self.table.waited[row] = entry.due, 0
        self.table.page_table[row] = 0
        if self.pool is not None and entry.claim.pages:
            each = entry.claim.pages // entry.state.sides
            for side in range(entry.state.sides):
                self.pool.hold((row, side), each * self.pool.page_tokens)
                self.table.page_table[row, side, :each] = self.pool.held((row, side))

    def _unseat(self, entry: Entry) -> None:
        assert entry.row is not None
        entry.state.leave()
        if self.pool is not None:
            for side in range(entry.state.sides):
                self.pool.release((entry.row, side))
        del self._seated[entry.row]
        self._free.append(entry.row)
        entry.row = None

    def _in_order(self) -> IntArray:
        return np.array(sorted(self._seated, key=lambda row: self._seated[row].number), np.int64)
