"""Keyed noise: random numbers as a pure function of (seed, stream, position, token id, step), semantics.md "Commit".

Counter-based, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that neither
the batch a request shares, nor how the vocabulary is tiled or sharded, changes a draw.
key = (seed's low word, seed's high word), counter = (token id // 4, position, step, stream); lane = token id % 4.
"""

import torch
from torch import Tensor

GUMBEL_STREAM = 0
CONFIDENCE_STREAM = 1

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW_WORD = 0xFFFFFFFF

# Counters a Philox call works on at a time, so that its int64 words stay in cache.
_COUNTERS = 1 << 16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random 32-bit words for each counter; all words int64 in [0, 2**32), any shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The low 64 bits of a product hold both of its words; c1 and c3 keep theirs unmasked, the next `&` clears it.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> 32 ^ (c1 ^ k0)) & LOW_WORD
        c2 = (product0 >> 32 ^ (c3 ^ k1)) & LOW_WORD
        c1, c3 = product1, product0
        k0, k1 = k0 + KEY_STEPS[0] & LOW_WORD, k1 + KEY_STEPS[1] & LOW_WORD
    return c0, c1 & LOW_WORD, c2, c3 & LOW_WORD


def uniform(seed: Tensor, token: Tensor, position: Tensor, step: Tensor, stream: int) -> Tensor:
    """Uniform float32 in (0, 1), one for each element of the int64 arguments, which broadcast."""
    words = torch.stack(_words(seed, token // 4, position, step, stream), dim=-1)
    lane = (token % 4).expand(words.shape[:-1])
    return _to_uniform(words.gather(-1, lane[..., None])[..., 0])


def gumbel(seed: Tensor, token: Tensor, position: Tensor, step: Tensor) -> Tensor:
    """Standard Gumbel noise of a token's logit, float32, one for each element of the arguments, which broadcast."""
    return _to_gumbel_(uniform(seed, token, position, step, GUMBEL_STREAM))


def gumbel_range(seed: Tensor, first_token: int, count: int, position: Tensor, step: Tensor) -> Tensor:
    """Gumbel noise [n, count] float32 of the tokens from `first_token` on; seed, position, step [n] int64.

    Equals `gumbel` at those tokens, but draws all four lanes of a counter at once.
    """
    rows = seed.shape[0]
    first, last = first_token // 4, (first_token + count + 3) // 4
    noise = torch.empty(rows, last - first, 4, device=seed.device)
    stride = max(1, _COUNTERS // max(1, rows))
    for start in range(first, last, stride):
        counters = torch.arange(start, min(start + stride, last), device=seed.device)
        words = _words(seed[:, None], counters[None], position[:, None], step[:, None], GUMBEL_STREAM)
        part = noise[:, start - first : start - first + stride]
        for lane, word in enumerate(words):
            part[..., lane] = _to_uniform(word)
        _to_gumbel_(part)
    skipped = first_token - 4 * first
    return noise.flatten(1)[:, skipped : skipped + count]


def _words(seed: Tensor, counter: Tensor, position: Tensor, step: Tensor, stream: int) -> Words:
    key = seed & LOW_WORD, seed >> 32 & LOW_WORD
    return philox4x32((counter, position, step, torch.full_like(step, stream)), key)


def _to_uniform(word: Tensor) -> Tensor:
    """The upper 23 bits, and a half: exact in float32, never 0 and never 1."""
    return (word >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _to_gumbel_(u: Tensor) -> Tensor:
    return u.log_().neg_().log_().neg_()
