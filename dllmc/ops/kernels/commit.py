"""Between two steps, on the GPU: which rows the head has, and which of its predictions are committed.

    places, counts, committed, sequences: `dllmc.ir.places`; the others: inputs and outputs of a program

Before the calls of a step, `select`: each program takes a segment and
    1. counts its candidates, the positions of its block where nothing is committed
    2. once all are counted, finds its first row behind those of the segments before it
    3. writes its rows, those of its twin, and the tokens of its block as they are by now
and one more fills up what is padding. Behind them, `commit`: each program takes a segment and
    1. ranks its rows by confidence, NaN last, ties by position (semantics.md, "Commit")
    2. writes the tokens of those that are committed into the sequence, and tells the host
A block of usual length is one tile; ranking a longer one compares all of its tiles with each other.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from dllmc.ir import places as columns

TILE = 64

_SIDES = tl.constexpr(columns.SIDES)
_ROW = tl.constexpr(columns.ROW)
_START = tl.constexpr(columns.START)
_END = tl.constexpr(columns.END)
_ORIGIN = tl.constexpr(columns.ORIGIN)
_TWIN_ORIGIN = tl.constexpr(columns.TWIN_ORIGIN)
_TWIN = tl.constexpr(columns.TWIN)
_COUNT = tl.constexpr(columns.COUNT)
_THRESHOLD = tl.constexpr(columns.THRESHOLD)
_GUIDANCE = tl.constexpr(columns.GUIDANCE)
_DEFERRED = tl.constexpr(columns.DEFERRED)
_WIDTH = tl.constexpr(columns.WIDTH)


def select(
    places: Tensor,
    sequences: Tensor,
    counts: Tensor,
    inputs: Mapping[str, Tensor],
    rows: int,
    guided: int,
    mask_id: int,
) -> None:
    """Write what depends on the rows of a step: of the inputs of a program those of `PICKED`, and its `token_ids`.

    places: [segments, WIDTH]. Inputs as in `dllmc.ir.interface`, dense. rows, guided: sizes of the step.
    """
    segments = len(places)
    _count[(segments,)](places, sequences, counts, sequences.stride(0), tile=TILE)
    _select[(segments + 1,)](
        places,
        sequences,
        counts,
        *(inputs[name] for name in ("token_ids", *PICKED)),
        sequences.stride(0),
        sequences.stride(1),
        mask_id,
        segments,
        rows,
        guided,
        lanes=triton.next_power_of_2(segments),
        tile=TILE,
    )


PICKED = ("rows", "row_spans", "row_segment", "row_position", "row_target", "guided", "guidance")
"""Inputs of a program that `select` writes, whole."""


def commit(
    places: Tensor,
    sequences: Tensor,
    counts: Tensor,
    positions: Tensor,
    outputs: Mapping[str, Tensor],
    committed: Tensor,
) -> None:
    """Commit what a step predicted.

    positions: [rows] int64, `row_position`. outputs: token, confidence and logprob of each row, dense. committed:
    [2, rows].
    """
    segments = len(places)
    _commit[(segments,)](
        places,
        sequences,
        counts,
        positions,
        outputs["token"],
        outputs["confidence"],
        outputs["logprob"],
        committed,
        sequences.stride(0),
        sequences.stride(1),
        committed.stride(0),
        segments,
        lanes=triton.next_power_of_2(segments),
        deferred=columns.WIDTH - columns.DEFERRED,
        tile=TILE,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    places_ptr: tl.tensor, sequences_ptr: tl.tensor, counts_ptr: tl.tensor, row_stride: tl.tensor, tile: tl.constexpr
) -> None:
    segment = tl.program_id(0)
    places_ptr += segment * _WIDTH
    sequences_ptr += tl.load(places_ptr + _ROW) * row_stride
    end = tl.load(places_ptr + _END)
    count = 0
    for at in range(tl.load(places_ptr + _START), end, tile):
        position = at + tl.arange(0, tile)
        token = tl.load(sequences_ptr + position, mask=position < end, other=0)
        count += tl.sum((token < 0).to(tl.int32), axis=0)
    tl.store(counts_ptr + segment, count)


@triton.jit(do_not_specialize=("mask_id", "segments", "rows", "guided"))  # type: ignore[untyped-decorator]
def _select(
    places_ptr: tl.tensor,
    sequences_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    row_spans_ptr: tl.tensor,
    row_segment_ptr: tl.tensor,
    row_position_ptr: tl.tensor,
    row_target_ptr: tl.tensor,
    guided_ptr: tl.tensor,
    guidance_ptr: tl.tensor,
    row_stride: tl.tensor,
    reference_stride: tl.tensor,
    mask_id: tl.tensor,
    segments: tl.tensor,
    rows: tl.tensor,
    guided: tl.tensor,
    lanes: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    lane = tl.arange(0, lanes)
    count = tl.load(counts_ptr + lane, mask=lane < segments, other=0)
    sides_of = tl.load(places_ptr + lane * _WIDTH + _SIDES, mask=lane < segments, other=0)
    row = tl.sum(tl.where(lane < segment, count, 0), axis=0)
    twin = tl.sum(tl.where((lane < segment) & (sides_of == 2), count, 0), axis=0)
    if segment == segments:
        ends = tl.load(places_ptr + lane * _WIDTH + _END, mask=lane < segments, other=0)
        starts = tl.load(places_ptr + lane * _WIDTH + _START, mask=lane < segments, other=0)
        origins = tl.load(places_ptr + lane * _WIDTH + _ORIGIN, mask=lane < segments, other=0)
        first = tl.min(tl.where(starts < ends, lane, lanes), axis=0)
        filler = tl.zeros((tile,), tl.int64) + tl.sum(tl.where(lane == first, origins + ends - 1, 0), axis=0)
        for gap in range(row, rows, tile):
            unused = gap + tl.arange(0, tile)
            tl.store(rows_ptr + unused, filler, mask=unused < rows)
            tl.store(row_segment_ptr + unused, tl.zeros((tile,), tl.int64), mask=unused < rows)
            tl.store(row_position_ptr + unused, tl.zeros((tile,), tl.int64), mask=unused < rows)
            tl.store(row_target_ptr + unused, tl.full((tile,), -1, tl.int64), mask=unused < rows)
        for gap in range(twin, guided, tile):
            unused = gap + tl.arange(0, tile)
            tl.store(rows_ptr + rows + unused, filler, mask=unused < guided)
            tl.store(guided_ptr + unused, tl.zeros((tile,), tl.int64) + rows - 1, mask=unused < guided)
            tl.store(guidance_ptr + unused, tl.zeros((tile,), tl.float32), mask=unused < guided)
    else:
        places_ptr += segment * _WIDTH
        sides = tl.load(places_ptr + _SIDES)
        start, end = tl.load(places_ptr + _START), tl.load(places_ptr + _END)
        origin, twin_origin = tl.load(places_ptr + _ORIGIN), tl.load(places_ptr + _TWIN_ORIGIN)
        guidance = tl.load(places_ptr + _GUIDANCE).to(tl.int32).to(tl.float32, bitcast=True)
        sequences_ptr += tl.load(places_ptr + _ROW) * row_stride
        own = tl.sum(tl.where(lane == segment, count, 0), axis=0)
        if sides == 0:
            tl.store(row_spans_ptr + 2 * segment, 0)
            tl.store(row_spans_ptr + 2 * segment + 1, 0)
        if sides > 0:
            tl.store(row_spans_ptr + 2 * segment, row)
            tl.store(row_spans_ptr + 2 * segment + 1, row + own)
        if sides == 2:
            other = tl.load(places_ptr + _TWIN)
            tl.store(row_spans_ptr + 2 * other, rows + twin)
            tl.store(row_spans_ptr + 2 * other + 1, rows + twin + own)
        for at in range(start, end, tile):
            position = at + tl.arange(0, tile)
            inside = position < end
            token = tl.load(sequences_ptr + position, mask=inside, other=0)
            target = tl.load(sequences_ptr + reference_stride + position, mask=inside, other=-1)
            masked = token < 0
            token = tl.where(masked, mask_id, token)
            tl.store(token_ids_ptr + origin + position, token, mask=inside)
            behind = tl.cumsum(masked.to(tl.int32), axis=0) - 1
            index = row + behind
            picked = masked & (index < rows)
            tl.store(rows_ptr + index, origin + position, mask=picked)
            tl.store(row_segment_ptr + index, tl.zeros((tile,), tl.int64) + segment, mask=picked)
            tl.store(row_position_ptr + index, position, mask=picked)
            tl.store(row_target_ptr + index, target, mask=picked)
            if sides == 2:
                tl.store(token_ids_ptr + twin_origin + position, token, mask=inside)
                second = twin + behind
                picked = picked & (second < guided)
                tl.store(rows_ptr + rows + second, twin_origin + position, mask=picked)
                tl.store(guided_ptr + second, index, mask=picked)
                tl.store(guidance_ptr + second, tl.zeros((tile,), tl.float32) + guidance, mask=picked)
            found = tl.sum(masked.to(tl.int32), axis=0)
            row += found
            twin += found


@triton.jit(do_not_specialize=("segments",))  # type: ignore[untyped-decorator]
def _commit(
    places_ptr: tl.tensor,
    sequences_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    token_ptr: tl.tensor,
    confidence_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    committed_ptr: tl.tensor,
    row_stride: tl.tensor,
    reference_stride: tl.tensor,
    committed_stride: tl.tensor,
    segments: tl.tensor,
    lanes: tl.constexpr,
    deferred: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    lane = tl.arange(0, lanes)
    count = tl.load(counts_ptr + lane, mask=lane < segments, other=0)
    row = tl.sum(tl.where(lane < segment, count, 0), axis=0)
    rows = tl.sum(tl.where(lane == segment, count, 0), axis=0)
    places_ptr += segment * _WIDTH
    sequences_ptr += tl.load(places_ptr + _ROW) * row_stride
    most = tl.load(places_ptr + _COUNT)
    threshold = tl.load(places_ptr + _THRESHOLD).to(tl.int32).to(tl.float32, bitcast=True)
    later = tl.load(places_ptr + _DEFERRED + tl.arange(0, deferred))

    others = 0  # rows whose token is not deferred
    for at in range(0, rows, tile):
        index = at + tl.arange(0, tile)
        token = tl.load(token_ptr + row + index, mask=index < rows, other=-1)
        others += tl.sum(((index < rows) & (_is_one(token, later) == 0)).to(tl.int32), axis=0)
    for at in range(0, rows, tile):
        index = at + tl.arange(0, tile)
        inside = index < rows
        token, confidence = _prediction(token_ptr + row, confidence_ptr + row, index, rows, later, others)
        rank = tl.zeros((tile,), tl.int32)
        for other_at in range(0, rows, tile):
            other_index = other_at + tl.arange(0, tile)
            _, other = _prediction(token_ptr + row, confidence_ptr + row, other_index, rows, later, others)
            before = _goes_before(other[None, :], other_index[None, :], confidence[:, None], index[:, None])
            rank += tl.sum((before & (other_index < rows)[None, :]).to(tl.int32), axis=1)
        fixed = threshold == float("inf")
        chosen = tl.where(fixed, rank < most, (confidence >= threshold) | (rank == 0)) & inside
        position = tl.load(positions_ptr + row + index, mask=inside, other=0)
        target = tl.load(sequences_ptr + reference_stride + position, mask=inside, other=-1)
        tl.store(sequences_ptr + position, tl.where(target < 0, token, target).to(tl.int32), mask=chosen)
        logprob = tl.load(logprob_ptr + row + index, mask=inside, other=0.0)
        tl.store(committed_ptr + row + index, tl.where(chosen, token, -1).to(tl.int32), mask=inside)
        tl.store(committed_ptr + committed_stride + row + index, logprob.to(tl.int32, bitcast=True), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _prediction(
    token_ptr: tl.tensor,
    confidence_ptr: tl.tensor,
    index: tl.tensor,
    rows: tl.tensor,
    later: tl.tensor,
    others: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens of a segment's rows, and confidences as they are ranked: a deferred token has none beside others."""
    token = tl.load(token_ptr + index, mask=index < rows, other=-1)
    confidence = tl.load(confidence_ptr + index, mask=index < rows, other=0.0)
    return token, tl.where(_is_one(token, later) & (others > 0), float("-inf"), confidence)


@triton.jit  # type: ignore[untyped-decorator]
def _is_one(token: tl.tensor, of: tl.tensor) -> tl.tensor:
    return tl.sum((token[:, None] == of[None, :]).to(tl.int32), axis=1) > 0


@triton.jit  # type: ignore[untyped-decorator]
def _goes_before(a: tl.tensor, a_index: tl.tensor, b: tl.tensor, b_index: tl.tensor) -> tl.tensor:
    """Whether confidence `a` ranks before `b`."""
    a_number, b_number = a == a, b == b
    first = a_index < b_index
    both = tl.where(a > b, True, tl.where(a == b, first, False))
    return tl.where(a_number & b_number, both, tl.where(a_number == b_number, first, a_number))
