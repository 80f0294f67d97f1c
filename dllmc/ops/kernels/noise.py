"""Keyed noise on a GPU: the words of `dllmc.ops.noise`, bit for bit, and the numbers that are made of them.

Triton's own Philox is the same function. Its logarithm is not good enough: a GPU's fast one is off by an absolute 2^-22
near 1, where Gumbel noise needs what is left of log(u).
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def gumbel_tile(
    seed: tl.tensor,
    first: tl.tensor,
    position: tl.tensor,
    step: tl.tensor,
    stream: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> tl.tensor:
    """Gumbel noise [rows, columns] of the tokens from `first` on, a multiple of 4; seed, position, step: [rows] int64.

    The four lanes of a counter are drawn at once.
    """
    counter = (first // 4 + tl.arange(0, columns // 4))[None, :]
    a, b, c, d = _words(seed[:, None], counter, position[:, None], step[:, None], stream)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows, columns))
    return _gumbel(words)


@triton.jit  # type: ignore[untyped-decorator]
def gumbel(seed: tl.tensor, token: tl.tensor, position: tl.tensor, step: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """Gumbel noise of tokens; the arguments broadcast."""
    return _gumbel(_word(seed, token, position, step, stream))


@triton.jit  # type: ignore[untyped-decorator]
def uniform(seed: tl.tensor, token: tl.tensor, position: tl.tensor, step: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """Uniform float32 in (0, 1) of tokens; the arguments broadcast."""
    return _uniform(_word(seed, token, position, step, stream))


@triton.jit  # type: ignore[untyped-decorator]
def log(x: tl.tensor) -> tl.tensor:
    """The natural logarithm of positive, normal float32, to within a unit in the last place; NaN and infinity as it is.

    x = 2^k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) as in FreeBSD's `e_logf.c`.
    """
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    series = z * (0.66666662693 + w * 0.28498786688) + w * (0.40000972152 + w * 0.24279078841)
    half_square = 0.5 * f * f
    result = s * (half_square + series) + k * 9.0580006145e-06 - half_square + f + k * 6.9313812256e-01
    return tl.where(x < float("inf"), result, x)


@triton.jit  # type: ignore[untyped-decorator]
def _word(seed: tl.tensor, token: tl.tensor, position: tl.tensor, step: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """The token's lane of its counter's words."""
    a, b, c, d = _words(seed, token // 4, position, step, stream)
    lane = token % 4
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit  # type: ignore[untyped-decorator]
def _words(
    seed: tl.tensor, counter: tl.tensor, position: tl.tensor, step: tl.tensor, stream: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    words = counter.to(tl.uint32), position.to(tl.uint32), step.to(tl.uint32), tl.full((), stream, tl.uint32)
    a, b, c, d = tl.philox(seed, words[0], words[1], words[2], words[3])
    return a, b, c, d


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(word: tl.tensor) -> tl.tensor:
    """The upper 23 bits, and a half: exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit  # type: ignore[untyped-decorator]
def _gumbel(word: tl.tensor) -> tl.tensor:
    return -log(-log(_uniform(word)))
