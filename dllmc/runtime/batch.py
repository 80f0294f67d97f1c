"""One packed step: several requests' tokens end to end, their masked rows, and the tables that the head reads.

A guided request has two segments: its own tokens, then the same with the prompt masked. The rows of second
segments stand behind all others, as `dllmc::guide_rows` expects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.runtime.buckets import Buckets
from dllmc.runtime.sampling import deferred_choices, select_commits
from dllmc.runtime.table import FULL, REFRESH, REUSE, FloatArray, IntArray, Table

# Without buckets, rows are rounded up to a multiple of this, so that a block's steps share few bindings.
ROW_BUCKET = 8

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Batch:
    """A step's `sizes` and `inputs` as the program takes them, in which some is padding.

    `rows`: [requests], rows of the table, of which those in `committing` commit something. `segment`, `position`:
    of each real row of the head, which of the committing requests it belongs to and the position in its sequence.
    `phase`: which program has all that the step needs.
    """

    table: Table
    rows: IntArray
    committing: IntArray
    phase: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    segment: IntArray
    position: IntArray

    def commit(
        self, token: IntArray, confidence: FloatArray, logprob: FloatArray, deferring: Sequence[Sequence[int]] = ()
    ) -> IntArray:
        """Commit what the step predicted, and return the rows of the table whose block is full now.

        token, confidence, logprob: [rows or more], as `dllmc::decode_head` returns them. deferring: of each request
        that commits, the tokens that it defers; empty if none does.
        """
        rows, table = self.committing, self.table
        real = self.segment.size
        token, confidence, logprob = token[:real], confidence[:real], logprob[:real]
        deferred = deferred_choices(self.segment, token, deferring)
        counts, thresholds = table.commit_counts(rows), table.threshold[rows]
        chosen = select_commits(self.segment, confidence, deferred, counts, thresholds)
        table.lost[self.rows] = False  # what was replayed has its cache again
        return table.commit(rows, self.segment[chosen], self.position[chosen], token[chosen], logprob[chosen])


def compose(
    table: Table, rows: IntArray, max_rows: int, mask_id: int, has_cache: bool = False, buckets: Buckets | None = None
) -> Batch:
    """Pack one step of these rows of a table, each in the phase it is in.

    `max_rows`: the program's largest number of rows. `has_cache`: whether it has caches. `buckets`: what to pad all
    sizes to; None: rows alone are rounded up.

    Padded tokens are of no segment, and padded segments have none. Padded rows are of the first token, and what the
    head makes of them nobody reads; a padded guided row moves the last of them, without guidance.
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

    committing = np.flatnonzero(~replays)
    segment, position = table.candidates(rows[committing])
    counts = np.bincount(committing[segment], minlength=rows.size)
    request = committing[segment]  # of each row of the head
    row_ends = np.cumsum(counts)
    real = int(position.size)
    is_guided = table.cfg_scale[rows] > 0
    twins = np.flatnonzero(is_guided[request])

    tables = _cache_tables(table, rows, phases, side_of, origins) if has_cache else {}
    active = tables["active"].size if has_cache else 0
    sizes = {"tokens": owner.size, "rows": real, "guided": twins.size, "segments": side_of.size, "active": active}
    if buckets is not None:
        sizes = buckets.padded(sizes)
    else:
        sizes["rows"] = min(-(-max(real, 1) // ROW_BUCKET) * ROW_BUCKET, max_rows)

    twin_origin = np.zeros(rows.size, np.int64)
    twin_origin[guided] = origins[rows.size :]
    twin_ends = sizes["rows"] + np.cumsum(counts[guided])
    span_ends = np.concatenate((row_ends, twin_ends))
    own, twin = origins[request] + position, twin_origin[request] + position
    first_row = int(own[0]) if real else 0

    inputs = {
        "token_ids": _padded(token_ids, sizes["tokens"]),
        "positions": _padded(positions, sizes["tokens"]),
        "rows": np.concatenate(
            (_padded(own, sizes["rows"], first_row), _padded(twin[twins], sizes["guided"], first_row))
        ),
        "guided": _padded(twins, sizes["guided"], sizes["rows"] - 1),
        "guidance": _padded(table.cfg_scale[rows][request][twins], sizes["guided"]),
        "row_segment": _padded(request, sizes["rows"]),
        "row_position": _padded(position, sizes["rows"]),
        "row_target": _padded(table.reference[rows[request], position], sizes["rows"], -1),
    }
    of_segments = {
        "segments": np.stack((starts, ends), axis=1),
        "row_spans": np.stack((span_ends - counts[side_of], span_ends), axis=1),
        "temperature": table.temperature[rows[side_of]],
        "top_k": table.top_k[rows[side_of]],
        "top_p": table.top_p[rows[side_of]],
        "confidence_rule": table.rule[rows[side_of]],
        "seed": table.seed[rows[side_of]],
        "step": table.step[rows[side_of]],
        "suppressed": table.suppressed[rows[side_of]],
    }
    if has_cache:
        inputs["active"] = _padded(tables.pop("active"), sizes["active"])
        of_segments |= tables
    inputs |= {name: _padded(values, sizes["segments"]) for name, values in of_segments.items()}
    return Batch(table, rows, rows[committing], _program_for(phases), sizes, inputs, segment, position)


def _padded(values: Array, count: int, filler: int = 0) -> Array:
    """The values, and as many fillers behind them along the first axis as make that count."""
    if len(values) == count:
        return values
    whole = np.full((count, *values.shape[1:]), filler, values.dtype)
    whole[: len(values)] = values
    return whole


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
