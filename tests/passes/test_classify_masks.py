"""classify-masks: a mask that shows everything goes, a band becomes a window, any other is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import CaptureError
from dllmc.passes import classify_masks
from tests.graphs import SPEC, WIDTH, Body, Tiny, captured, execute, heads_of, lines, run, step_inputs, step_of, text

BEFORE = "inline-regions,remove-noops,cse"
PASSES = f"{BEFORE},classify-masks"
LONGEST = SPEC.max_positions

Mask = Callable[[Tensor], Tensor]  # token ids [1, T] -> what attn_mask is given


class Masked(Tiny):
    """Attention with each of the masks, one after the other."""

    def __init__(self, *masks: Mask, **constants: Tensor) -> None:
        super().__init__(**constants)
        self.masks = masks

    def forward(self, token_ids: Tensor) -> Tensor:
        q = heads_of(self.embed(token_ids))
        for make in self.masks:
            mask = make(token_ids)
            q = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.head(q.transpose(1, 2).flatten(2))


def distances(ids: Tensor) -> Tensor:
    """J - i for query i and key j."""
    positions = torch.arange(ids.shape[1])
    return positions - positions[:, None]


def added(seen: Tensor, hidden: float = -torch.inf) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


def windows_of(*masks: Mask) -> list[int | None]:
    """What the pass makes of each mask, None where it drops it; it must not change the logits."""
    step = captured(Masked(*masks))
    inputs = step_inputs(LONGEST)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-6)
    dense = torch.ops.aten.scaled_dot_product_attention.default
    calls = list(step.calls(dense, torch.ops.dllmc.window_attention.default))
    windows = [None if node.target is dense else node.args[4] for node in calls]
    assert entry.stats["dropped"] == windows.count(None)
    assert entry.stats["windows"] == len(masks) - windows.count(None)
    return windows  # type: ignore[return-value]


ALL_SEEN: list[Mask] = [
    lambda ids: torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool),
    lambda ids: torch.ones_like(ids, dtype=torch.bool)[:, None, None],
    lambda ids: (distances(ids) > -1000)[None, None].expand(1, 2, -1, -1),
    lambda ids: ids.new_zeros(ids.shape[1], ids.shape[1], dtype=torch.float32),
    lambda ids: added(distances(ids).abs() <= LONGEST),
    lambda ids: distances(ids).abs() <= LONGEST - 1,
    lambda ids: torch.diff(torch.arange(ids.shape[1]), prepend=torch.tensor([-1])).eq(1)[None, None, None],
]


def test_a_mask_that_shows_everything_is_dropped() -> None:
    """Case 1: whatever it is computed with, and whatever its shape, if it shows all keys at every length."""
    assert windows_of(*ALL_SEEN) == [None] * len(ALL_SEEN)


@pytest.mark.parametrize("window", [0, 4, 15, LONGEST - 2])
def test_a_band_is_a_window(window: int) -> None:
    """Case 2: as far as the mask shows, at the longest sequence too, in any spelling."""
    spellings: list[Mask] = [
        lambda ids: distances(ids).abs() <= window,
        lambda ids: (distances(ids) <= window) & (distances(ids) >= -window),
        lambda ids: added(distances(ids).abs() <= window),
        lambda ids: added((distances(ids).abs() <= window)[None, None], torch.finfo(torch.float32).min),
        lambda ids: torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(window).triu(-window),
        lambda ids: distances(ids).abs() <= torch.tensor(window),
    ]
    assert windows_of(*spellings) == [window] * len(spellings)


def test_a_window_in_a_table() -> None:
    """A constant sliced by length along both axes."""
    table = torch.ones(2 * LONGEST, 2 * LONGEST, dtype=torch.bool).tril(5).triu(-5)
    assert windows_of(lambda ids: table[: ids.shape[1], : ids.shape[1]]) == [5]


@settings(deadline=None, derandomize=True, max_examples=3)
@given(st.lists(st.tuples(st.integers(1, LONGEST - 1), st.integers(1, LONGEST)), min_size=6, max_size=6))
def test_scaled_distances(scales: list[tuple[int, int]]) -> None:
    """|i - j| * factor < limit: the window is what division says."""
    windows = [(limit - 1) // factor for factor, limit in scales]
    found = windows_of(*(lambda ids, f=f, limit=limit: distances(ids).abs() * f < limit for f, limit in scales))
    assert found == [window if window < LONGEST - 1 else None for window in windows]


def two_layers(module: Tiny, x: Tensor) -> Tensor:
    q = heads_of(x)
    near, all_seen = distances(x).abs() <= 2, distances(x).abs() <= 100
    for mask in (near, all_seen, near):
        q = q + F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3)
    return q.transpose(1, 2).flatten(2)


def test_each_mask_is_evaluated_once() -> None:
    """Layers that share a mask share its class; the scale stays, and what computed the masks is dead."""
    step = step_of(two_layers)
    entry = run(step, PASSES)
    assert entry.stats == {"masks": 2, "dropped": 1, "windows": 2}
    assert text(step).startswith(
        lines(
            """
            0 = unflatten(x, -1, [2, -1])
            1 = transpose(0, 1, 2)
            2 = window_attention(1, 1, 1, 0.3, 2)
            3 = add(1, 2)
            4 = scaled_dot_product_attention(3, 3, 3, None, scale=0.3)
            5 = add(3, 4)
            6 = window_attention(5, 5, 5, 0.3, 2)
            """
        )
    )


def test_without_masks_nothing_changes() -> None:
    """Attention that is not masked stays as it is: not modified."""

    def plain(module: Tiny, x: Tensor) -> Tensor:
        q = heads_of(x)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    step = step_of(plain)
    before = text(step)
    assert not run(step, PASSES).modified
    assert text(step) == before


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda ids: distances(ids) <= 0, "is causal: a token sees all tokens behind and none ahead. It is le"),
        (lambda ids: added(distances(ids) <= 0), "is causal: a token sees all tokens behind and none ahead"),
        (
            lambda ids: (distances(ids) <= 0) & (distances(ids) >= -3),
            "is causal: a token sees 3 tokens behind and none ahead",
        ),
        (lambda ids: distances(ids) >= 0, "shows all tokens ahead and 0 tokens behind"),
        (
            lambda ids: (distances(ids) <= 4) & (distances(ids) >= -3),
            "shows 4 tokens ahead and 3 tokens behind",
        ),
        (lambda ids: distances(ids) // 4 == 0, "shows 3 tokens ahead and 0 tokens behind"),
        (
            lambda ids: torch.arange(ids.shape[1])[:, None] // 8 == torch.arange(ids.shape[1]) // 8,
            "shows query 4 the keys [0, 1, 2, 3, 4, 5, 6, 7], not a band (at length 9)",
        ),
        (lambda ids: (torch.arange(ids.shape[1]) != 20)[None], "not a band (at length 21)"),
        (lambda ids: distances(ids).abs() < ids.shape[1] - 1, "shows 0 tokens ahead and 0 behind at length 2 alone"),
        (lambda ids: -distances(ids).abs() * 0.5, "adds to the scores (at length 2)"),
        (
            lambda ids: distances(ids).abs() <= torch.tensor([2, 5])[None, :, None, None],
            "differs between heads (at length 4)",
        ),
        (
            lambda ids: (ids != 0)[:, None, None],
            "depends on the values of token_ids, through ne (aten.ne.Scalar) at",
        ),
        (
            lambda ids: (ids.cumsum(1)[:, :, None] >= distances(ids))[:, None],
            "depends on the values of token_ids, through cumsum (aten.cumsum.default) at",
        ),
    ],
)
def test_other_masks_are_refused(mask: Mask, message: str) -> None:
    """The error says what the mask does, and quotes the lines of the attention and of the mask."""
    with pytest.raises(CaptureError) as error:
        run(captured(Masked(mask)), PASSES)
    assert message in str(error.value)
    assert "test_classify_masks.py" in str(error.value)
    assert "in forward: q = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)" in str(error.value)
    assert "It is " in str(error.value)
    assert "Expected a mask by which every token sees all others" in str(error.value)


def windowed(window: int) -> Body:
    def body(module: Tiny, x: Tensor) -> Tensor:
        q = heads_of(x)
        mask = distances(x).abs() <= window
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)

    return body


@pytest.mark.parametrize("window", [3, 20, 25, 4000])
def test_a_change_beyond_the_lengths_that_memory_allows(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here up to length 24: a window within is found, one that no request reaches is dropped, any other refused."""
    monkeypatch.setattr(classify_masks, "MOST_BYTES", 8 * 24 * 24)
    step = step_of(windowed(window))
    if window == 25:
        with pytest.raises(CaptureError, match=r"with the number 25, .* length 24 only.* max_positions=24"):
            run(step, PASSES)
        return
    entry = run(step, PASSES)
    assert entry.stats["windows"] == (1 if window < LONGEST else 0)


