"""One packed step: several requests' tokens end to end, their masked rows, and the tables that the head reads.

A guided request has two segments: its own tokens, then the same with the prompt masked. The rows of second
segments stand behind all others, as `dllmc::guide_rows` expects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.params import CONFIDENCE_RULES, SELECTIONS
from dllmc.runtime.request import Request
from dllmc.runtime.sampling import BoolArray, FloatArray, IntArray, deferred_choices, select_commits
from dllmc.spec import MAX_SUPPRESS_TOKENS

# Rows are rounded up to a multiple of this, so that a block's steps share few bindings.
ROW_BUCKET = 8


@dataclass(frozen=True)
class Batch:
    """A step's `sizes` and `inputs` as the program takes them; `rows` of them are real, the others padding.

    `segment`, `position`: [rows], the request's index in `requests` and the position in its sequence. `phase`: which
    program has all that the step needs.
    """

    requests: Sequence[Request]
    phase: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    segment: IntArray
    position: IntArray

    def commit(self, token: IntArray, confidence: FloatArray, logprob: FloatArray) -> None:
        """Commit what the step predicted: each [rows or more], as `dllmc::decode_head` returns them."""
        rows = self.segment.size
        token, confidence, logprob = token[:rows], confidence[:rows], logprob[:rows]
        chosen = select_commits(
            self.segment,
            self.position,
            confidence,
            deferred_choices(self.segment, token, [r.params.defer_tokens for r in self.requests]),
            np.array([r.commit_count() for r in self.requests], np.int64),
            np.array([r.commit_threshold for r in self.requests], np.float32),
        )
        bounds = np.cumsum([0, *np.bincount(self.segment, minlength=len(self.requests))])
        for request, first, end in zip(self.requests, bounds[:-1], bounds[1:], strict=True):
            mine: BoolArray = chosen[first:end]
            request.commit(self.position[first:end][mine], token[first:end][mine], logprob[first:end][mine])


def compose(requests: Sequence[Request], max_rows: int, pool: KVPool | None = None, table_width: int = 0) -> Batch:
    """Pack one step of all the given requests, each in the phase it is in.

    `max_rows`: the program's largest number of rows. `pool`, `table_width`: where it has caches, who holds which pages,
    and how many a request may hold.
    """
    guided = [request for request in requests if request.params.cfg_scale]
    sequences = [r.token_ids for r in requests] + [r.unconditional_token_ids() for r in guided]
    sides = [*((r, 0) for r in requests), *((r, 1) for r in guided)]
    shown = [r.span if r.phase == "reuse" else (0, r.token_ids.size) for r, _ in sides]
    lengths = np.array([end - first for first, end in shown], np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    origins = starts - np.array([first for first, _ in shown], np.int64)  # where position 0 would be

    candidates = [r.candidates() for r in requests]
    counts = np.array([len(c) for c in candidates], np.int64)
    segment = np.repeat(np.arange(len(requests)), counts)
    position = np.concatenate(candidates)
    row_ends = np.cumsum(counts)
    rows = int(position.size)
    padded = min(-(-rows // ROW_BUCKET) * ROW_BUCKET, max_rows)
    padding = np.zeros(padded - rows, np.int64)

    is_guided = np.array([bool(r.params.cfg_scale) for r in requests])
    twin_origin = np.zeros(len(requests), np.int64)
    twin_origin[is_guided] = origins[len(requests) :]
    twins = np.flatnonzero(is_guided[segment])
    twin_ends = padded + np.cumsum(counts[is_guided])
    span_ends = np.concatenate((row_ends, twin_ends))
    scales = np.array([r.params.cfg_scale for r in requests], np.float32)

    own = origins[segment] + position

    inputs = {
        "token_ids": np.concatenate([ids[first:end] for ids, (first, end) in zip(sequences, shown, strict=True)]),
        "positions": np.concatenate([np.arange(first, end) for first, end in shown]),
        "segments": np.stack((starts, ends), axis=1),
        "rows": np.concatenate((own, own[:1] + padding, (twin_origin[segment] + position)[twins])),
        "row_spans": np.stack((span_ends - np.concatenate((counts, counts[is_guided])), span_ends), axis=1),
        "guided": twins,
        "guidance": scales[segment][twins],
        "row_segment": np.concatenate((segment, padding)),
        "row_position": np.concatenate((position, padding)),
        "row_target": np.concatenate((*(r.targets() for r in requests), padding - 1)),
        **_tables([*requests, *guided]),
    }
    sizes = {
        "tokens": int(ends[-1]),
        "rows": padded,
        "guided": int(twins.size),
        "segments": len(sequences),
        "active": 0,
    }
    if pool is not None:
        inputs |= _cache_tables(sides, origins, pool, table_width)
        sizes["active"] = len(inputs["active"])
    return Batch(requests, _program_for(requests), sizes, inputs, segment, position)


def _program_for(requests: Sequence[Request]) -> str:
    """The phase whose program has no more than the step needs (`specialize-phase`)."""
    phases = {request.phase for request in requests}
    if "reuse" not in phases:
        return "refresh" if "refresh" in phases else "dense"
    return "mixed" if "refresh" in phases else "reuse"


def _cache_tables(
    sides: Sequence[tuple[Request, int]], origins: IntArray, pool: KVPool, table_width: int
) -> dict[str, IntArray]:
    """What `dllmc::keep` and `dllmc::attention` read of each side: what to keep, what is kept, and in which pages."""
    keeping = np.zeros((len(sides), KEEPING_FIELDS), np.int64)
    cached = np.zeros(len(sides), np.int64)
    page_table = np.zeros((len(sides), table_width), np.int64)
    active = [np.zeros(0, np.int64)]
    for index, (request, side) in enumerate(sides):
        if request.phase == "full" or not request.kept:
            continue
        pages = pool.held((request, side))
        page_table[index, : len(pages)] = pages
        if request.phase == "reuse":
            cached[index] = request.kept
        else:
            first, end = (int(origins[index]) + bound for bound in request.span)
            policy = request.cache
            keeping[index] = first, end, request.kept, SELECTIONS.index(policy.selection), policy.pool
            active.append(np.arange(first, end, dtype=np.int64))
    return {"keeping": keeping, "cached": cached, "page_table": page_table, "active": np.concatenate(active)}


def _tables(requests: Sequence[Request]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """What the head reads of each segment's request (`dllmc::decode_head`)."""
    params = [r.params for r in requests]
    suppressed = np.full((len(requests), MAX_SUPPRESS_TOKENS), -1, np.int64)
    for row, p in zip(suppressed, params, strict=True):
        row[: len(p.suppress_tokens)] = p.suppress_tokens
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k or 0 for p in params], np.int64),
        "top_p": np.array([p.top_p or 1.0 for p in params], np.float32),
        "confidence_rule": np.array([CONFIDENCE_RULES.index(p.remasking) for p in params], np.int64),
        "seed": np.array([p.seed for p in params], np.int64),
        "step": np.array([r.step for r in requests], np.int64),
        "suppressed": suppressed,
    }
