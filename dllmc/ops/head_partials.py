"""The fused head's online statistics: what a tile of logits says of each row, how two tiles merge, how a row ends.

A tile is any run of columns of the vocabulary, so a shard of it (tensor parallelism) merges as a tile does. Choices
are the same however the vocabulary is split and in whatever order parts merge; sums differ by float32 rounding.
Rules: semantics.md, "Commit".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllmc.ops import noise
from dllmc.ops.head_rows import HeadRows

# Columns reduced together when looking for a maximum: finding its block first saves a slow argmax over the tile.
_BLOCK = 256
# Elements of a tile that are sampled, filtered or summed together, so that copies of them, int64 ones too, stay small.
_PIECE = 1 << 17
# exp of anything lower is 0 in float32; keeps 0 * -inf out of entropies.
_LOWEST_EXPONENT = -200.0
_LOG2_E = 1.4426950408889634


class Partials(NamedTuple):
    """Statistics of R rows over a part of the vocabulary; logits z are clean, float32 unless said otherwise.

    Every part lists at most `HeadRows.candidates` candidates; `keys` sort as (z, lower token id first) does.
    """

    maximum: Tensor  # [R] of z
    sum_exp: Tensor  # [R] of exp(z - maximum)
    score: Tensor  # [R] the choice's z, or z / t + noise if sampled
    token: Tensor  # [R] int64: the choice: highest score, lowest token id
    logit: Tensor  # [R] the choice's z
    runner_up: Tensor  # [by_margin] the second highest z
    sum_exp_times: Tensor  # [by_entropy] sum of (z - maximum) * exp(z - maximum)
    scaled_sum: Tensor  # [filtered] sum of exp((z - maximum) / t)
    keys: Tensor  # [filtered, <= candidates] int64, in any order
    target_logit: Tensor  # [targeted] the target's z, -inf where the part has it not


def head_partials(tile: Tensor, vocab_start: int, rows: HeadRows) -> Partials:
    """Partials of logits `tile` [R, width] float32, whose first column is token `vocab_start`. Overwrites the tile.

    Transient memory: the candidates twice, and a few MiB for rows that are sampled, filtered, or wanted by entropy or
    margin: they are taken in pieces.
    """
    width = tile.shape[1]
    if rows.suppressed_row.numel():
        column = rows.suppressed_token - vocab_start
        here = (column >= 0) & (column < width)
        tile[rows.suppressed_row[here], column[here]] = -torch.inf
    target_logit = _target_logit(tile, vocab_start, rows)

    maximum, column = _first_maximum(tile)
    best, none = column, tile.new_empty(0)
    runner_up = _in_pieces(
        rows.by_margin, width, lambda piece: tile[piece].scatter_(1, best[piece, None], -torch.inf).amax(1), none
    )
    score, logit = maximum, maximum
    if rows.sampled.numel():
        drawn_score, drawn = _draw(tile, vocab_start, rows)
        score = score.index_copy(0, rows.sampled, drawn_score)
        column = column.index_copy(0, rows.sampled, drawn)
        logit = tile.gather(1, column[:, None])[:, 0]

    shift = _finite(maximum)
    no_keys = tile.new_empty((0, 0), dtype=torch.int64)
    keys = _in_pieces(
        rows.filtered, width, lambda piece: _best(_pack(tile[piece], vocab_start), rows.candidates), no_keys
    )
    tile -= shift[:, None]
    scaled_sum = _in_pieces(
        rows.filtered, width, lambda piece: tile[piece].div_(rows.temperature[piece, None]).exp_().sum(1), none
    )
    sum_exp_times = _in_pieces(rows.by_entropy, width, lambda piece: _sum_exp_times(tile[piece]), none)
    sum_exp = tile.mul_(_LOG2_E).exp2_().sum(1)  # torch's exp2 takes a third of the time of its exp
    token = column + vocab_start
    return Partials(maximum, sum_exp, score, token, logit, runner_up, sum_exp_times, scaled_sum, keys, target_logit)


def merge(a: Partials, b: Partials, rows: HeadRows) -> Partials:
    """Partials of two disjoint parts of the vocabulary together, in either order."""
    maximum = torch.maximum(a.maximum, b.maximum)
    shift = _finite(maximum)
    sum_exp, sum_exp_times = torch.zeros_like(a.sum_exp), torch.zeros_like(a.sum_exp_times)
    scaled_sum = torch.zeros_like(a.scaled_sum)
    for part in (a, b):
        rise = (part.maximum - shift).clamp_min(_LOWEST_EXPONENT)
        sum_exp += rise.exp() * part.sum_exp
        if rows.by_entropy.numel():
            entropy_rise = rise[rows.by_entropy]
            sum_exp_times += entropy_rise.exp() * (part.sum_exp_times + entropy_rise * part.sum_exp[rows.by_entropy])
        if rows.filtered.numel():
            scaled_rise = (part.maximum - shift)[rows.filtered] / rows.temperature[rows.filtered]
            scaled_sum += scaled_rise.exp() * part.scaled_sum

    better = (b.score > a.score) | ((b.score == a.score) & (b.token < a.token))
    lower_maximum = torch.minimum(a.maximum, b.maximum)[rows.by_margin]
    return Partials(
        maximum=maximum,
        sum_exp=sum_exp,
        score=torch.where(better, b.score, a.score),
        token=torch.where(better, b.token, a.token),
        logit=torch.where(better, b.logit, a.logit),
        runner_up=torch.maximum(lower_maximum, torch.maximum(a.runner_up, b.runner_up)),
        sum_exp_times=sum_exp_times,
        scaled_sum=scaled_sum,
        keys=_best_of_both(a.keys, b.keys, rows.candidates),
        target_logit=torch.maximum(a.target_logit, b.target_logit),
    )


def finish(partials: Partials, rows: HeadRows) -> tuple[Tensor, Tensor, Tensor]:
    """Token [R] int64, confidence [R] float32 and logprob [R] float32 from the partials of the whole vocabulary."""
    maximum, sum_exp, token, logit = partials.maximum, partials.sum_exp, partials.token, partials.logit
    if rows.filtered.numel():
        size = max(1, _PIECE // 4 // partials.keys.shape[1])  # smaller ones, for they are random words too
        parts = [slice(start, start + size) for start in range(0, rows.filtered.numel(), size)]
        drawn = [_draw_candidate(partials, rows, part) for part in parts]
        token = token.index_copy(0, rows.filtered, torch.cat([chosen for chosen, _ in drawn]))
        logit = logit.index_copy(0, rows.filtered, torch.cat([of_chosen for _, of_chosen in drawn]))

    confidence = (logit - maximum).exp() / sum_exp
    log_sum = sum_exp.log()
    margin = -torch.expm1(partials.runner_up - maximum[rows.by_margin]) / sum_exp[rows.by_margin]
    entropy = partials.sum_exp_times / sum_exp[rows.by_entropy] - log_sum[rows.by_entropy]
    confidence[rows.by_margin] = margin
    confidence[rows.by_entropy] = entropy
    if rows.by_random.numel():
        position, seed, step = (x[rows.by_random] for x in (rows.position, rows.seed, rows.step))
        random = noise.uniform(seed, torch.zeros_like(position), position, step, noise.CONFIDENCE_STREAM)
        confidence[rows.by_random] = random
    return token, confidence, logit.index_copy(0, rows.targeted, partials.target_logit) - maximum - log_sum


def _pieces(rows: Tensor, width: int) -> Sequence[Tensor]:
    """Indices of rows of `width` elements, a few at a time."""
    pieces: Sequence[Tensor] = rows.split(max(1, _PIECE // width))
    return pieces


def _in_pieces(rows: Tensor, width: int, function: Callable[[Tensor], Tensor], none: Tensor) -> Tensor:
    """What a function makes of rows, a few at a time: [n, ...] of n indices. none: that of no rows, for no calls."""
    return torch.cat([function(piece) for piece in _pieces(rows, width)]) if rows.numel() else none


def _sum_exp_times(x: Tensor) -> Tensor:
    """[rows]: sums of x * exp(x), of x [rows, width] at most 0, which is overwritten."""
    x.clamp_min_(_LOWEST_EXPONENT)
    return x.mul_(x.exp()).sum(1)


def _target_logit(tile: Tensor, vocab_start: int, rows: HeadRows) -> Tensor:
    """[targeted]: the targets' logits, -inf where a target is in another tile."""
    if not rows.targeted.numel():
        return tile.new_empty(0)
    column = rows.target - vocab_start
    here = (column >= 0) & (column < tile.shape[1])
    return tile[rows.targeted, column.clamp(0, tile.shape[1] - 1)].masked_fill(~here, -torch.inf)


