"""`dllmc::keep` against the selection of semantics.md written in numpy: reference, CPU operator and Triton kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.ops.chunks import carved
from dllmc.ops.keep import reference
from dllmc.ops.registry import operator
from tests.ops.calls import HALF, LAYOUTS, UNTOUCHED, WAYS, laid_out, on_device, random
from tests.ops.launches import counted, replayed

DTYPES = (torch.float32, *HALF)


@dataclass(frozen=True)
class Refresh:
    """`before` tokens, an active span, `behind` tokens; of those outside the span, how many each head keeps."""

    before: int
    span: int
    behind: int
    kept: int
    shared: bool = False
    pool: int = 3


# A segment that keeps nothing: of a request that caches nothing, or of a Reuse.
NOTHING = Refresh(11, 0, 0, 0)


def step(
    segments: Sequence[Refresh],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    page_tokens: int = 16,
    layout: str = "dense",
    scattered: bool = True,
    integers: bool = True,
    seed: int = 0,
) -> list[Tensor]:
    """The operator's operands. heads: q and kv. integers: small ones, of which many scores are equal."""
    q_heads, kv_heads = heads
    tokens, active = (sum(s.before + s.span + s.behind for s in segments), sum(s.span for s in segments))
    q = random(active, q_heads, head_dim, seed=3 * seed, dtype=torch.float64)
    k = random(tokens, kv_heads, head_dim, seed=3 * seed + 1, dtype=torch.float64)
    q, k = (laid_out((x.round() if integers else x).to(dtype), layout) for x in (q, k))
    v = laid_out(random(tokens, kv_heads, head_dim, seed=3 * seed + 2, dtype=dtype), layout)
    needed = [-(-s.kept // page_tokens) for s in segments]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)) if scattered else torch.arange(pages)
    table = torch.zeros(len(segments), max([1, *needed]), dtype=torch.int64)
    cache = torch.full((2, kv_heads, pages, page_tokens, head_dim), UNTOUCHED, dtype=dtype)
    ranges, keeping, end = [], [], 0
    for row, of_segment, s in zip(table, order.split([*needed, 3]), segments, strict=False):
        row[: len(of_segment)] = of_segment
        start, low, high, end = end, end + s.before, end + s.before + s.span, end + s.before + s.span + s.behind
        ranges.append((start, end))
        keeping.append((low, high, s.kept, int(s.shared), s.pool) if s.kept or s.span else (0, 0, 0, 0, 0))
    return [cache, q, k, v, torch.tensor(ranges), torch.tensor(keeping), table]


def pooled_scores(args: Sequence[Tensor], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a segment, in float64: its candidates' tokens [n], and what each is worth to each KV head, [kv_heads, n]."""
    _, q, k, _, segments, keeping, _ = args
    (start, end), (low, high, _, shared, pool) = segments[index].tolist(), keeping[index].tolist()
    row = sum(b - a for a, b, *_ in keeping[:index].tolist())
    tokens = np.array([t for t in range(start, end) if not low <= t < high], dtype=int)
    mean = q.double().numpy()[row : row + high - low].mean(axis=0)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    products = np.zeros((q.shape[1], len(tokens)))
    for head in range(q.shape[1]):
        products[head] = k.double().numpy()[tokens, head // group] @ mean[head]
    scores = np.stack([products[h * group : (h + 1) * group].max(axis=0) for h in range(kv_heads)])
    if shared:
        scores = np.repeat(products.mean(axis=0)[None], kv_heads, axis=0)
    windows = [
        np.roll(np.pad(scores, ((0, 0), (pool, pool)), constant_values=-np.inf), shift, axis=1)
        for shift in range(-(pool // 2), pool // 2 + 1)
    ]
    return tokens, np.max(windows, axis=0)[:, pool : pool + len(tokens)] / np.sqrt(q.shape[2])


def expected(args: Sequence[Tensor]) -> Tensor:
    """The cache with each segment's best candidates in its slots, in order; a stable descending sort ranks them."""
    cache, _, k, v, _, keeping, table = args
    cache = cache.clone()
    for index, (_, _, count, _, _) in enumerate(keeping.tolist()):
        if count:
            tokens, scores = pooled_scores(args, index)
            for head, row in enumerate(scores):
                best = np.sort(np.argsort(-row, kind="stable")[:count])
                put(cache, k, v, table[index], head, tokens[best])
    return cache


def put(cache: Tensor, k: Tensor, v: Tensor, pages: Tensor, head: int, tokens: np.ndarray) -> None:
    """These tokens' keys and values into a head's first slots."""
    for slot, token in enumerate(tokens.tolist()):
        place = head, pages[slot // cache.shape[3]], slot % cache.shape[3]
        cache[(0, *place)], cache[(1, *place)] = k[token, head], v[token, head]


def result(args: Sequence[Tensor], way: str, device: str) -> Tensor:
    """The cache after the operator's call on a device; bound once and run twice where it is an instruction."""
    placed = [on_device(x, device) for x in args]
    if way == "graph":
        found: Tensor = torch.ops.dllmc.keep(*placed)
        assert torch.equal(placed[0].cpu(), args[0]), "a graph's call leaves the cache that it is given"
        return found.cpu()
    placed[0] = placed[0].clone()
    run, workspace = bound(placed, way)
    for _ in range(2 if way == "instruction" else 1):
        workspace.fill_(255)
        run()
    return placed[0].cpu()


def bound(args: Sequence[Tensor], way: str) -> tuple[Callable[[], object], Tensor]:
    """A call over the operands' memory, and the workspace that it uses."""
    op = operator("dllmc.keep.default")
    device = args[0].device.type if way == "instruction" else "cuda"
    workspace = torch.empty(op.workspace_bytes(args, device), dtype=torch.uint8, device=args[0].device)
    if way == "instruction":
        return op.bind(args, [args[0]], workspace), workspace
    from dllmc.ops.keep import parts_of
    from dllmc.ops.kernels.keep import keep

    return partial(keep, *args, *carved(workspace, parts_of(*args[1:5]))), workspace


def check(args: Sequence[Tensor], way: str, device: str) -> None:
    """Slots and all that is beside them, bit for bit: scores of integers are exact."""
    assert torch.equal(result(args, way, device), expected(args))


def check_best(args: Sequence[Tensor], way: str, device: str) -> None:
    """Of scores that are no integers: none is left out that is worth more than one kept, but for rounding."""
    cache, (_, _, k, v, _, keeping, table) = result(args, way, device), args
    untouched = args[0].clone()
    for index, (_, _, count, _, _) in enumerate(keeping.tolist()):
        tokens, scores = pooled_scores(args, index) if count else (np.empty(0), np.empty((0, 0)))
        for head, row in enumerate(scores):
            slots = cache[1, head, table[index]].flatten(0, 1)[:count]
            same = (slots[:, None] == v[tokens, head][None]).all(dim=2)  # [count, candidates]: values tell them apart
            kept = same.int().argmax(dim=1).numpy()
            assert (np.diff(kept) > 0).all(), "slots are filled in the order of the tokens"
            left = np.delete(row, kept)
            assert row[kept].min() >= left.max(initial=-np.inf) - 1e-5 * np.abs(row).max()
            put(untouched, k, v, table[index], head, tokens[kept])
    assert torch.equal(cache, untouched)


def refreshes(most: int) -> st.SearchStrategy[Refresh]:
    """Spans of 1, 2, 4 or more, since a mean over those is exact; all, some, one or none of the candidates kept."""

    def of(before: int, span: int, behind: int, share: float, shared: bool, pool: int) -> Refresh:
        candidates = before + behind
        return Refresh(before, span, behind, min(max(1, int(candidates * share)), candidates), shared, pool)

    counts, shares = st.integers(0, most), st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0))
    return st.builds(
        of, counts, st.sampled_from((1, 2, 4, 8, 32)), counts, shares, st.booleans(), st.sampled_from((1, 3, 5))
    )


def any_steps(examples: int, way: str, device: str, verify: Callable, integers: bool) -> None:
    @settings(deadline=None, derandomize=True, max_examples=examples)
    @given(
        st.lists(refreshes(60) | st.just(NOTHING), min_size=1, max_size=4),
        st.tuples(st.integers(1, 3), st.integers(1, 8)),
        st.sampled_from((8, 20, 32)),
        st.sampled_from((8, 16, 32)),
        st.booleans(),
        st.sampled_from(LAYOUTS),
        st.sampled_from(DTYPES),
        st.integers(0, 5),
    )
    def any_step(segments, heads, head_dim, page_tokens, scattered, layout, dtype, seed):
        kv_heads, group = heads
        heads = (kv_heads * group, kv_heads)
        verify(step(segments, heads, head_dim, dtype, page_tokens, layout, scattered, integers, seed), way, device)

    any_step()


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_equal_scores_keep_the_lower_position(way, device):
    """Integers, and pools over them, make many equal scores; each head keeps what a stable sort ranks first."""
    any_steps(12 if (way, device) == ("kernel", "cpu") else 60, way, device, check, integers=True)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_the_best_candidates_are_kept(way, device):
    """Of random numbers, in every dtype, for a head each or shared by all."""
    any_steps(12 if (way, device) == ("kernel", "cpu") else 60, way, device, check_best, integers=False)


LONG = (
    Refresh(1500, 32, 2000, 1750),
    NOTHING,
    Refresh(0, 128, 700, 1, pool=5),
    Refresh(900, 64, 0, 450, shared=True),
    Refresh(40, 16, 60, 100, pool=1),
    Refresh(0, 8, 0, 0),
    Refresh(0, 1, 1, 1),
)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_thousands_of_candidates(way, device):
    """More than a program ranks at once; one, some and all of them kept."""
    for dtype in (torch.float32, torch.bfloat16):
        check(step(LONG, (2, 1), 16, dtype), way, device)
    more = (Refresh(9000, 4, 60, 4000, pool=5), Refresh(4000, 2, 97, 4096, shared=True))
    check(step(more, (2, 2), 8, torch.float32), way, device)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize(("way", "device"), [way for way in WAYS if "graph" not in way.id])
def test_the_grid(way, device, head_dim, group):
    """Head sizes 16 to 128, 1 to 8 query heads a KV head, spans 1 to 128, candidates of none to thousands, in one call.

    Page sizes and layouts take turns along the grid; so do dtypes, and where there is a GPU it takes every one.
    """
    turn = head_dim // 8 + group
    kv_heads = 1 if group > 4 else 2
    for dtype in DTYPES if device == "cuda" else [DTYPES[turn % 3]]:
        for integers, verify in ((True, check), (False, check_best)):
            heads = (kv_heads * group, kv_heads)
            page_tokens, layout = (8, 16, 32)[turn % 3], LAYOUTS[turn % 4]
            verify(step(LONG, heads, head_dim, dtype, page_tokens, layout, integers=integers), way, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_more_than_a_hundred_thousand_candidates(shared):
    """On a GPU there is no limit to them."""
    check(step((Refresh(70_000, 32, 60_001, 50_000, shared), LONG[0]), (4, 2), 16, torch.float16), "kernel", "cuda")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(refreshes(30) | st.just(NOTHING), min_size=1, max_size=3), st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_the_reference_is_the_definition(segments, heads):
    """In float64."""
    args = step(segments, heads, 8, torch.float64)
    assert torch.equal(reference(*args), expected(args))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_scores_that_are_no_numbers_rank_last(way, device):
    """Where a key is infinite or no number, the others are kept before it, and the call ends."""
    args = step((Refresh(20, 4, 20, 30, pool=1),), (2, 1), 16, torch.float32, integers=False)
    args[2][[3, 30]] = torch.nan
    _, scores = pooled_scores(args, 0)
    tokens = np.array([*range(20), *range(24, 44)])
    assert np.isnan(scores[0]).sum() == 2
    best = np.sort(np.argsort(-np.nan_to_num(scores[0], nan=-np.inf), kind="stable")[:30])
    cache = args[0].clone()
    put(cache, args[2], args[3], args[6][0], 0, tokens[best])
    assert torch.equal(result(args, way, device), cache)


@pytest.mark.parametrize(("way", "device"), [way for way in WAYS if "kernel" in way.id])
def test_four_launches(way, device):
    """For all segments and heads together."""
    run, _ = bound([on_device(x, device) for x in step(LONG[1:4], (4, 2), 16, torch.float32)], way)
    with counted() as launches:
        run()
    assert launches == {"_add": 1, "_score": 1, "_select": 1, "_pack": 1}


@pytest.mark.gpu
def test_a_recorded_call_reads_its_tables_anew():
    """It never waits for the GPU; replayed with other segments, as many tokens in all, it keeps what is best there."""
    segments = (Refresh(300, 32, 500, 400), NOTHING, Refresh(0, 64, 700, 350, shared=True, pool=5))
    args, others = (step(order, (8, 2), 64, torch.float16) for order in (segments, segments[::-1]))
    placed = [on_device(x, "cuda") for x in args]
    run, _ = bound(placed, "instruction")
    replayed(run, lambda: [x.copy_(other) for x, other in zip(placed, others, strict=True)])
    assert torch.equal(placed[0].cpu(), expected(others))


def test_the_fake_announces_the_result():
    """The cache's shape, dtype and strides."""
    args = step(LONG[2:4], (4, 2), 16, torch.float32)
    found, meta = torch.ops.dllmc.keep(*args), torch.ops.dllmc.keep(*(x.to("meta") for x in args))
    assert (meta.shape, meta.dtype, meta.stride()) == (found.shape, found.dtype, found.stride())
