"""cache-kv: attention reads what earlier steps kept, and a Refresh keeps what later ones read."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.compiler import CompileOptions, rewrite
from dllmc.errors import PassError
from tests.graphs import Body, Tiny, execute, heads_of, run, step_inputs, step_of
from tests.passes.two_layers import SPEC, Model

BEFORE = "inline-regions,remove-noops,classify-masks,lift-positions,pack-tokens,select-logit-rows"
PASSES = f"{BEFORE},cache-kv"
ATTENTION, KEEP = torch.ops.dllmc.attention.default, torch.ops.dllmc.keep.default


def attend(module: Tiny, x: Tensor) -> Tensor:
    q = heads_of(x)
    return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def twice(module: Tiny, x: Tensor) -> Tensor:
    """The first attention's queries are of every token, the last one's of the head's rows."""
    return attend(module, attend(module, x.sin()).exp())


def cache_inputs(step_caches: int, heads: int, head_dim: int, seed: int = 0) -> dict[str, Tensor]:
    """Of three segments of 5, 7 and 3 tokens: the first is a Refresh, the second Reuse, the third Full."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "active": torch.tensor([1, 2]),
        "keeping": torch.tensor([[1, 3, 2, 0, 1], [0] * 5, [0] * 5]),
        "cached": torch.tensor([0, 3, 0]),
        "page_table": torch.tensor([[1], [0], [0]]),
        **{
            f"cache.{layer}": torch.randn(2, heads, 2, 32, head_dim, generator=generator)
            for layer in range(step_caches)
        },
    }


@pytest.mark.parametrize("body", [attend, twice], ids=["one", "two"])
def test_attention_sees_what_is_cached_and_nothing_else_changes(body: Body) -> None:
    """The Full and the Refresh segment's logits are as before, the Reuse segment's are those of longer keys."""
    inputs = step_inputs(5, 7, 3, rows=(1, 4, 6, 8, 13))
    before = step_of(body)
    run(before, BEFORE)
    expected = execute(before, inputs)["logits"]
    step = step_of(body)
    entry = run(step, PASSES)
    layers = entry.stats["caches"]
    assert entry.modified
    assert layers == len(list(step.calls(ATTENTION))) == len(list(step.calls(KEEP)))
    found = execute(step, {**inputs, **cache_inputs(layers, 2, 4)})["logits"]
    reuse = (inputs["row_segment"] == 1).nonzero()[:, 0]
    others = (inputs["row_segment"] != 1).nonzero()[:, 0]
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=1e-6)
    assert (found[reuse] - expected[reuse]).abs().max() > 1e-3
    nothing = cache_inputs(layers, 2, 4) | {"cached": torch.zeros(3, dtype=torch.int64)}
    torch.testing.assert_close(execute(step, {**inputs, **nothing})["logits"], expected, rtol=0, atol=1e-6)


def test_what_is_kept_is_scored_by_the_span_s_queries() -> None:
    """Also in the last layer, whose attention has the rows' queries only: by hand, from the layer's input."""
    step = step_of(twice)
    run(step, PASSES)
    inputs = step_inputs(5, 7, 3, rows=(2, 6, 13))
    given = {**inputs, **cache_inputs(2, 2, 4)}
    kept = list(step.calls(KEEP))
    step.set_outputs(**{f"kept.{i}": node for i, node in enumerate(kept)})
    found = execute(step, given)

    embedded = step.tensors["embed.weight"][inputs["token_ids"][:5]]
    layer_input = embedded.sin()
    for layer in range(2):
        heads = layer_input.view(5, 2, 4)
        scores = torch.einsum("hd,thd->ht", heads[1:3].mean(0), heads[[0, 3, 4]])
        best = scores.topk(2).indices.sort().values
        for head in range(2):
            tokens = torch.tensor([0, 3, 4])[best[head]]
            for part in range(2):
                torch.testing.assert_close(found[f"kept.{layer}"][part, head, 1, :2], heads[tokens, head])
            untouched = given[f"cache.{layer}"][:, head]
            assert torch.equal(found[f"kept.{layer}"][:, head, 0], untouched[:, 0])
            assert torch.equal(found[f"kept.{layer}"][:, head, 1, 2:], untouched[:, 1, 2:])
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", heads, heads) / math.sqrt(4), -1)
        layer_input = (layer_input + torch.einsum("hqk,khd->qhd", weights, heads).flatten(1)).exp()


def test_a_cache_is_as_wide_as_its_layer_and_of_its_dtype() -> None:
    """[2, kv_heads, pages, page_tokens, head_dim]; the table holds what the longest request may keep."""
    module = Model().bfloat16()
    options = CompileOptions(max_tokens_per_step=100, max_requests=3, passes=f"{PASSES},fuse-head,lower,plan-memory")
    step, _ = rewrite(module, SPEC, options)
    assert step.program is not None
    described = [(c.dtype, [str(d) for d in c.shape]) for c in step.program.caches.values()]
    assert described == [("bfloat16", ["2", "2", "pages", "32", "4"])] * 2
    assert SPEC.max_positions == 32
    assert [str(dim) for dim in step.program.inputs["page_table"].shape] == ["segments", "1"]
    assert step.program.maxima["pages"] == 4 + 3
    assert step.program.page_bytes == 2 * 2 * 2 * 32 * 4 * 2
    assert step.program.cache_bytes == 7 * step.program.page_bytes


def test_a_page_has_as_many_slots_as_the_pass_is_told() -> None:
    options = CompileOptions(max_tokens_per_step=100, passes=f"{BEFORE},cache-kv{{page-tokens=8}},fuse-head,lower")
    step, _ = rewrite(Model(), SPEC, options)
    assert step.program is not None
    assert step.program.page_tokens == 8
    assert str(step.program.inputs["page_table"].shape[1]) == "4"
    shorter, _ = rewrite(Model(), SPEC, replace(options, max_tokens_per_step=17))
    assert shorter.program is not None
    assert str(shorter.program.inputs["page_table"].shape[1]) == "3"


def test_windowed_attention_is_left_alone() -> None:
    """Which of its cached keys a window shows, the slots do not tell: such a model is decoded dense."""

    def windowed(module: Tiny, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        near = (positions[:, None] - positions).abs() <= 2
        q = heads_of(x)
        return x + F.scaled_dot_product_attention(q, q, q, attn_mask=near).transpose(1, 2).flatten(2)

    step = step_of(windowed)
    entry = run(step, PASSES)
    assert not entry.modified
    assert entry.notes == ("attention with a window: every step will be dense",)
    assert not list(step.calls(KEEP))


def test_it_comes_after_the_rows_are_selected() -> None:
    with pytest.raises(PassError, match="pass 'cache-kv' requires rows-selected"):
        run(step_of(attend), f"{BEFORE.removesuffix(',select-logit-rows')},cache-kv")


def test_one_launch_of_attention_a_layer() -> None:
    """In every phase's program: Full, Refresh and Reuse segments share it."""
    step, _ = rewrite(Model(), SPEC, CompileOptions())
    assert step.program is not None
    assert step.phases.keys() == {"dense", "refresh", "reuse"}
    for program in (step.program, *step.phases.values()):
        ops = [call.op for call, _ in program.calls()]
        assert ops.count("dllmc.attention.default") == 2
        assert ops.count("dllmc.keep.default") == (2 if program.name in ("mixed", "refresh") else 0)
