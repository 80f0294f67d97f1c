"""Keyed noise (`dllmc.ops.noise`) in standard operators: Philox4x32-10 on int64, whose products never overflow."""

from collections.abc import Sequence

from dllmc.export.onnx.graph import Graph
from dllmc.ops.noise import CONFIDENCE_STREAM, GUMBEL_STREAM, KEY_STEPS, LOW_WORD, MULTIPLIERS, ROUNDS

HALF_WORD = 1 << 16


def gumbel(g: Graph, seed: str, token: str, position: str, step: str) -> str:
    """Standard Gumbel noise of each token's logit, float32; int64 arguments that broadcast."""
    return _to_gumbel(g, _to_uniform(g, _lane(g, seed, token, position, step, GUMBEL_STREAM)))


def gumbel_range(g: Graph, seed: str, first: str, count: str, position: str, step: str) -> str:
    """The same of the tokens `[first, first + count)`, [rows, count]: all lanes of a counter at once.

    first, a multiple of 4, and count: int64 [1]; the others [rows, 1].
    """
    counters = g("Div", g("Add", count, g.constant([3])), g.constant([4]))
    counter = g.unsqueeze(g("Add", g.range(counters), g("Div", first, g.constant([4]))), 0)
    words = _words(g, seed, counter, position, step, GUMBEL_STREAM)
    joined = g("Concat", *(g.unsqueeze(word, 2) for word in words), axis=2)
    noise = _to_gumbel(g, _to_uniform(g, g("Flatten", joined, axis=1)))
    return g.slice(noise, 1, g.constant([0]), count)


def uniform_confidence(g: Graph, seed: str, position: str, step: str) -> str:
    """Uniform float32 in (0, 1), one a row: the confidence of rule `random`."""
    return _to_uniform(g, _lane(g, seed, g("Sub", position, position), position, step, CONFIDENCE_STREAM))


def _lane(g: Graph, seed: str, token: str, position: str, step: str, stream: int) -> str:
    words = _words(g, seed, g("Div", token, g.constant(4)), position, step, stream)
    lane = g("Mod", token, g.constant(4))
    found = words[0]
    for number, word in enumerate(words[1:], start=1):
        found = g("Where", g("Equal", lane, g.constant(number)), word, found)
    return found


def _words(g: Graph, seed: str, counter: str, position: str, step: str, stream: int) -> list[str]:
    """Four random words [..] of the arguments broadcast together."""
    zero = g("Sub", g("Add", g("Add", counter, position), step), g("Add", g("Add", counter, position), step))
    seeds = g("Add", seed, zero)
    key = [_and(g, seeds), _and(g, _upper(g, seeds))]
    state = [
        g("Add", counter, zero),
        g("Add", position, zero),
        g("Add", step, zero),
        g("Add", g.constant(stream), zero),
    ]

    def body(inner: Graph, number: str, carried: list[str]) -> Sequence[str]:
        c0, c1, c2, c3, k0, k1 = carried
        high0, low0 = _product(inner, c0, MULTIPLIERS[0])
        high1, low1 = _product(inner, c2, MULTIPLIERS[1])
        mixed = [inner("BitwiseXor", inner("BitwiseXor", h, c), k) for h, c, k in ((high1, c1, k0), (high0, c3, k1))]
        keys = [_and(inner, inner("Add", k, inner.constant(n))) for k, n in zip((k0, k1), KEY_STEPS, strict=True)]
        return [mixed[0], low1, mixed[1], low0, *keys]

    return g.loop(g.constant(ROUNDS), [*state, *key], body)[:4]


def _product(g: Graph, word: str, factor: int) -> tuple[str, str]:
    """High and low word of a product of two words, by halves of one."""
    half = g.constant(HALF_WORD)
    upper, lower = g("Div", word, half), g("BitwiseAnd", word, g.constant(HALF_WORD - 1))
    above, below = (g("Mul", part, g.constant(factor)) for part in (upper, lower))
    middle = g("Add", above, g("Div", below, half))
    rests = [g("BitwiseAnd", part, g.constant(HALF_WORD - 1)) for part in (middle, below)]
    return g("Div", middle, half), g("Add", g("Mul", rests[0], half), rests[1])


def _upper(g: Graph, seed: str) -> str:
    """The high word of a seed, which may be negative: then the division would round the other way."""
    bits = g.cast(seed, "uint64")
    return g.cast(g("BitShift", bits, g.constant(32, "uint64"), direction="RIGHT"), "int64")


def _and(g: Graph, value: str) -> str:
    return g("BitwiseAnd", value, g.constant(LOW_WORD))


def _to_uniform(g: Graph, word: str) -> str:
    upper = g.cast(g("Div", word, g.constant(1 << 9)), "float32")
    return g("Mul", g("Add", upper, g.constant(0.5, "float32")), g.constant(2.0**-23, "float32"))


def _to_gumbel(g: Graph, uniform: str) -> str:
    return g("Neg", g("Log", g("Neg", g("Log", uniform))))
