"""One packed step: several requests' tokens end to end, their masked rows, and the tables that the head reads.

A guided request has two segments: its own tokens, then the same with the prompt masked. The rows of second
segments stand behind all others, as `dllmc::guide_rows` expects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllmc.runtime.params import CONFIDENCE_RULES
from dllmc.runtime.request import Request
from dllmc.runtime.sampling import BoolArray, FloatArray, IntArray, deferred_choices, select_commits
from dllmc.spec import MAX_SUPPRESS_TOKENS

# Rows are rounded up to a multiple of this, so that a block's steps share few bindings.
ROW_BUCKET = 8


@dataclass(frozen=True)
class Batch:
    """A step's `sizes` and `inputs` as the program takes them; `rows` of them are real, the others padding.

    `segment`, `position`: [rows], the request's index in `requests` and the position in its sequence.
    """

    requests: Sequence[Request]
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


def compose(requests: Sequence[Request], max_rows: int) -> Batch:
    """Pack one dense step of all the given requests. `max_rows`: the program's largest number of rows."""
    guided = [request for request in requests if request.params.cfg_scale]
    sequences = [r.token_ids for r in requests] + [r.unconditional_token_ids() for r in guided]
    lengths = np.array([len(s) for s in sequences], np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    candidates = [r.candidates() for r in requests]
    counts = np.array([len(c) for c in candidates], np.int64)
    segment = np.repeat(np.arange(len(requests)), counts)
    position = np.concatenate(candidates)
    row_ends = np.cumsum(counts)
    rows = int(position.size)
    padded = min(-(-rows // ROW_BUCKET) * ROW_BUCKET, max_rows)
    padding = np.zeros(padded - rows, np.int64)

    is_guided = np.array([bool(r.params.cfg_scale) for r in requests])
    twin_start = np.zeros(len(requests), np.int64)
    twin_start[is_guided] = starts[len(requests) :]
    twins = np.flatnonzero(is_guided[segment])
    twin_ends = padded + np.cumsum(counts[is_guided])
    span_ends = np.concatenate((row_ends, twin_ends))
    scales = np.array([r.params.cfg_scale for r in requests], np.float32)

    inputs = {
        "token_ids": np.concatenate(sequences),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "segments": np.stack((starts, ends), axis=1),
        "rows": np.concatenate((starts[segment] + position, padding, (twin_start[segment] + position)[twins])),
        "row_spans": np.stack((span_ends - np.concatenate((counts, counts[is_guided])), span_ends), axis=1),
        "guided": twins,
        "guidance": scales[segment][twins],
        "row_segment": np.concatenate((segment, padding)),
        "row_position": np.concatenate((position, padding)),
        "row_target": np.concatenate((*(r.targets() for r in requests), padding - 1)),
        **_tables([*requests, *guided]),
    }
    sizes = {"tokens": int(ends[-1]), "rows": padded, "guided": int(twins.size), "segments": len(sequences)}
    return Batch(requests, sizes, inputs, segment, position)


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
