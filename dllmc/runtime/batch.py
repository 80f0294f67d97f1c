"""One packed step: several requests' tokens end to end, their masked rows, and the tables that the head reads.

A guided request has two segments: its own tokens, then the same with the prompt masked. Second segments stand behind
all first ones, and their rows behind all others, as `dllmc::guide_rows` expects.

What a step's rows are depends on what the step before committed, the rest does not: on a GPU it is composed while
that one runs, and the GPU picks the rows (`Batch.places`); on a CPU the host does (`Batch.picked`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dllmc.ir import places
from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.runtime.buckets import Buckets
from dllmc.runtime.sampling import deferred_choices, select_commits
from dllmc.runtime.table import FULL, REFRESH, REUSE, FloatArray, IntArray, Table

# Without buckets, rows are rounded up to a multiple of this, so that a block's steps share few bindings.
ROW_BUCKET = 8

Array = np.ndarray[Any, np.dtype[Any]]


class Commits(NamedTuple):
    """What a step commits: [commits] which of the committing requests, the position, the token, and its logprob."""

    segment: IntArray
    position: IntArray
    token: IntArray
    logprob: FloatArray


@dataclass(frozen=True)
class Batch:
    """A step, in which some is padding, of `rows` of the table, of which those in `committing` commit something.

    phase: which program has all that the step needs. given: inputs of the program, but for those that `picked` adds.
    counts: [committing], how many each commits, at least; left: how many are masked. refreshed: those of `rows` that a
    Refresh gives a cache. second: [rows], the second segment of each, 0 without guidance. origins: [segments], which
    packed token each segment's first position is, or would be.

    As the step begins it has `sizes`, and `inputs` or `places`; at its end come `choose` or `chosen`, and `commit`, all
    of which `finish` does. Within `foreseen` the next one can be composed before that.
    """

    table: Table
    rows: IntArray
    committing: IntArray
    phase: str
    given: Mapping[str, Array]
    counts: IntArray
    left: IntArray
    refreshed: IntArray
    second: IntArray
    origins: IntArray
    _index: IntArray  # which of the rows commit
    _others: Mapping[str, int]  # sizes, but for those that count rows
    _max_rows: int
    _buckets: Buckets | None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The step's sizes, as the program takes them."""
        rows, guided = int(self.left.sum()), int(self.left[self.second[self._index] > 0].sum())
        sizes = {**self._others, "rows": rows, "guided": guided}
        if self._buckets is not None:
            return self._buckets.padded(sizes)
        return sizes | {"rows": min(-(-max(rows, 1) // ROW_BUCKET) * ROW_BUCKET, self._max_rows)}

    @cached_property
    def candidates(self) -> tuple[IntArray, IntArray]:
        """[rows] of the head, but for padding: which of the committing requests, and the position in its sequence."""
        return self.table.candidates(self.committing)

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """All inputs that a program may take."""
        return {**self.given, **self.picked()}

    @property
    def certain(self) -> bool:
        """Whether it is known beforehand how many tokens each request commits."""
        return bool(np.isposinf(self.table.threshold[self.committing]).all())

    def picked(self) -> dict[str, Array]:
        """The inputs that name the rows of the head, and what they ask for.

        Padded rows are of the end of a block, and what the head makes of them nobody reads; a padded guided row moves
        the last of them, without guidance.
        """
        table, rows, sizes = self.table, self.rows, self.sizes
        segment, position = self.candidates
        request = self._index[segment]  # of each row of the head
        counts = np.bincount(request, minlength=rows.size)
        guided = np.flatnonzero(self.second)
        twins = np.flatnonzero(self.second[request])
        row_ends = np.cumsum(counts)
        twin_ends = sizes["rows"] + np.cumsum(counts[guided])
        span_ends = np.concatenate((row_ends, twin_ends))
        lengths = np.concatenate((counts, counts[guided]))
        own, twin = self.origins[request] + position, self.origins[self.second[request]] + position
        index, ends = self._index[:1], table.end[self.committing[:1]]
        filler = int((self.origins[index] + ends).sum()) - 1 if index.size else 0
        return {
            "rows": np.concatenate(
                (_padded(own, sizes["rows"], filler), _padded(twin[twins], sizes["guided"], filler))
            ),
            "row_spans": _padded(np.stack((span_ends - lengths, span_ends), axis=1), sizes["segments"]),
            "guided": _padded(twins, sizes["guided"], sizes["rows"] - 1),
            "guidance": _padded(table.cfg_scale[rows][request][twins], sizes["guided"]),
            "row_segment": _padded(request, sizes["rows"]),
            "row_position": _padded(position, sizes["rows"]),
            "row_target": _padded(table.reference[rows[request], position], sizes["rows"], -1),
        }

    def places(self) -> IntArray:
        """[segments, `places.WIDTH`] of `dllmc.ir.places`: what a GPU picks the rows by, and commits by."""
        table, rows = self.table, self.rows
        found = np.zeros((self.sizes["segments"], places.WIDTH), np.int64)
        found[self.second[self.second > 0], places.SIDES] = -1
        own = found[: rows.size]
        own[:, places.SIDES] = 1 + (self.second > 0)
        own[:, places.ROW] = rows
        own[:, places.ORIGIN] = self.origins[: rows.size]
        own[:, places.TWIN_ORIGIN] = self.origins[self.second]
        own[:, places.TWIN] = self.second
        own[:, places.GUIDANCE] = _bits(table.cfg_scale[rows])
        commits = self._index
        own[commits, places.START], own[commits, places.END] = table.start[self.committing], table.end[self.committing]
        own[commits, places.COUNT] = self.counts
        own[commits, places.THRESHOLD] = _bits(table.threshold[self.committing])
        own[:, places.DEFERRED :] = table.deferred[rows]
        return found

    @contextmanager
    def foreseen(self) -> Iterator[None]:
        """Within, the schedule of the step's requests is as behind it, as far as that is certain before its end."""
        before = self.table.schedule(self.rows)
        try:
            self.table.advance(self.rows, self.committing, self._certain)
            yield
        finally:
            self.table.restore(self.rows, before)

    def renewed(self) -> "Batch":
        """The step, composed before it was certain what the one ahead of it commits, now that this is known."""
        return replace(self, left=self.table.left[self.committing])

    def choose(self, token: IntArray, confidence: FloatArray, logprob: FloatArray) -> Commits:
        """What is committed of a prediction; each [rows or more], as `dllmc::decode_head` returns them."""
        segment, position = self.candidates
        token, confidence, logprob = token[: segment.size], confidence[: segment.size], logprob[: segment.size]
        deferred = deferred_choices(segment, token, self.table.deferred[self.committing])
        thresholds = self.table.threshold[self.committing]
        chosen = select_commits(segment, confidence, deferred, self.counts, thresholds)
        return Commits(segment[chosen], position[chosen], token[chosen], logprob[chosen])

    def chosen(self, committed: npt.NDArray[np.int32]) -> Commits:
        """What a GPU has committed: [2, rows or more], as in `dllmc.ir.places`."""
        segment, position = self.candidates
        token, logprob = committed[0, : segment.size], committed[1, : segment.size].view(np.float32)
        chosen = token >= 0
        return Commits(segment[chosen], position[chosen], token[chosen].astype(np.int64), logprob[chosen])

    def commit(self, commits: Commits) -> IntArray:
        """End the step; the rows of the table whose block is full now."""
        self.table.at_refresh[self.refreshed] = self.table.token_ids[self.refreshed]
        self.table.advance(self.rows, self.committing, np.bincount(commits.segment, minlength=self.committing.size))
        return self.table.write(self.committing, *commits)

    def finish(self, token: IntArray, confidence: FloatArray, logprob: FloatArray) -> IntArray:
        """End the step with a prediction; the rows of the table whose block is full now."""
        return self.commit(self.choose(token, confidence, logprob))

    @property
    def _certain(self) -> IntArray:
        """[committing], commits that are known beforehand."""
        return np.where(np.isposinf(self.table.threshold[self.committing]), self.counts, 0)


def compose(
    table: Table, rows: IntArray, max_rows: int, mask_id: int, has_cache: bool = False, buckets: Buckets | None = None
) -> Batch:
    """Pack one step of these rows of a table, each in the phase it is in.

    `max_rows`: the program's largest number of rows. `has_cache`: whether it has caches. `buckets`: what to pad all
    sizes to; None: rows alone are rounded up.

    Padded tokens are of no segment, and padded segments have none.
    """
    phases, replays = table.phases(rows), table.lost[rows]
    first = np.where(phases == REUSE, table.span[rows], 0)
    end = np.where(phases == REUSE, table.end[rows], table.length[rows])
    guided = np.flatnonzero(table.cfg_scale[rows])
    side_of = np.concatenate((np.arange(rows.size), guided))  # which of the rows each segment is of
    lengths = (end - first)[side_of]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    origins = starts - first[side_of]  # where position 0 would be

    owner = np.repeat(np.arange(side_of.size), lengths)
    positions = np.arange(owner.size) - origins[owner]
    token_ids = table.token_ids[rows[side_of][owner], positions]
    if replays.any():
        again = np.flatnonzero(replays[side_of][owner])
        token_ids[again] = table.at_refresh[rows[side_of][owner[again]], positions[again]]
    if guided.size:
        prompts = (owner >= rows.size) & (positions < table.prompt_length[rows[side_of]][owner])
        token_ids[prompts] = mask_id

    tables = _cache_tables(table, rows, phases, side_of, origins) if has_cache else {}
    others = {"tokens": owner.size, "segments": side_of.size, "active": tables["active"].size if has_cache else 0}
    sizes = others if buckets is None else buckets.padded({"rows": 0, "guided": 0, **others})
    of_segments = {
        "segments": np.stack((starts, ends), axis=1),
        "temperature": table.temperature[rows[side_of]],
        "top_k": table.top_k[rows[side_of]],
        "top_p": table.top_p[rows[side_of]],
        "confidence_rule": table.rule[rows[side_of]],
        "seed": table.seed[rows[side_of]],
        "step": table.step[rows[side_of]],
        "suppressed": table.suppressed[rows[side_of]],
    }
    given = {"token_ids": _padded(token_ids, sizes["tokens"]), "positions": _padded(positions, sizes["tokens"])}
    if has_cache:
        given["active"] = _padded(tables.pop("active"), sizes["active"])
        of_segments |= tables
    given |= {name: _padded(values, sizes["segments"]) for name, values in of_segments.items()}
    committing = np.flatnonzero(~replays)
    second = np.zeros(rows.size, np.int64)
    second[guided] = np.arange(rows.size, side_of.size)
    return Batch(
        table=table,
        rows=rows,
        committing=rows[committing],
        phase=_program_for(phases),
        given=given,
        counts=table.commit_counts(rows[committing]),
        left=table.left[rows[committing]],
        refreshed=rows[committing][phases[committing] == REFRESH],
        second=second,
        origins=origins,
        _index=committing,
        _others=others,
        _max_rows=max_rows,
        _buckets=buckets,
    )


def _padded(values: Array, count: int, filler: int = 0) -> Array:
    """The values, and as many fillers behind them along the first axis as make that count."""
    if len(values) == count:
        return values
    whole = np.full((count, *values.shape[1:]), filler, values.dtype)
    whole[: len(values)] = values
    return whole


def _bits(values: FloatArray) -> IntArray:
    return values.view(np.int32).astype(np.int64)


def _program_for(phases: IntArray) -> str:
    """The phase whose program has no more than the step needs (`specialize-phase`)."""
    found = set(phases.tolist())
    if REUSE not in found:
        return "refresh" if REFRESH in found else "dense"
    return "mixed" if REFRESH in found else "reuse"


def _cache_tables(
    table: Table, rows: IntArray, phases: IntArray, side_of: IntArray, origins: IntArray
) -> dict[str, IntArray]:
    """What `dllmc::keep` and `dllmc::attention` read of each side: what to keep, what is kept, and in which pages."""
    of_side = rows[side_of]
    side = (np.arange(side_of.size) >= rows.size).astype(np.int64)
    kept = table.kept[of_side]
    cached = np.where(phases[side_of] == REUSE, kept, 0)
    keeping = np.zeros((side_of.size, KEEPING_FIELDS), np.int64)
    active = np.zeros(0, np.int64)
    filling = np.flatnonzero((phases[side_of] == REFRESH) & (kept > 0))
    if filling.size:
        at = of_side[filling]
        first, end = origins[filling] + table.span[at], origins[filling] + table.end[at]
        keeping[filling] = np.stack((first, end, kept[filling], table.selection[at], table.pool[at]), axis=1)
        lengths = end - first
        ends = np.cumsum(lengths)
        active = np.arange(ends[-1]) + np.repeat(first - (ends - lengths), lengths)
    page_table = table.page_table[of_side, side]
    page_table[phases[side_of] == FULL] = 0
    return {"keeping": keeping, "cached": cached, "page_table": page_table, "active": active}