def _draw(tile: Tensor, vocab_start: int, rows: HeadRows) -> tuple[Tensor, Tensor]:
    """Gumbel-max over the tile's unfiltered columns: the sampled rows' best scores and their columns."""
    width = tile.shape[1]

    def draw(piece: Tensor) -> tuple[Tensor, Tensor]:
        position, seed, step, temperature = (x[piece] for x in (rows.position, rows.seed, rows.step, rows.temperature))
        scores = tile[piece].div_(temperature[:, None])
        scores += noise.gumbel_range(seed, vocab_start, width, position, step)
        return _first_maximum(scores)

    drawn = [draw(piece) for piece in _pieces(rows.sampled, width)]
    return torch.cat([score for score, _ in drawn]), torch.cat([column for _, column in drawn])


def _draw_candidate(partials: Partials, rows: HeadRows, part: slice) -> tuple[Tensor, Tensor]:
    """Gumbel-max over the candidates that top-k and top-p keep: tokens and logits of a part of the filtered rows."""
    position, seed, step, temperature, maximum = (
        x[rows.filtered[part], None] for x in (rows.position, rows.seed, rows.step, rows.temperature, partials.maximum)
    )
    logit, token = _unpack(partials.keys[part].sort(dim=1, descending=True).values)
    probability = ((logit - _finite(maximum)) / temperature).exp() / partials.scaled_sum[part, None]
    better = torch.cat((torch.zeros_like(maximum), probability.cumsum(1)[:, :-1]), dim=1)
    rank = torch.arange(token.shape[1], device=token.device)
    kept = (rank < rows.top_k[part, None]) & (better <= rows.top_p[part, None])
    score = (logit / temperature + noise.gumbel(seed, token, position, step)).masked_fill(~kept, -torch.inf)
    best = score == score.amax(1, keepdim=True)
    drawn = token.masked_fill(~best, noise.LOW_WORD).argmin(1, keepdim=True)  # the lowest token id among the best
    return token.gather(1, drawn)[:, 0], logit.gather(1, drawn)[:, 0]


