"""What the parts of a tile of logits say of each row: the fused head's online statistics on a GPU.

    hidden: [rows, width], weight: [vocab, width], any strides; or logits: [rows, columns] float32, products of the two
    -> statistics: [7, rows, parts], target_logit: [rows]; logits of the rows that choose among their best tokens

A program takes rows_at_once rows and part columns:
    1. multiply, or load the products; add the bias, scale, and suppress
    2. maximum, its lowest token, and sum of exponentials; what rows want besides, where any of the program's does
    3. store
Statistics of a part, float32 but for the token: 0 maximum of z; 1 sum of exp(z - maximum); 2 the choice, int32; 3 its
score (z / t + noise) and 4 its z, of sampled rows; 5 the second highest z, or the sum of (z - maximum) * exp(z -
maximum), by rule; 6 sum of exp((z - maximum) / t), of filtered rows. What a row does not want is not written.
"""

import triton
import triton.language as tl

from dllmc.ops import noise
from dllmc.ops.head_rows import ConfidenceRule
from dllmc.ops.kernels.head_rows import choice_of, segment_of, some
from dllmc.ops.kernels.noise import gumbel_tile

# What changes from step to step, for whose values no kernel is compiled anew.
VARYING = ("rows", "segments", "first", "behind", "parts")

MARGIN = tl.constexpr(int(ConfidenceRule.TOPK_MARGIN))
ENTROPY = tl.constexpr(int(ConfidenceRule.ENTROPY))
GUMBEL_STREAM = tl.constexpr(noise.GUMBEL_STREAM)
# exp of anything lower is 0 in float32; keeps 0 * -inf out of entropies.
LOWEST_EXPONENT = tl.constexpr(-200.0)
NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def reduce_tile(
    hidden_ptr: tl.tensor,
    hidden_row: tl.tensor,
    hidden_column: tl.tensor,
    weight_ptr: tl.tensor,
    weight_row: tl.tensor,
    weight_column: tl.tensor,
    bias_ptr: tl.tensor,
    bias_column: tl.tensor,
    scale: tl.tensor,
    row_segment_ptr: tl.tensor,
    row_position_ptr: tl.tensor,
    row_target_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    rule_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    step_ptr: tl.tensor,
    suppressed_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    rows: tl.tensor,
    segments: tl.tensor,
    suppressed_tokens: tl.tensor,
    first: tl.tensor,
    behind: tl.tensor,
    width: tl.tensor,
    parts: tl.tensor,
    multiplies: tl.constexpr,
    rows_at_once: tl.constexpr,
    part: tl.constexpr,
    width_at_once: tl.constexpr,
    suppressed_lanes: tl.constexpr,
) -> None:
    # 1. logits
    row = tl.program_id(1).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)
    start = first + tl.program_id(0) * part
    column = start + tl.arange(0, part)
    here, inside = row < rows, column < behind
    there = here[:, None] & inside[None, :]
    logits_ptr += row[:, None] * (behind - first) + (column - first)[None, :]
    if multiplies:
        at = tl.arange(0, width_at_once)
        hidden_ptr += row[:, None] * hidden_row + at[None, :] * hidden_column
        weight_ptr += column.to(tl.int64)[:, None] * weight_row + at[None, :] * weight_column
        z = tl.zeros((rows_at_once, part), tl.float32)
        for done in range(0, width, width_at_once):
            left = (at < width - done)[None, :]
            h = tl.load(hidden_ptr, mask=here[:, None] & left, other=0.0)
            w = tl.load(weight_ptr, mask=inside[:, None] & left, other=0.0)
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
            hidden_ptr += width_at_once * hidden_column
            weight_ptr += width_at_once * weight_column
    else:
        z = tl.load(logits_ptr, mask=there, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column.to(tl.int64) * bias_column, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = tl.where(inside[None, :], z * scale, -float("inf"))

    segment = segment_of(row_segment_ptr, row, rows, segments)
    of_row = suppressed_ptr + segment * suppressed_tokens
    if suppressed_lanes > 0:
        lane = tl.arange(0, suppressed_lanes)[None, :]
        tokens = tl.load(of_row[:, None] + lane, mask=here[:, None] & (lane < suppressed_tokens), other=-1)
        if some(tl.max(((tokens >= start) & (tokens < start + part)).to(tl.int32), axis=1)):
            for index in range(0, suppressed_tokens):
                token = tl.load(of_row + index, mask=here, other=-1)
                z = tl.where(column[None, :] == token[:, None], -float("inf"), z)

    # 2. the part's statistics
    place = row * parts + start // part
    whole = rows.to(tl.int64) * parts
    maximum = tl.max(z, axis=1)
    choice = tl.min(tl.where(z == maximum[:, None], column[None, :], NO_TOKEN), axis=1)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)[:, None]
    tl.store(statistics_ptr + place, maximum, mask=here)
    tl.store(statistics_ptr + whole + place, tl.sum(tl.exp(z - shift), axis=1), mask=here)

    target = tl.load(row_target_ptr + row, mask=here, other=-1)
    held = (target >= start) & (target < tl.minimum(start + part, behind))
    if some(held):
        target_logit = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)
        tl.store(target_logit_ptr + row, target_logit, mask=held)
    rule = tl.load(rule_ptr + segment)
    if some(rule == MARGIN):
        second = tl.max(tl.where(column[None, :] == choice[:, None], -float("inf"), z), axis=1)
        tl.store(statistics_ptr + 5 * whole + place, second, mask=here & (rule == MARGIN))
    if some(rule == ENTROPY):
        x = tl.maximum(z - shift, LOWEST_EXPONENT)
        times = tl.sum(x * tl.exp(x), axis=1)
        tl.store(statistics_ptr + 5 * whole + place, times, mask=here & (rule == ENTROPY))

    temperature, sampled, filtered = choice_of(segment, temperature_ptr, top_k_ptr, top_p_ptr)
    sampled, filtered = sampled & here, filtered & here
    divisor = tl.where(temperature > 0, temperature, 1.0)[:, None]
    if some(sampled):
        seed, step = tl.load(seed_ptr + segment), tl.load(step_ptr + segment)
        position = tl.load(row_position_ptr + row, mask=here, other=0)
        score = tl.div_rn(z, divisor) + gumbel_tile(seed, start, position, step, GUMBEL_STREAM, rows_at_once, part)
        best = tl.max(score, axis=1)
        drawn = tl.min(tl.where(score == best[:, None], column[None, :], NO_TOKEN), axis=1)
        choice = tl.where(sampled, drawn, choice)
        logit = tl.sum(tl.where(column[None, :] == choice[:, None], z, 0.0), axis=1)
        tl.store(statistics_ptr + 3 * whole + place, best, mask=sampled)
        tl.store(statistics_ptr + 4 * whole + place, logit, mask=sampled)
    if some(filtered):
        tl.store(statistics_ptr + 6 * whole + place, tl.sum(tl.exp((z - shift) / divisor), axis=1), mask=filtered)
        tl.store(logits_ptr, z, mask=there & filtered[:, None])

    # 3. the choice
    tl.store(statistics_ptr.to(tl.pointer_type(tl.int32)) + 2 * whole + place, choice, mask=here)