def test_a_limit_that_is_a_product_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """|i - j| // 5 < 5 ends at 25, a number that the mask does not name."""
    monkeypatch.setattr(classify_masks, "MOST_BYTES", 8 * 24 * 24)
    step = captured(Masked(lambda ids: distances(ids).abs() // 5 < 5))
    with pytest.raises(CaptureError, match="computed with the number 25"):
        run(step, PASSES)


def test_a_table_cannot_be_known_beyond_those_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers say nothing of where it may change."""
    monkeypatch.setattr(classify_masks, "MOST_BYTES", 8 * 24 * 24)
    table = torch.ones(2 * LONGEST, 2 * LONGEST, dtype=torch.bool)
    step = captured(Masked(lambda ids: distances(ids).eq(1) | table[: ids.shape[1], : ids.shape[1]]))
    with pytest.raises(CaptureError, match=r"computed with '.*', but can be evaluated up to length 24 only"):
        run(step, PASSES)


class Crossed(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        q, k = heads_of(self.embed(token_ids)), heads_of(self.memory)
        mask = torch.ones(token_ids.shape[1], 7, dtype=torch.bool)
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        return self.head(y.transpose(1, 2).flatten(2))


def test_a_mask_of_cross_attention() -> None:
    """Its keys are not the tokens."""
    with pytest.raises(CaptureError, match=r"has the shape \[2, 7\], not that of self-attention") as error:
        run(captured(Crossed(memory=torch.randn(1, 7, WIDTH))), PASSES)
    assert "y = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)" in str(error.value)


def test_a_mask_made_of_a_buffer_without_value() -> None:
    """On the meta device there is nothing to evaluate."""

    class Buffered(Masked):
        def forward(self, token_ids: Tensor) -> Tensor:
            self.masks = (lambda ids: distances(ids).abs() <= self.limit,)
            return super().forward(token_ids)

    with torch.device("meta"):
        model = Buffered(limit=torch.tensor(3))
    with pytest.raises(CaptureError, match=r"depends on 'self.limit', which is on the meta device and has no value"):
        run(captured(model, replace(SPEC, max_positions=24)), PASSES)
