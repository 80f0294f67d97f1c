"""Rows that choose among their best tokens (top-k, top-p): up to 1024 candidates, kept from tile to tile, then a draw.

    logits: [rows, columns] float32 of those rows; keys: [rows, most] int64

A key sorts as (z, lower token first) does: the bits of z as an int32 of the same order, then 2^32 - 1 - token. A row's
keys stand in the order of their tokens. A program takes a row; of rows that do not filter it ends at once:
    1. four passes over the bytes of the keys so far and of the tile's logits find the last one that stays
    2. prefix sums number what stays, in the order of the tokens: of equals, the first
"""

import triton
import triton.language as tl

from dllmc.ops import noise
from dllmc.ops.kernels.head_rows import candidates_of, choice_of, segment_of
from dllmc.ops.kernels.noise import gumbel

# Logits that a program holds at once: no fewer than its threads, which would count some twice.
SELECTED = 4096
# What changes from step to step, for whose values no kernel is compiled anew.
VARYING = ("rows", "segments", "first", "behind")

# Candidates that each is compared with at once, to add up the probability of its betters.
COMPARED = tl.constexpr(32)
GUMBEL_STREAM = tl.constexpr(noise.GUMBEL_STREAM)
LOW_WORD = tl.constexpr(noise.LOW_WORD)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def select_candidates(
    logits_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    row_segment_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    rows: tl.tensor,
    segments: tl.tensor,
    first: tl.tensor,
    behind: tl.tensor,
    most: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    segment = segment_of(row_segment_ptr, row, rows, segments)
    _, _, filtered = choice_of(segment, temperature_ptr, top_k_ptr, top_p_ptr)
    if filtered == 0:
        return
    columns = behind - first
    logits_ptr += row * columns
    keys_ptr += row * most
    limit = candidates_of(segment, top_k_ptr, most)
    slot = tl.arange(0, most)
    held = slot < tl.minimum(limit, first)
    keys = tl.load(keys_ptr + slot, mask=held, other=0)
    before = _unsigned((keys >> 32).to(tl.int32))
    wanted = tl.minimum(limit, tl.minimum(limit, first) + columns)

    # 1. the last one that stays, byte by byte from the highest, and how many of its equals stay
    edge = tl.zeros((), tl.uint32)
    byte = tl.arange(0, 256)
    for step in tl.static_range(4):
        lowest = 24 - 8 * step
        found = tl.histogram(_byte(before, lowest), 256, mask=_alike(before, edge, lowest, held))
        for done in range(0, columns, at_once):
            column = done + tl.arange(0, at_once)
            inside = column < columns
            here = _unsigned(_ordered(tl.load(logits_ptr + column, mask=inside, other=0.0)))
            found += tl.histogram(_byte(here, lowest), 256, mask=_alike(here, edge, lowest, inside))
        larger = tl.sum(found, axis=0) - tl.cumsum(found, axis=0)
        last = (larger < wanted) & (larger + found >= wanted)
        edge |= tl.sum(tl.where(last, byte, 0), axis=0).to(tl.uint32) << lowest
        wanted -= tl.sum(tl.where(last, larger, 0), axis=0)

    # 2. all that are larger, and the first of its equals
    stays, equals = _stays(before, edge, held, 0, wanted)
    tl.debug_barrier()  # keys are all loaded
    filled = _append(keys_ptr, keys, stays, 0)
    for done in range(0, columns, at_once):
        column = done + tl.arange(0, at_once)
        inside = column < columns
        ordered = _ordered(tl.load(logits_ptr + column, mask=inside, other=0.0))
        here = _unsigned(ordered)
        chosen, equals = _stays(here, edge, inside, equals, wanted)
        key = (ordered.to(tl.int64) << 32) | ((first + column).to(tl.int64) ^ LOW_WORD)
        filled = _append(keys_ptr, key, chosen, filled)


@triton.jit  # type: ignore[untyped-decorator]
def _stays(
    x: tl.tensor, edge: tl.tensor, inside: tl.tensor, equals: tl.tensor, wanted: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """What is larger than the edge, and of its equals the first `wanted`, if `equals` have been; those then."""
    equal = (inside & (x == edge)).to(tl.int32)
    stays = inside & ((x > edge) | ((equal > 0) & (equals + tl.cumsum(equal, axis=0) <= wanted)))
    return stays, equals + tl.sum(equal, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _append(keys_ptr: tl.tensor, keys: tl.tensor, stays: tl.tensor, filled: tl.tensor) -> tl.tensor:
    """Store those that stay behind those that are there; how many there are then."""
    number = tl.cumsum(stays.to(tl.int32), axis=0)
    tl.store(keys_ptr + filled + number - 1, keys, mask=stays)
    return filled + tl.sum(stays.to(tl.int32), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def draw_candidate(
    keys_ptr: tl.tensor,
    count: tl.tensor,
    maximum: tl.tensor,
    scaled_sum: tl.tensor,
    temperature: tl.tensor,
    top_p: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    step: tl.tensor,
    most: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gumbel-max over a row's `count` candidates, or those that top-p keeps: the token, int64, and its z.

    maximum: of z over the vocabulary. scaled_sum: of exp((z - maximum) / temperature).
    """
    slot = tl.arange(0, most)
    there = slot < count
    keys = tl.load(keys_ptr + slot, mask=there, other=NO_KEY)
    z, token = _unpacked(keys)
    kept = there
    if top_p < 1:
        better = tl.zeros((most,), tl.float32)
        for done in range(0, count, COMPARED):
            other = done + tl.arange(0, COMPARED)
            others = tl.load(keys_ptr + other, mask=other < count, other=NO_KEY)
            probability = tl.exp((_unpacked(others)[0] - maximum) / temperature) / scaled_sum
            better += tl.sum(tl.where(others[:, None] > keys[None, :], probability[:, None], 0.0), axis=0)
        kept = there & (better <= top_p)
    score = tl.div_rn(z, temperature) + gumbel(seed, token, position, step, GUMBEL_STREAM)
    score = tl.where(kept, score, -float("inf"))
    drawn = tl.min(tl.where(score == tl.max(score, axis=0), token, LOW_WORD), axis=0)
    return drawn, tl.sum(tl.where(there & (token == drawn), z, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _unpacked(keys: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The z and the token, int64, of keys."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), (keys & LOW_WORD) ^ LOW_WORD


@triton.jit  # type: ignore[untyped-decorator]
def _ordered(z: tl.tensor) -> tl.tensor:
    """The bits of float32 as int32 in the floats' order; zeros of both signs are equal."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _unsigned(ordered: tl.tensor) -> tl.tensor:
    """In the same order as uint32, whose bytes sort alike."""
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit  # type: ignore[untyped-decorator]
def _byte(x: tl.tensor, lowest: tl.constexpr) -> tl.tensor:
    return ((x >> lowest) & 255).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _alike(x: tl.tensor, edge: tl.tensor, lowest: tl.constexpr, inside: tl.tensor) -> tl.tensor:
    """Whether the bytes above are those of the edge."""
    if lowest < 24:
        inside = inside & (x >> (lowest + 8) == edge >> (lowest + 8))
    return inside
