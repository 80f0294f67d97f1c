"""The engine: decoding together is decoding alone, limits hold, and bad requests are refused before anything runs."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import dllmc
from dllmc.errors import ArtifactError, RequestError
from tests.golden.cases import ROOT

GoldenEngine = Callable[[str], dllmc.Engine]
FOLDERS = ("llada-mha", "dream-gqa")
MASK = 500


def mixed_requests() -> tuple[list[list[int]], list[dllmc.SamplingParams]]:
    """Twelve prompts of different lengths, each with other parameters, greedy and sampled."""
    prompts = [[(7 * i + 13 * j) % 480 for j in range(1 + 5 * i)] for i in range(12)]
    varied: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 0.9, "top_p": 0.8},
        {"cfg_scale": 1.0},
        {"cfg_scale": 0.5, "temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"threshold": 0.02},
        {"steps": 6},
        {"steps": 9, "schedule": "timestep"},
        {"remasking": "random", "temperature": 1.0},
        {"remasking": "entropy", "suppress_tokens": (1, 2, 3)},
        {"remasking": "topk_margin", "defer_tokens": tuple(range(0, 256, 4))},
    ]
    params = [
        dllmc.SamplingParams(gen_length=18, block_length=6, seed=i, ignore_eos=True, **v)  # type: ignore[arg-type]
        for i, v in enumerate(varied)
    ]
    return prompts, params


@pytest.mark.parametrize("folder", FOLDERS)
def test_together_is_alone(folder: str, golden_engine: GoldenEngine) -> None:
    """Greedy or sampled, guided or not: a request's tokens do not depend on the steps it shares."""
    engine = golden_engine(folder)
    prompts, params = mixed_requests()
    together = engine.generate(prompts, params)
    alone = [engine.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    assert len({tuple(r.token_ids) for r in together}) > 6


def test_more_requests_than_a_step_holds(tmp_path: Path, golden_engine: GoldenEngine) -> None:
    """Requests join as others finish; results are the same as with room for all, in the order of the prompts."""
    small = dllmc.CompileOptions(max_tokens_per_step=180, max_requests=4, max_logit_rows=14)
    engine = dllmc.load(dllmc.compile(ROOT / "llada-mha", tmp_path / "small", small).path)
    prompts, params = mixed_requests()
    assert engine.generate(prompts, params) == golden_engine("llada-mha").generate(prompts, params)


def test_sampling_depends_on_the_seed_alone(golden_engine: GoldenEngine) -> None:
    """The same seed gives the same tokens, another seed others."""
    engine = golden_engine("llada-mha")
    first, again, other = (
        engine.generate([[1, 2, 3]], dllmc.SamplingParams(gen_length=16, temperature=1.0, seed=s, ignore_eos=True))
        for s in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_infilled_tokens_stay(golden_engine: GoldenEngine) -> None:
    """Fixed tokens are in the completion, take no step, and a literal mask token among them is a token like others."""
    infill = {0: 17, 3: MASK, 9: 44}
    params = dllmc.SamplingParams(gen_length=10, block_length=5, ignore_eos=True)
    [result] = golden_engine("llada-mha").generate(dllmc.Prompt([5, 6, 7], infill), params)
    assert {offset: result.token_ids[offset] for offset in infill} == infill
    assert result.forward_passes == 10 - len(infill)


def test_logprobs_are_those_of_the_committed_tokens(golden_engine: GoldenEngine) -> None:
    """One negative log-probability a token, only when asked for."""
    engine = golden_engine("dream-gqa")
    plain, asked = (
        engine.generate([[4, 5]], dllmc.SamplingParams(gen_length=8, ignore_eos=True, logprobs=wanted))[0]
        for wanted in (False, True)
    )
    assert plain.logprobs is None
    assert asked.logprobs is not None
    assert len(asked.logprobs) == 8
    assert all(-20 < p < 0 for p in asked.logprobs)


def test_prompts_of_every_kind(tiny_llada: Path) -> None:
    """Text, token ids and Prompt may be mixed; one prompt needs no list; text comes back with a tokenizer."""
    engine = dllmc.load(tiny_llada)
    assert engine.tokenizer is not None
    text = "sudoku:\n1003\n0300\n3210\n4132\n"
    ids = engine.tokenizer.encode(text)
    params = dllmc.SamplingParams(gen_length=19, block_length=19)
    [single] = engine.generate(text, params)
    assert engine.generate([text, ids, dllmc.Prompt(ids)], params) == [single] * 3
    assert engine.generate(ids, params) == [single]
    assert single.text == engine.tokenizer.decode(single.token_ids)
    assert engine.generate([], params) == []


def test_on_step_sees_every_step(tmp_path: Path) -> None:
    """Each step's requests, in a small program that not all fit into: tokens appear once, stay, and are the result's.

    The results are those of a call without it.
    """
    small = dllmc.CompileOptions(max_tokens_per_step=180, max_requests=4, max_logit_rows=14)
    engine = dllmc.load(dllmc.compile(ROOT / "llada-mha", tmp_path / "small", small).path)
    prompts, params = mixed_requests()
    params = [replace(p, logprobs=index % 2 == 0) for index, p in enumerate(params)]
    steps: list[tuple[dllmc.Snapshot, ...]] = []
    results = engine.generate(prompts, params, on_step=steps.append)
    assert results == engine.generate(prompts, params)
    assert max(len(step) for step in steps) < len(prompts)
    for index, result in enumerate(results):
        own = [snapshot for step in steps for snapshot in step if snapshot.index == index]
        assert [s.forward_passes for s in own] == list(range(1, result.forward_passes + 1))
        assert [s.finished for s in own] == [False] * (len(own) - 1) + [True]
        for before, after in pairwise(own):
            kept = [i for i, masked in enumerate(before.masked) if not masked]
            assert not any(after.masked[i] or after.token_ids[i] != before.token_ids[i] for i in kept)
            assert after.block[0] >= before.block[0]
            changed = [i for i, masked in enumerate(before.masked) if masked and not after.masked[i]]
            assert all(before.block[0] <= i < before.block[1] for i in changed)
        for snapshot in own:
            assert all(snapshot.token_ids[i] == MASK for i, masked in enumerate(snapshot.masked) if masked)
            shown = [masked or snapshot.token_ids[i] == result.token_ids[i] for i, masked in enumerate(snapshot.masked)]
            assert all(shown)
            if result.logprobs is None:
                assert snapshot.logprobs is None
            else:
                expected = [0.0 if m else p for m, p in zip(snapshot.masked, result.logprobs, strict=True)]
                assert snapshot.logprobs == expected
        assert own[-1].token_ids == result.token_ids


def test_a_finished_snapshot_is_the_completion(golden_engine: GoldenEngine) -> None:
    """A stop token cuts it, as it cuts the result; earlier snapshots have the whole region."""
    engine = golden_engine("llada-mha")
    free = dllmc.SamplingParams(gen_length=12, block_length=6, ignore_eos=True)
    [result] = engine.generate([9, 8, 7], free)
    stopping = replace(free, stop_token_ids=(result.token_ids[2],))
    seen: list[dllmc.Snapshot] = []
    [cut] = engine.generate([9, 8, 7], stopping, on_step=lambda step: seen.extend(step))
    assert cut.finish_reason == "stop"
    assert seen[-1].token_ids == cut.token_ids
    assert len(seen[-1].masked) == len(cut.token_ids) < 12
    assert {len(s.token_ids) for s in seen[:-1]} == {12}
    assert seen[0].block == (0, 6)


def test_without_on_step_no_snapshot_is_made(golden_engine: GoldenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a snapshot was made")

    monkeypatch.setattr("dllmc.runtime.engine.snapshot", refuse)
    params = dllmc.SamplingParams(gen_length=4)
    assert golden_engine("llada-mha").generate([1, 2], params)
    with pytest.raises(AssertionError, match="a snapshot was made"):
        golden_engine("llada-mha").generate([1, 2], params, on_step=print)


def test_what_on_step_raises_ends_the_call(golden_engine: GoldenEngine) -> None:
    """The step is the last one, and the engine decodes as before."""
    engine = golden_engine("llada-mha")
    params = dllmc.SamplingParams(gen_length=8, ignore_eos=True)
    expected, before = engine.generate([1, 2], params), engine.steps

    def stop(step: tuple[dllmc.Snapshot, ...]) -> None:
        if step[0].forward_passes == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2], params, on_step=stop)
    assert engine.steps == before + 3
    assert engine.generate([1, 2], params) == expected


@pytest.mark.parametrize(
    ("prompt", "params", "numbers"),
    [
        ([], {}, ("prompt 1", "0 tokens")),
        ([1, 2, 512], {}, ("prompt 1", "prompt[2]", "512", "[0, 512)")),
        ([1, -1], {}, ("prompt[1]", "-1")),
        ([1] * 200, {"gen_length": 100}, ("200", "100", "256")),
        ("text", {}, ("tokenizer", "token ids")),
        ([1], {"suppress_tokens": (600,)}, ("suppress_tokens[0]", "600")),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    prompt: object, params: dict[str, object], numbers: tuple[str, ...], golden_engine: GoldenEngine
) -> None:
    """One bad prompt refuses the call, with the numbers; no step runs for the good ones."""
    engine = golden_engine("llada-mha")
    steps_before = engine.steps
    with pytest.raises(RequestError) as error:
        engine.generate([[1, 2], prompt], dllmc.SamplingParams(**params))  # type: ignore[arg-type,list-item]
    assert all(number in str(error.value) for number in numbers), str(error.value)
    assert engine.steps == steps_before


@pytest.mark.parametrize(
    ("limits", "params", "option"),
    [
        ({"max_tokens_per_step": 30}, {"gen_length": 16}, "max_tokens_per_step >= 36"),
        ({"max_tokens_per_step": 40}, {"gen_length": 16, "cfg_scale": 1.0}, "max_tokens_per_step >= 72"),
        ({"max_logit_rows": 8}, {"gen_length": 16, "block_length": 16}, "max_logit_rows >= 16"),
        ({"max_requests": 1}, {"gen_length": 16, "cfg_scale": 1.0}, "max_requests >= 2"),
    ],
)
def test_what_no_step_can_hold_is_refused(
    limits: dict[str, int], params: dict[str, object], option: str, tmp_path: Path
) -> None:
    """The error says which compile option would hold the request, and how large it must be."""
    artifact = dllmc.compile(ROOT / "llada-mha", tmp_path / "out", dllmc.CompileOptions(**limits))
    with pytest.raises(RequestError, match=option):
        dllmc.load(artifact.path).generate([[1] * 20], dllmc.SamplingParams(**params))  # type: ignore[arg-type]


def test_one_set_of_params_a_prompt(golden_engine: GoldenEngine) -> None:
    """A list of params must be as long as the prompts."""
    with pytest.raises(RequestError, match="expected one SamplingParams, or 2 of them"):
        golden_engine("llada-mha").generate([[1], [2]], [dllmc.SamplingParams()])


def test_load_needs_an_artifact(tmp_path: Path) -> None:
    """A folder that the compiler did not write is named in the error."""
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        dllmc.load(tmp_path)