def _first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and its lowest column; x [rows, width]."""
    if x.shape[1] % _BLOCK:
        column = x.argmax(1)
        return x.gather(1, column[:, None])[:, 0], column
    blocks = x.view(x.shape[0], -1, _BLOCK)
    of_block = blocks.amax(2)
    block = of_block.argmax(1)
    row = torch.arange(x.shape[0], device=x.device)
    return of_block[row, block], block * _BLOCK + blocks[row, block].argmax(1)


def _finite(maximum: Tensor) -> Tensor:
    """A maximum to subtract: rows of a part whose tokens are all suppressed have -inf, and -inf - -inf is not 0."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _best(keys: Tensor, count: int) -> Tensor:
    """The `count` highest keys of each row, or all if there are fewer."""
    return keys.topk(min(count, keys.shape[1]), dim=1, sorted=False).values


def _best_of_both(a: Tensor, b: Tensor, count: int) -> Tensor:
    """`_best` of the keys in both, a few rows at a time."""
    width = a.shape[1] + b.shape[1]
    best = a.new_empty(a.shape[0], min(count, width))
    size = max(1, _PIECE // max(1, width))
    for part in zip(best.split(size), a.split(size), b.split(size), strict=True):
        part[0].copy_(_best(torch.cat(part[1:], dim=1), count))
    return best


def _pack(logits: Tensor, vocab_start: int) -> Tensor:
    """Int64 keys [rows, width] in the order of (logit, lower token id first): one top-k settles ties exactly."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0, and must not sort below it
    token = torch.arange(vocab_start, vocab_start + logits.shape[1], device=logits.device)
    return _ordered(bits).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(noise.LOW_WORD - token)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (float32) and tokens (int64) of packed keys."""
    return _ordered((keys >> 32).to(torch.int32)).view(torch.float32), noise.LOW_WORD - (keys & noise.LOW_WORD)


def _ordered(bits: Tensor) -> Tensor:
    """Float32 bit patterns as int32 in the floats' order, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)
