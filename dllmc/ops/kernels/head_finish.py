"""A row of the fused head from the statistics of all its parts: token, confidence and log-probability.

    statistics: [7, rows, parts] of `dllmc.ops.kernels.head_reduce`, keys: [rows, most] int64, target_logit: [rows]
    -> token: [rows] int64, confidence, logprob: [rows] float32; any strides

A program takes a row and holds all its parts at once, so the order in which they are added never changes.
"""

import triton
import triton.language as tl

from dllmc.ops import noise
from dllmc.ops.head_rows import ConfidenceRule
from dllmc.ops.kernels.head_reduce import ENTROPY, LOWEST_EXPONENT, MARGIN, NO_TOKEN
from dllmc.ops.kernels.head_rows import candidates_of, choice_of, segment_of
from dllmc.ops.kernels.head_select import draw_candidate
from dllmc.ops.kernels.noise import log, uniform

VARYING = ("rows", "segments", "parts")

RANDOM = tl.constexpr(int(ConfidenceRule.RANDOM))
CONFIDENCE_STREAM = tl.constexpr(noise.CONFIDENCE_STREAM)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def finish_rows(
    statistics_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    row_segment_ptr: tl.tensor,
    row_position_ptr: tl.tensor,
    row_target_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    rule_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    step_ptr: tl.tensor,
    token_ptr: tl.tensor,
    token_row: tl.tensor,
    confidence_ptr: tl.tensor,
    confidence_row: tl.tensor,
    logprob_ptr: tl.tensor,
    logprob_row: tl.tensor,
    rows: tl.tensor,
    segments: tl.tensor,
    vocab: tl.tensor,
    parts: tl.tensor,
    most: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    segment = segment_of(row_segment_ptr, row, rows, segments)
    seed, step, rule = tl.load(seed_ptr + segment), tl.load(step_ptr + segment), tl.load(rule_ptr + segment)
    position, target = tl.load(row_position_ptr + row), tl.load(row_target_ptr + row)
    part = tl.arange(0, lanes)
    there = part < parts
    whole = rows.to(tl.int64) * parts
    place = statistics_ptr + row * parts + part

    maxima = tl.load(place, mask=there, other=-float("inf"))
    maximum = tl.max(maxima, axis=0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    rise = tl.maximum(maxima - shift, LOWEST_EXPONENT)
    sums = tl.load(place + whole, mask=there, other=0.0)
    sum_exp = tl.sum(tl.exp(rise) * sums, axis=0)
    choices = tl.load(place.to(tl.pointer_type(tl.int32)) + 2 * whole, mask=there, other=NO_TOKEN)
    token = tl.min(tl.where(maxima == maximum, choices, NO_TOKEN), axis=0).to(tl.int64)
    logit = maximum

    temperature, sampled, filtered = choice_of(segment, temperature_ptr, top_k_ptr, top_p_ptr)
    if sampled:
        scores = tl.load(place + 3 * whole, mask=there, other=-float("inf"))
        token = tl.min(tl.where(scores == tl.max(scores, axis=0), choices, NO_TOKEN), axis=0).to(tl.int64)
        logits = tl.load(place + 4 * whole, mask=there, other=0.0)
        logit = tl.sum(tl.where(choices == token, logits, 0.0), axis=0)
    if filtered:
        count = tl.minimum(candidates_of(segment, top_k_ptr, most), vocab)
        scaled_sums = tl.load(place + 6 * whole, mask=there, other=0.0)
        scaled_sum = tl.sum(tl.exp((maxima - shift) / temperature) * scaled_sums, axis=0)
        top_p = tl.load(top_p_ptr + segment)
        token, logit = draw_candidate(
            keys_ptr + row * most, count, shift, scaled_sum, temperature, top_p, seed, position, step, most
        )

    log_sum = log(sum_exp)
    confidence = tl.exp(logit - maximum) / sum_exp
    if rule == MARGIN:
        seconds = tl.load(place + 5 * whole, mask=there, other=-float("inf"))
        best = tl.min(tl.where(maxima == maximum, part, lanes), axis=0)
        second = tl.max(tl.where(part == best, seconds, maxima), axis=0)
        confidence = _one_less_exp(second - maximum) / sum_exp
    if rule == ENTROPY:
        times = tl.load(place + 5 * whole, mask=there, other=0.0)
        confidence = tl.sum(tl.exp(rise) * (times + rise * sums), axis=0) / sum_exp - log_sum
    if rule == RANDOM:
        confidence = uniform(seed, tl.zeros((), tl.int64), position, step, CONFIDENCE_STREAM)
    if target >= 0:
        logit = tl.load(target_logit_ptr + row, mask=target < vocab, other=-float("inf"))
    tl.store(token_ptr + row * token_row, tl.minimum(token, vocab - 1))
    tl.store(confidence_ptr + row * confidence_row, confidence)
    tl.store(logprob_ptr + row * logprob_row, logit - maximum - log_sum)


@triton.jit  # type: ignore[untyped-decorator]
def _one_less_exp(x: tl.tensor) -> tl.tensor:
    """1 - exp(x) of x at most 0, exact to float32 near 0 too: the error of exp(x) cancels in (1 - e) / log(e)."""
    e = tl.exp(x)
    small = tl.where(e == 1, -x, (1 - e) * x / log(tl.where((x < -1) | (e == 1), 0.5, e)))
    return tl.where(x < -1, 1 - e, small)
