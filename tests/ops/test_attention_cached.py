"""`dllmc::attention` of steps that mix Full, Refresh and Reuse segments, against numpy: CPU and Triton kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.ops.attention import reference
from dllmc.ops.registry import operator
from tests.ops.attention_cases import Segment, assert_attended, dtypes_of, expected, launch, step
from tests.ops.calls import LAYOUTS, UNTOUCHED, WAYS, call, on_device
from tests.ops.launches import counted, replayed

SIZES = st.builds(Segment, st.integers(1, 20), st.just(0) | st.integers(1, 50), st.none() | st.integers(0, 24))
# A Full and a Refresh segment, Refreshes of which only the active span queries, Reuses of one token to 128.
MIXED = (
    Segment(150),
    Segment(32, 2100),
    Segment(1, 7),
    Segment(70, 0, 32),
    Segment(128, 300),
    Segment(5, 0),
    Segment(33, 1),
    Segment(17, 1024),
)


def check(args, way, device):
    (found,) = call(way, "attention", args, launch, device)
    assert_attended(found, args, way)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_any_mixture_of_segments(way, device):
    """Each segment's queries see its own tokens and its own slots, wherever its pages are, the last one partly full."""

    @settings(deadline=None, derandomize=True, max_examples=60 if (way, device) != ("kernel", "cpu") else 20)
    @given(
        st.lists(SIZES, min_size=1, max_size=5),
        st.tuples(st.integers(1, 3), st.integers(1, 8)),
        st.sampled_from((16, 20, 64)),
        st.sampled_from((8, 16, 32)),
        st.booleans(),
        st.sampled_from(LAYOUTS),
        st.sampled_from(dtypes_of(way, device)),
    )
    def mixture(segments, heads, head_dim, page_tokens, scattered, layout, dtype):
        kv_heads, group = heads
        check(
            step(segments, (kv_heads * group, kv_heads), head_dim, dtype, page_tokens, layout, scattered), way, device
        )

    mixture()


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_thousands_of_cached_keys(way, device):
    """Of few requests: a kernel takes them in several parts, which come to the same."""
    for dtype in dtypes_of(way, device):
        check(step((Segment(32, 2500), Segment(3), Segment(9, 700)), (2, 1), 32, dtype), way, device)


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize(("way", "device"), [way for way in WAYS if "graph" not in way.id])
def test_the_grid(way, device, head_dim, group):
    """Head sizes 16 to 128, 1 to 8 query heads a KV head, spans 1 to 128, none to thousands of cached keys, in a call.

    Page sizes and layouts take turns along the grid; so do dtypes, and where there is a GPU it takes every one.
    """
    dtypes, turn = dtypes_of(way, device), head_dim // 8 + group
    kv_heads = 1 if group > 4 else 2
    for dtype in dtypes if device == "cuda" else [dtypes[turn % len(dtypes)]]:
        heads = (kv_heads * group, kv_heads)
        check(step(MIXED, heads, head_dim, dtype, (8, 16, 32)[turn % 3], LAYOUTS[turn % 4]), way, device)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(SIZES, min_size=1, max_size=4), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.none() | st.integers(0, 9)
)
def test_the_reference_is_the_definition(segments, heads, window):
    """In float64, to the last digits; 0 where no segment queries."""
    if window is not None:
        segments = [Segment(s.tokens, s.kept) for s in segments]
    args = step(segments, heads, 8, torch.float64, 8, window=window)
    np.testing.assert_allclose(reference(*_finite(args)).numpy(), expected(args, 0.0), rtol=1e-12, atol=1e-12)


def _finite(args):
    """The reference multiplies slots that hold nothing before it leaves them out."""
    return [*args[:8], args[8].nan_to_num(0.0), *args[9:]]


@pytest.mark.parametrize("window", [0, 3, 100])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_a_window_leaves_cached_keys_in_sight(way, device, window):
    """It counts a segment's own tokens; how far away a kept one was is not known."""
    segments = (Segment(40, 33), Segment(90), Segment(4, 1), Segment(1, 0))
    for dtype in dtypes_of(way, device):
        check(step(segments, (4, 2), 16, dtype, 8, window=window), way, device)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_some_of_the_queries(way, device):
    """Those from number `first` on, as a loop over chunks of queries asks for; spans count all of them."""
    segments = (Segment(9, 20), Segment(60, 0, 21), Segment(30, 300))
    for first, last in ((0, 5), (5, 40), (13, 14), (40, 62)):
        for window in (None, 4) if first < 9 else (None,):
            args = step(segments, (4, 2), 16, torch.float32, window=window)
            args[0], args[7] = args[0][first:last], first
            check(args, way, device)


def test_the_fake_announces_the_result():
    """With or without a cache: the shape, dtype and strides that the operator's result has."""
    args = step((Segment(9, 20), Segment(3)), (4, 2), 16, torch.float32, layout="swapped")
    for operands in (args, args[:6]):
        found = torch.ops.dllmc.attention(*operands)
        meta = torch.ops.dllmc.attention(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in operands))
        assert (meta.shape, meta.dtype, meta.stride()) == (found.shape, found.dtype, found.stride())


@pytest.mark.parametrize(("way", "device"), [way for way in WAYS if "kernel" in way.id])
def test_a_mixed_step_is_one_launch(way, device):
    """Of attention, whatever its segments are; where keys are in several parts, one more adds what these found."""
    few, many = (Segment(32, 700), Segment(40), Segment(1, 9)), [Segment(32, 300), *[Segment(1)] * 140]
    for segments, extra in ((few, {"_add_parts": 1}), (many, {}), ((Segment(300),), {})):
        args = step(segments, (1, 1), 16, torch.float32)
        with counted() as launches:
            call(way, "attention", args if len(segments) > 1 else args[:8], launch, device)
        assert launches == {"_attend": 1, **extra}


@pytest.mark.gpu
def test_a_recorded_call_reads_its_tables_anew():
    """It never waits for the GPU; replayed with other segments and slots, as many in all, it attends to those."""
    segments = (Segment(32, 700), Segment(50), Segment(7, 100))
    args, others = (step(order, (8, 2), 64, torch.float16) for order in (segments, segments[::-1]))
    placed = [on_device(x, "cuda") for x in args]
    out = torch.full(args[0].shape, UNTOUCHED, dtype=torch.float16, device="cuda")
    op = operator("dllmc.attention.default")
    size = op.workspace_bytes([x for x in placed if isinstance(x, torch.Tensor)], "cuda")
    run = op.bind(placed, [out], torch.empty(size, dtype=torch.uint8, device="cuda"))

    def change() -> None:
        for x, other in zip(placed, others, strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(other)

    replayed(run, change)
    assert_attended(out.cpu(), others, "instruction")


@pytest.mark.gpu
def test_the_same_bits_every_time():
    """Parts are added in one order."""
    args = [on_device(x, "cuda") for x in step((Segment(32, 4000),), (8, 2), 128, torch.float16)]
    first = torch.ops.dllmc.attention(*args)
    for _ in range(20):
        assert torch.equal(torch.ops.dllmc.attention(*args), first)
