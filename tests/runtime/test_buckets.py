"""Buckets are few and waste little; and padding a step to one changes no token of any request."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dllmc
from dllmc import artifact
from dllmc.ir.program import SYMBOLS
from dllmc.passes.sizing import with_rows
from dllmc.runtime.buckets import LEAST, STEPS_FROM, Buckets
from dllmc.runtime.request import RequestState
from dllmc.runtime.warm_up import shapes
from dllmc.spec import ModelSpec
from tests.brute_force import decode
from tests.golden.cases import FOLDERS, ROOT, all_cases, load_model
from tests.golden.test_engine import completions, policy

Sizes = dict[str, int]


@st.composite
def maxima(draw: st.DrawFn) -> Sizes:
    """The largest sizes of a step, as compiling chooses them."""
    tokens, segments = draw(st.integers(2, 20_000)), draw(st.integers(1, 300))
    return with_rows({"tokens": tokens, "segments": segments}, draw(st.integers(1, 3000)))


@st.composite
def steps(draw: st.DrawFn) -> tuple[Sizes, Sizes]:
    """Maxima, and the sizes of a step that they hold."""
    most = draw(maxima())
    sizes = {size: draw(st.integers(size in ("tokens", "segments"), most[size])) for size in SYMBOLS}
    return most, {
        **sizes,
        "guided": min(sizes["guided"], sizes["rows"]),
        "active": min(sizes["active"], sizes["tokens"]),
    }


@given(steps())
def test_a_bucket_holds_the_step_and_wastes_little(step: tuple[Sizes, Sizes]) -> None:
    """A quarter of the tokens at most where they cost, less than half of rows and segments; none beyond the maxima."""
    most, sizes = step
    padded = Buckets.of(most).padded(sizes)
    assert padded.keys() == sizes.keys()
    assert all(sizes[size] <= padded[size] <= most[size] for size in SYMBOLS)
    if sizes["tokens"] > STEPS_FROM:
        assert padded["tokens"] <= 1.25 * sizes["tokens"]
    assert padded["tokens"] <= max(2 * sizes["tokens"], LEAST["tokens"])
    assert padded["segments"] <= 2 * sizes["segments"]
    assert padded["rows"] <= max(2 * (sizes["rows"] + 1), LEAST["rows"])
    assert [padded[size] > 0 for size in ("guided", "active")] == [sizes[size] > 0 for size in ("guided", "active")]
    if padded["guided"] > sizes["guided"]:
        assert padded["rows"] > sizes["rows"]


@given(steps())
def test_a_bucket_is_its_own(step: tuple[Sizes, Sizes]) -> None:
    """Two steps of one bucket have one shape: what is padded to it is not padded on, but for one row of guidance."""
    buckets = Buckets.of(step[0])
    padded = buckets.padded({**step[1], "guided": 0})
    assert buckets.padded(padded) == padded


@given(maxima())
def test_buckets_are_few(most: Sizes) -> None:
    """About four an octave of tokens, one an octave of the others."""
    choices = Buckets.of(most).choices
    assert len(choices["tokens"]) <= 5 + max(0, 4 * (most["tokens"].bit_length() - 7))
    assert all(len(choices[size]) <= 1 + most[size].bit_length() for size in ("rows", "segments"))
    assert all(list(found) == sorted(set(found)) and found[-1] == most[size] for size, found in choices.items())


def test_the_shapes_of_a_workload_are_those_that_it_has() -> None:
    """Every step of requests like one is in the list; the largest come first, and there are no more than hundreds."""
    most = with_rows({"tokens": 4096, "segments": 64}, 1024)
    buckets = Buckets.of(most)
    spec = ModelSpec(vocab_size=100, mask_id=99, end_ids=(), max_positions=4096)
    programs = ("dense", "refresh", "reuse", "mixed")
    for scale, sides in ((0.0, 1), (1.0, 2)):
        params = dllmc.SamplingParams(gen_length=128, block_length=32, cfg_scale=scale)
        like = RequestState([1] * 512, params, spec, cache=dllmc.CachePolicy())
        found = shapes(like, programs, "mixed", buckets)
        assert len(found) == len({(phase, *sizes.items()) for phase, sizes in found}) < 300
        assert [sizes["tokens"] for _, sizes in found] == sorted((s["tokens"] for _, s in found), reverse=True)
        for requests in (1, 3, 64 // sides):
            for rows in (requests, 17 * requests, 32 * requests):
                step = {"tokens": 32 * requests * sides, "rows": min(rows, 1024), "guided": 0, "active": 0}
                step |= {"segments": requests * sides, "guided": step["rows"] if sides > 1 else 0}
                assert ("reuse", buckets.padded(step)) in found
        refresh = {"tokens": 640 * sides, "rows": 32, "segments": sides, "active": 32 * sides}
        assert ("refresh", buckets.padded({**refresh, "guided": 32 if sides > 1 else 0})) in found


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dllmc.Engine, dllmc.Engine]]:
    """Folder of golden outputs -> engines on an artifact whose steps hold a few requests, without buckets and with."""

    @cache
    def engines(folder: str) -> tuple[dllmc.Engine, dllmc.Engine]:
        options = dllmc.CompileOptions(max_tokens_per_step=300, max_requests=7, max_logit_rows=70)
        path = dllmc.compile(ROOT / folder, tmp_path_factory.mktemp("buckets") / folder, options).path
        opened = artifact.read(path)
        return dllmc.Engine(opened), dllmc.Engine(opened, buckets=True)

    return engines


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_cases_with_buckets(folder: str, bucketed: Any) -> None:
    """All together, in steps padded to buckets: tokens are exact."""
    _, engine = bucketed(folder)
    cases = [case for case in all_cases() if case.folder == folder]
    params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
    results = engine.generate([case.prompt_ids for case in cases], params, [policy(case) for case in cases])
    assert [r.token_ids in completions(case) for r, case in zip(results, cases, strict=True)] == [True] * len(cases)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], dllmc.SamplingParams, dllmc.CachePolicy]:
    """A prompt, ways to sample it, dense or cached, guided or not."""
    block = draw(st.integers(1, 10))
    gen = block * draw(st.integers(1, 3))
    fields: dict[str, Any] = {"gen_length": gen, "block_length": block, "ignore_eos": True, "logprobs": True}
    fields["seed"] = draw(st.integers(0, 2**40))
    fields |= draw(
        st.sampled_from(
            [
                {},
                {"threshold": 0.02},
                {"temperature": 0.8},
                {"temperature": 1.2, "top_k": 20},
                {"temperature": 1.0, "top_p": 0.8},
                {"remasking": "entropy", "suppress_tokens": (1, 2)},
                {"remasking": "random", "temperature": 1.0},
                {"remasking": "topk_margin"},
            ]
        )
    )
    fields["cfg_scale"] = draw(st.sampled_from((0.0, 0.0, 0.7)))
    policies = st.sampled_from(
        [
            dllmc.CachePolicy(mode="none"),
            dllmc.CachePolicy(),
            dllmc.CachePolicy(retention=0.5, delay=1),
            dllmc.CachePolicy(retention=0.3, selection="shared", refresh_interval=3),
        ]
    )
    prompt = draw(st.lists(st.integers(0, 480), min_size=1, max_size=60))
    return prompt, dllmc.SamplingParams(**fields), draw(policies)


@pytest.mark.parametrize("folder", FOLDERS)
@settings(deadline=None, derandomize=True, max_examples=6)
@given(given_requests=st.lists(requests(), min_size=1, max_size=9))
def test_padding_changes_no_token(folder: str, given_requests: list[Any], bucketed: Any) -> None:
    """Random mixes of requests; logprobs too, as near as the shape of a matrix product lets them be."""
    prompts, params, policies = map(list, zip(*given_requests, strict=True))
    plain, padded = (engine.generate(prompts, params, policies) for engine in bucketed(folder))
    for one, other in zip(plain, padded, strict=True):
        assert (one.token_ids, one.forward_passes) == (other.token_ids, other.forward_passes)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("folder", FOLDERS)
def test_padded_steps_follow_the_definition(folder: str, bucketed: Any) -> None:
    """A guided cached request beside others is decoded as the brute force decodes it alone."""
    _, engine = bucketed(folder)
    model, spec = load_model(folder)
    kwargs = {"gen_length": 12, "block_length": 6, "ignore_eos": True, "cfg_scale": 0.6}
    cached = {"retention": 0.5, "selection": "per_head", "pool": 3, "delay": 1}
    prompt = [(11 * i + 5) % 480 for i in range(17)]
    expected = decode(model, spec, prompt, **kwargs, cache=cached)
    assert expected.decisive
    others = [[3, 4, 5]] * 3
    policies = [dllmc.CachePolicy(**cached), *[dllmc.CachePolicy(mode="none")] * 3]
    params = [dllmc.SamplingParams(**kwargs), *[dllmc.SamplingParams(gen_length=9, block_length=3)] * 3]
    found = engine.generate([prompt, *others], params, policies)
    assert found[0].token_ids == expected.token_ids
