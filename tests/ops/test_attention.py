"""`dllmc::attention` against softmax(q k^T * scale) v written in numpy, over shapes, layouts and segments."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dllmc.ops.attention import QUERY_CHUNK, WINDOW_QUERY_CHUNK, attention_out, reference
from dllmc.ops.registry import operator

Array = NDArray[np.float64]
UNTOUCHED = 77.0


Spans = list[tuple[int, int]]
Make = Callable[[int, tuple[int, int], int], tuple[Tensor, Tensor, Tensor]]  # tokens, (q, kv) heads, head size


def expected_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Spans,
    scale: float,
    spans: Spans | None = None,
    window: int | None = None,
) -> Array:
    """One query at a time, in float64; UNTOUCHED where no span is. `spans`: the segments' queries, if not all."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    out = np.full(queries.shape, UNTOUCHED)
    for (first, last), (start, end) in zip(spans or segments, segments, strict=True):
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            for token in range(first, last):
                left, right = (
                    (start, end) if window is None else (max(start, token - window), min(end, token + window + 1))
                )
                scores = keys[left:right, shared] @ queries[token, head] * scale
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values[left:right, shared] / weights.sum()
    return out


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def contiguous(tokens: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q_heads, kv_heads = heads
    return tuple(random(tokens, n, dim, seed=n + i) for i, n in enumerate((q_heads, kv_heads, kv_heads)))  # type: ignore[return-value]


def one_projection(tokens: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows on one tensor [tokens, (q_heads + 2 kv_heads) * head_dim]."""
    q_heads, kv_heads = heads
    fused = random(tokens, q_heads + 2 * kv_heads, dim, seed=1)
    q, k, v = fused.split((q_heads, kv_heads, kv_heads), dim=1)
    return q, k, v


def heads_first(tokens: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, tokens, head_dim] in memory, as after a rotary embedding on transposed heads."""
    return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in contiguous(tokens, heads, dim))  # type: ignore[return-value]


def mixed(tokens: int, heads: tuple[int, int], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries heads first, keys tokens first, values with elements apart."""
    q, _, _ = heads_first(tokens, heads, dim)
    _, k, v = contiguous(tokens, heads, dim)
    return q, k, torch.stack((v, v), dim=-1)[..., 1]


LAYOUTS = (contiguous, one_projection, heads_first, mixed)


def check(
    make: Make,
    heads: tuple[int, int],
    dim: int,
    segments: list[tuple[int, int]],
    tokens: int,
    scale: float,
) -> None:
    q, k, v = make(tokens, heads, dim)
    out = torch.full(q.shape, UNTOUCHED)
    attention_out(q, k, v, *[torch.tensor(segments).view(-1, 2)] * 2, scale, out)
    np.testing.assert_allclose(out.double().numpy(), expected_of(q, k, v, segments, scale), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dim", [2, 8, 20, 64])
def test_shapes_and_layouts(make: Make, heads: tuple[int, int], dim: int) -> None:
    """One to eight query heads a KV head, head sizes that are no multiple of a vector, views of any strides."""
    check(make, heads, dim, [(0, 3), (3, 4), (4, 21)], 21, 1 / math.sqrt(dim))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.sampled_from(LAYOUTS),
    st.tuples(st.integers(1, 3), st.integers(1, 8)),
    st.integers(1, 24),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=5),
    st.floats(0.05, 2),
)
def test_any_segments(
    make: Make,
    heads: tuple[int, int],
    dim: int,
    gaps_and_lengths: list[tuple[int, int]],
    scale: float,
) -> None:
    """Segments of any lengths with gaps between them: each attends to its own, what lies outside is left as it is."""
    segments, end = [], 0
    for gap, length in gaps_and_lengths:
        segments.append((end + gap, end + gap + length))
        end += gap + length
    kv_heads, group = heads
    check(make, (kv_heads * group, kv_heads), dim, segments, end + 2, scale)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.sampled_from(LAYOUTS), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(0, 5)), max_size=4)
)
def test_fewer_or_more_queries_than_tokens(make: Make, sizes: list[tuple[int, int, int]]) -> None:
    """A segment's queries stand anywhere, in any number, none too; each reads all of its segment and no other."""
    segments, spans, tokens, queries = [], [], 0, 0
    for length, gap, count in sizes:
        segments.append((tokens, tokens + length))
        spans.append((queries + gap, queries + gap + count))
        tokens, queries = tokens + length, queries + gap + count
    _, k, v = make(tokens + 1, (4, 2), 8)
    q, _, _ = make(queries + 2, (4, 2), 8)
    out, reference_out = torch.full(q.shape, UNTOUCHED), reference(q, k, v, *tables(spans, segments), 0.3)
    attention_out(q, k, v, *tables(spans, segments), 0.3, out)
    expected = expected_of(q, k, v, segments, 0.3, spans)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(reference_out, np.where(expected == UNTOUCHED, 0, expected), rtol=1e-4, atol=2e-5)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data(), st.sampled_from(LAYOUTS), st.none() | st.integers(0, 12))
def test_some_of_the_queries(data: st.DataObject, make: Make, window: int | None) -> None:
    """Those from number `first` on, of one segment or several, with all keys; spans count all queries."""
    segments, spans, tokens, queries = [], [], 0, 0
    for _ in range(data.draw(st.integers(1, 4))):
        length = data.draw(st.integers(1, 90))
        count = length if window is not None else data.draw(st.integers(0, 9))
        gap = 0 if window is not None else data.draw(st.integers(0, 2))
        segments.append((tokens, tokens + length))
        spans.append((queries + gap, queries + gap + count))
        tokens, queries = tokens + length, queries + gap + count
    _, k, v = make(tokens, (4, 2), 8)
    q, _, _ = make(max(queries, 1), (4, 2), 8)
    first = data.draw(st.integers(0, len(q) - 1))
    held = slice(first, data.draw(st.integers(first + 1, len(q))))
    expected = expected_of(q, k, v, segments, 0.3, spans, window)[held]
    out = torch.full(q[held].shape, UNTOUCHED)
    attention_out(q[held], k, v, *tables(spans, segments), 0.3, out, window, first)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=1e-4, atol=2e-5)
    found = reference(q[held], k, v, *tables(spans, segments), 0.3, window, first)
    np.testing.assert_allclose(found, np.where(expected == UNTOUCHED, 0, expected), rtol=1e-4, atol=2e-5)
    bound = torch.full(q[held].shape, UNTOUCHED)
    args = [q[held], k, v, *tables(spans, segments), 0.3, window, first]
    operator("dllmc.attention.default").bind(args, [bound], None)()
    assert torch.equal(bound, out)


