"""Random tiny models, compiled, against brute-force decoding with the eager module."""

import tempfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dllmc
from dllmc.passes.pipeline import DEFAULT_PIPELINE
from tests.brute_force import decode
from tests.strategies import TinyModel, build, models, requests

REQUESTS = 6


def check(max_examples: int) -> Counter[str]:
    """Decode `REQUESTS` random requests of each model together; each must come out as by brute force."""
    seen: Counter[str] = Counter()

    @settings(deadline=None, derandomize=True, max_examples=max_examples, print_blob=True)
    @given(models(), st.data())
    def compare(tiny: TinyModel, data: st.DataObject) -> None:
        drawn = [data.draw(requests(tiny.spec)) for _ in range(REQUESTS)]
        model = build(tiny)
        with tempfile.TemporaryDirectory() as folder:
            chunk = data.draw(st.sampled_from((0, 0, 1, 7, 50)))
            passes = DEFAULT_PIPELINE.replace("chunk-activations", f"chunk-activations{{chunk={chunk}}}")
            options = dllmc.CompileOptions(128, max_requests=8, max_logit_rows=32, passes=passes)
            artifact = dllmc.compile(model, f"{folder}/artifact", options, tiny.spec)
            engine = dllmc.Engine(artifact, buckets=data.draw(st.booleans()))
        results = engine.generate(
            [dllmc.Prompt(r.prompt_ids, r.infill, r.reference) for r in drawn],
            [dllmc.SamplingParams(**r.params, logprobs=True) for r in drawn],
            [dllmc.CachePolicy(**r.cache) for r in drawn],
        )
        for request, result in zip(drawn, results, strict=True):
            rest = {"infill": request.infill, "reference": request.reference, "cache": request.cache}
            expected = decode(model, tiny.spec, request.prompt_ids, **request.params, **rest)
            seen.update(["all", "decisive" if expected.decisive else "undecided"])
            if expected.decisive:
                found = (result.token_ids, result.finish_reason, result.forward_passes)
                assert found == (expected.token_ids, expected.finish_reason, expected.forward_passes), request
                logprobs = [0.0 if p is None else p for p in expected.logprobs]
                assert result.logprobs == pytest.approx(logprobs, abs=1e-4), request

    compare()
    return seen


def test_compiled_equals_eager_on_a_sample() -> None:
    """Greedy, sampled, filtered, guided, infilled, forced, suppressed and deferred requests, in shared steps."""
    seen = check(max_examples=8)
    assert seen["undecided"] <= 0.1 * seen["all"]


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """The same over many models."""
    seen = check(max_examples=150)
    assert seen["undecided"] <= 0.1 * seen["all"]