def tables(*spans: Spans) -> list[Tensor]:
    """Each as the operator takes it: [segments, 2] int64."""
    return [torch.tensor(listed, dtype=torch.int64).view(-1, 2) for listed in spans]


def test_segments_longer_than_a_chunk_of_queries() -> None:
    """Every chunk of queries, the last one short, sees all keys of its segment and none of the next."""
    tokens, start = 2 * QUERY_CHUNK + 44, 10
    q, k, v = heads_first(tokens, (2, 1), 4)
    out = torch.full(q.shape, UNTOUCHED)
    attention_out(q, k, v, *[torch.tensor([[start, tokens - 5], [tokens - 5, tokens]])] * 2, 0.5, out)
    expected = expected_of(q, k, v, [(start, tokens - 5), (tokens - 5, tokens)], 0.5)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=1e-4, atol=2e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=4),
    st.integers(0, 22),
)
def test_a_window_shows_the_tokens_around_each(
    make: Make, heads: tuple[int, int], gaps_and_lengths: list[tuple[int, int]], window: int
) -> None:
    """Those of its segment at most `window` away, itself among them, wherever the segment lies."""
    segments, end = [], 0
    for gap, length in gaps_and_lengths:
        segments.append((end + gap, end + gap + length))
        end += gap + length
    q, k, v = make(end + 1, heads, 8)
    out, table = torch.full(q.shape, UNTOUCHED), tables(segments)[0]
    attention_out(q, k, v, table, table, 0.3, out, window)
    expected = expected_of(q, k, v, segments, 0.3, window=window)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=1e-4, atol=2e-5)
    found = reference(q, k, v, table, table, 0.3, window)
    np.testing.assert_allclose(found, np.where(expected == UNTOUCHED, 0, expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [0, 1, WINDOW_QUERY_CHUNK - 1, WINDOW_QUERY_CHUNK, 3 * WINDOW_QUERY_CHUNK])
def test_windows_across_chunks_of_queries(window: int) -> None:
    """Each chunk reads the keys in reach of its queries: at the ends of a segment, and in the middle."""
    tokens, start = 4 * WINDOW_QUERY_CHUNK + 9, 5
    q, k, v = heads_first(tokens, (2, 1), 4)
    segments = [(start, tokens - 3), (tokens - 3, tokens)]
    out, table = torch.full(q.shape, UNTOUCHED), tables(segments)[0]
    attention_out(q, k, v, table, table, 0.5, out, window)
    expected = expected_of(q, k, v, segments, 0.5, window=window)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_windows_of_one_sequence_before_packing(heads: tuple[int, int]) -> None:
    """`window_attention` takes [1, heads, tokens, head_dim], as torch's own attention does, and gives the same."""
    tokens_first = contiguous(70, heads, 8)
    q, k, v = (x.transpose(0, 1)[None] for x in tokens_first)
    found = torch.ops.dllmc.window_attention(q, k, v, 0.3, 6)
    expected = expected_of(*tokens_first, [(0, 70)], 0.3, window=6)
    np.testing.assert_allclose(found[0].transpose(0, 1), expected, rtol=1e-4, atol=2e-5)
    meta = torch.ops.dllmc.window_attention(*(x.to("meta") for x in (q, k, v)), 0.3, 6)
    assert (meta.shape, meta.dtype, meta.stride()) == (found.shape, found.dtype, found.stride())


def test_large_scores_do_not_overflow() -> None:
    """Scores of hundreds: one key takes all, and nothing becomes inf or nan."""
    q, k, v = (x * 40 for x in contiguous(9, (2, 1), 8))
    out = torch.empty(q.shape)
    attention_out(q, k, v, *[torch.tensor([[0, 9]])] * 2, 1.0, out)
    np.testing.assert_allclose(out.double().numpy(), expected_of(q, k, v, [(0, 9)], 1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)]
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Inputs as they are rounded; sums at least in float32."""
    q, k, v = (x.to(dtype) for x in one_projection(30, (4, 2), 16))
    out = torch.empty_like(q)
    attention_out(q, k, v, *[torch.tensor([[0, 11], [11, 30]])] * 2, 0.25, out)
    expected = expected_of(q, k, v, [(0, 11), (11, 30)], 0.25)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_the_reference_is_the_definition() -> None:
    """In float64, to the last digits; 0 outside segments."""
    q, k, v = (x.double() for x in one_projection(12, (6, 2), 5))
    expected = expected_of(q, k, v, [(1, 8), (9, 12)], 0.4)
    found = reference(q, k, v, *[torch.tensor([[1, 8], [9, 12]])] * 2, 0.4).numpy()
    np.testing.assert_allclose(found, np.where(expected == UNTOUCHED, 0, expected), rtol=1e-12, atol=1e-12)


def test_as_a_torch_operator_and_as_an_instruction() -> None:
    """The graph's call returns what the bound call writes, with the shape and dtype that propagation assumes."""
    q, k, v = one_projection(12, (4, 2), 8)
    segments = torch.tensor([[0, 5], [5, 12]])
    returned = torch.ops.dllmc.attention(q, k, v, segments, segments, 0.3)
    written = torch.empty(12, 4, 8)
    operator("dllmc.attention.default").bind([q, k, v, segments, segments, 0.3], [written], None)()
    assert torch.equal(returned, written)
    windowed = torch.ops.dllmc.attention(q, k, v, segments, segments, 0.3, 2)
    operator("dllmc.attention.default").bind([q, k, v, segments, segments, 0.3, 2], [written], None)()
    assert torch.equal(windowed, written)
    assert not torch.allclose(windowed, returned)
    meta = torch.ops.dllmc.attention(*(x.to("meta") for x in (q, k, v, segments, segments)), 0.3)
    assert (meta.shape, meta.dtype, meta.stride()) == (returned.shape, returned.dtype, returned.stride())
