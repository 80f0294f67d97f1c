"""A request's life: validation, schedules, blocks, the stop rule, infilling. No model: tokens come from the test."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import RequestError
from dllmc.runtime.batch import compose
from dllmc.runtime.params import CachePolicy, SamplingParams
from dllmc.runtime.request import GenerationResult, RequestState
from dllmc.runtime.table import timestep_counts
from dllmc.spec import ModelSpec

MASK, END = 90, 91
SPEC = ModelSpec(vocab_size=100, mask_id=MASK, end_ids=(END,), shifted=False, max_positions=64)
GOLDEN = Path(__file__).parents[1] / "golden"


def decode(request: RequestState, target: list[int], shuffle: random.Random | None = None) -> list[int]:
    """Run to the end, committing the target's tokens at the first candidates (shuffled: at any); return the counts."""
    counts: list[int] = []
    while not request.finished:
        assert len(counts) < 500, "the request never finishes"
        positions = request.candidates()
        if shuffle:
            positions = np.array(shuffle.sample(positions.tolist(), positions.size), np.int64)
        positions = positions[: request.commit_count()]
        request.commit(positions, np.array(target)[positions - request.prompt_length])
        counts.append(positions.size)
    return counts


def run(
    params: SamplingParams, target: list[int] | None = None, infill: dict[int, int] | None = None
) -> tuple[GenerationResult, list[int]]:
    """Decode after a prompt of two tokens; the result, and each step's commit count."""
    request = RequestState([5, 6], params, SPEC, infill or {})
    counts = decode(request, target or [7] * params.gen_length)
    return request.result(), counts


@pytest.mark.parametrize(
    ("gen_length", "block_length", "steps", "counts"),
    [
        (8, 8, 8, [1] * 8),
        (8, 8, 3, [3, 3, 2]),
        (10, 8, 6, [3, 3, 2, 1, 1]),  # the short block has 2 positions for 3 steps: full after two
        (4, 4, 6, [1, 1, 1, 1]),
        (5, 32, 2, [3, 2]),  # one block, shorter than block_length
    ],
)
def test_uniform_schedule_by_hand(gen_length: int, block_length: int, steps: int, counts: list[int]) -> None:
    result, taken = run(SamplingParams(gen_length=gen_length, block_length=block_length, steps=steps))
    assert taken == counts
    assert result.forward_passes == len(counts)


@pytest.mark.parametrize(
    ("gen_length", "block_length", "steps", "counts"),
    [
        # t = 1, 0.75025, 0.5005, 0.25075, 0.001; 1 - t' / t = 0.24975, 0.33289, 0.499, then all.
        # 16 * 0.24975 = 3.996; 13 * 0.33289 = 4.33; 9 * 0.499 = 4.49; the 5 left.
        (16, 16, 4, [3, 4, 4, 5]),
        # Two blocks of 4: 4 * 0.24975 = 0.999 commits nothing; 4 * 0.33289 = 1.33; 3 * 0.499 = 1.497; the 2 left.
        (8, 4, 8, [0, 1, 1, 2, 0, 1, 1, 2]),
        (3, 3, 1, [3]),
    ],
)
def test_timestep_schedule_by_hand(gen_length: int, block_length: int, steps: int, counts: list[int]) -> None:
    """A step may commit nothing; it is a step all the same."""
    params = SamplingParams(gen_length=gen_length, block_length=block_length, steps=steps, schedule="timestep")
    result, taken = run(params)
    assert taken == counts
    assert result.forward_passes == steps


@given(masked=st.integers(1, 256), steps=st.integers(1, 128))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_timestep_schedule_follows_dreams_float32_formula(masked: int, steps: int) -> None:
    """Step for step from `masked` down to 0, as Dream's `diffusion_generate` counts with float32 tensors."""
    t = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        expected = int(torch.tensor(float(masked)) * (1 - t[i + 1] / t[i])) if i < steps - 1 else masked
        assert timestep_counts(np.array([masked]), np.array([i]), np.array([steps])) == [expected]
        masked -= expected
    assert masked == 0


@given(masked=st.integers(0, 300), steps=st.integers(1, 300))
@settings(deadline=None, derandomize=True)
def test_uniform_counts_sum_to_what_was_masked(masked: int, steps: int) -> None:
    """Nothing is lost or committed twice, counts differ by at most one, and larger ones come first."""
    params = SamplingParams(gen_length=300, block_length=300, steps=steps)
    request = RequestState([5], params, replace(SPEC, max_positions=400))
    request.table.masked_at_start[0] = masked
    counts = []
    for step in range(steps):
        request.table.step_in_block[0] = step
        counts.append(request.commit_count())
    assert sum(counts) == masked
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_without_steps_and_threshold_each_step_commits_one() -> None:
    assert run(SamplingParams(gen_length=6, block_length=4))[1] == [1] * 6


def test_without_a_threshold_the_count_alone_decides() -> None:
    assert RequestState([5], SamplingParams(gen_length=6), SPEC).table.threshold == [np.inf]


def test_a_threshold_request_takes_any_number_from_one_up() -> None:
    """The block ends when it is full, however many each step committed."""
    request = RequestState([5], SamplingParams(gen_length=5, block_length=3, threshold=0.5), SPEC)
    assert (request.table.threshold[0], request.commit_count()) == (0.5, 1)
    request.commit(np.array([1, 3]), np.array([7, 8]))
    assert request.candidates().tolist() == [2]
    request.commit(np.array([2]), np.array([9]))
    assert request.candidates().tolist() == [4, 5]
    request.commit(np.array([4, 5]), np.array([10, 11]))
    assert request.finished
    assert request.result().token_ids == [7, 9, 8, 10, 11]
    assert request.result().forward_passes == 3


def test_counters_and_tokens_advance_with_each_commit() -> None:
    request = RequestState([5, 6], SamplingParams(gen_length=4, block_length=2, steps=4), SPEC)
    assert request.token_ids.tolist() == [5, 6, MASK, MASK, MASK, MASK]
    assert request.masked.tolist() == [False, False, True, True, True, True]
    request.commit(np.array([3]), np.array([8]))
    assert (request.step, request.step_in_block, request.start, request.end) == (1, 1, 2, 4)
    request.commit(np.array([2]), np.array([7]))
    assert (request.step, request.step_in_block, request.start, request.end) == (2, 0, 4, 6)
    assert request.masked_at_start == 2
    assert request.token_ids.tolist() == [5, 6, 7, 8, MASK, MASK]


@pytest.mark.parametrize("position", [1, 2, 4], ids=["prompt", "committed", "next block"])
def test_only_candidates_can_be_committed(position: int) -> None:
    request = RequestState([5, 6], SamplingParams(gen_length=4, block_length=2), SPEC)
    request.commit(np.array([2]), np.array([7]))
    with pytest.raises(ValueError, match=rf"commit at \[{position}\]: expected positions among the candidates \[3\]"):
        request.commit(np.array([position]), np.array([8]))
    assert request.token_ids.tolist() == [5, 6, 7, MASK, MASK, MASK]


def test_a_finished_request_takes_no_commit_and_an_unfinished_one_has_no_result() -> None:
    request = RequestState([5, 6], SamplingParams(gen_length=1), SPEC)
    with pytest.raises(ValueError, match="not finished: 1 positions are masked"):
        request.result()
    request.commit(np.array([2]), np.array([7]))
    assert request.candidates().size == 0
    with pytest.raises(ValueError, match="candidates"):
        request.commit(np.array([], np.int64), np.array([], np.int64))


def test_positions_not_values_say_what_is_masked() -> None:
    """A literal mask id in the prompt is not decoded, and a committed mask id stays."""
    request = RequestState([MASK, 5], SamplingParams(gen_length=3, block_length=3), SPEC)
    assert request.candidates().tolist() == [2, 3, 4]
    request.commit(np.array([3]), np.array([MASK]))
    assert request.candidates().tolist() == [2, 4]
    decode(request, [7, 7, 7])
    assert request.result().token_ids == [7, MASK, 7]


def test_guidance_sees_the_prompt_masked_and_the_generation_region_as_it_is() -> None:
    request = RequestState([5, 6], SamplingParams(gen_length=3, cfg_scale=1.0), SPEC, {2: 9})
    request.commit(np.array([2]), np.array([7]))
    shown = compose(request.table, np.array([0]), 8, MASK).inputs["token_ids"]
    assert shown.tolist() == [5, 6, 7, MASK, 9, *(MASK, MASK, 7, MASK, 9)]
    assert request.token_ids.tolist() == [5, 6, 7, MASK, 9]


def test_logprobs_belong_to_the_completions_tokens() -> None:
    request = RequestState([5, 6], SamplingParams(gen_length=4, block_length=2, logprobs=True), SPEC, {1: 9})
    request.commit(np.array([2]), np.array([7]), np.array([-0.5], np.float32))
    with pytest.raises(ValueError, match="without logprobs"):
        request.commit(np.array([4]), np.array([END]))
    request.commit(np.array([4, 5]), np.array([END, 8]), np.array([-0.25, -2.0], np.float32))
    assert request.result().token_ids == [7, 9, END]
    assert request.result().logprobs == [-0.5, 0.0, -0.25]
    assert run(SamplingParams(gen_length=2))[0].logprobs is None


def test_decoding_stops_at_the_end_of_the_block_and_is_cut_after_the_first_end_token() -> None:
    result, _ = run(SamplingParams(gen_length=12, block_length=4), [1, 2, 3, 4, 5, END, 7, END, 9, 9, 9, 9])
    assert (result.token_ids, result.finish_reason) == ([1, 2, 3, 4, 5, END], "stop")
    assert result.forward_passes == 8


def test_an_end_token_does_not_stop_before_its_block_is_full() -> None:
    request = RequestState([5], SamplingParams(gen_length=4, block_length=4), SPEC)
    request.commit(np.array([1]), np.array([END]))
    assert not request.finished


@pytest.mark.parametrize(
    ("values", "target", "expected", "reason"),
    [
        ({"ignore_eos": True}, [1, END, 3, 4], [1, END, 3, 4], "length"),
        ({"ignore_eos": True, "stop_token_ids": (3,)}, [1, END, 3, 4], [1, END, 3], "stop"),
        ({"ignore_eos": True, "stop_token_ids": (END,)}, [1, END, 3, 4], [1, END], "stop"),
        ({"stop_token_ids": (1,)}, [2, 1, END, 4], [2, 1], "stop"),
        ({"stop_token_ids": (4,)}, [1, 2, 3, 4], [1, 2, 3, 4], "stop"),
        ({}, [1, 2, 3, 4], [1, 2, 3, 4], "length"),
    ],
)
def test_which_tokens_stop(values: dict[str, Any], target: list[int], expected: list[int], reason: str) -> None:
    result, _ = run(SamplingParams(gen_length=4, block_length=2, **values), target)
    assert (result.token_ids, result.finish_reason) == (expected, reason)


def test_an_end_token_in_the_prompt_does_not_stop() -> None:
    request = RequestState([END, 5], SamplingParams(gen_length=2), SPEC)
    decode(request, [1, 2])
    assert request.result().finish_reason == "length"


def test_infilled_tokens_count_as_committed_and_their_blocks_take_no_step() -> None:
    """Block 0 has one position left for its four steps, block 1 none: it is skipped."""
    params = SamplingParams(gen_length=12, block_length=4, steps=12)
    result, counts = run(params, infill={0: 20, 1: 21, 3: 23, 4: 24, 5: 25, 6: 26, 7: 27, 9: 29})
    assert counts == [1, 1, 1, 1]
    assert result.token_ids == [20, 21, 7, 23, 24, 25, 26, 27, 7, 29, 7, 7]


def test_a_leading_infilled_block_is_skipped_at_once() -> None:
    request = RequestState([5], SamplingParams(gen_length=4, block_length=2), SPEC, {0: 20, 1: 21})
    assert (request.start, request.end, request.step) == (3, 5, 0)


def test_a_fully_infilled_request_finishes_without_a_step() -> None:
    request = RequestState([5], SamplingParams(gen_length=3, block_length=2), SPEC, {2: 22, 0: 20, 1: MASK})
    result = request.result()
    assert (result.token_ids, result.forward_passes, result.finish_reason) == ([20, MASK, 22], 0, "length")


def test_an_infilled_end_token_stops_at_the_end_of_its_block() -> None:
    """The rule is about the block that contains it, not about who put it there."""
    result, _ = run(SamplingParams(gen_length=6, block_length=2), infill={2: END, 3: 9})
    assert (result.token_ids, result.finish_reason, result.forward_passes) == ([7, 7, END], "stop", 2)


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    gen, block = draw(st.integers(1, 14)), draw(st.integers(1, 6))
    blocks = len(range(0, gen, block))
    schedule = draw(st.sampled_from(["one", "uniform", "timestep"]))
    tokens = st.sampled_from([1, 2, 3, MASK, END])
    return {
        "gen": gen,
        "block": block,
        "schedule": schedule,
        "steps": None if schedule == "one" else blocks * draw(st.integers(1, 8)),
        "target": draw(st.lists(tokens, min_size=gen, max_size=gen)),
        "infill": draw(st.dictionaries(st.integers(0, gen - 1), tokens)),
        "ignore_eos": draw(st.booleans()),
        "stop_token_ids": draw(st.sampled_from([(), (3,)])),
        "order": draw(st.randoms(use_true_random=False)),
    }


def definition(case: dict[str, Any]) -> tuple[list[int], int, str]:
    """Completion, steps and finish reason, block by block, with floats and Python lists as semantics.md words it."""
    tokens: list[int | None] = [case["infill"].get(i) for i in range(case["gen"])]
    stops = set(case["stop_token_ids"]) | (set() if case["ignore_eos"] else {END})
    passes = 0
    spans = [range(s, min(s + case["block"], case["gen"])) for s in range(0, case["gen"], case["block"])]
    for span in spans:
        holes = [i for i in span if tokens[i] is None]
        if case["schedule"] == "one":
            counts = [1] * len(holes)
        else:
            n = case["steps"] // len(spans)
            counts = [len(holes) // n + (1 if i < len(holes) % n else 0) for i in range(n)]
        t = np.linspace(1, 1e-3, len(counts) + 1)
        for i, count in enumerate(counts):
            left = [j for j in span if tokens[j] is None]
            if not left:
                break
            if case["schedule"] == "timestep":
                count = len(left) if i == len(counts) - 1 else int(len(left) * (1 - t[i + 1] / t[i]))
            for j in left[:count]:
                tokens[j] = case["target"][j]
            passes += 1
        found = [j for j in span if tokens[j] in stops]
        if found:
            return [int(t) for t in tokens[: found[0] + 1] if t is not None], passes, "stop"
    return [int(t) for t in tokens if t is not None], passes, "length"


@given(scenarios())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_any_request_decodes_as_defined(case: dict[str, Any]) -> None:
    """Which candidates are committed first is drawn at random: the tokens are the target's, so nothing may change."""
    params = SamplingParams(
        gen_length=case["gen"],
        block_length=case["block"],
        steps=case["steps"],
        schedule="timestep" if case["schedule"] == "timestep" else "uniform",
        ignore_eos=case["ignore_eos"],
        stop_token_ids=case["stop_token_ids"],
    )
    request = RequestState([5, 6, END], params, SPEC, case["infill"])
    decode(request, case["target"], shuffle=case["order"])
    result = request.result()
    assert (result.token_ids, result.forward_passes, result.finish_reason) == definition(case)


def golden_cases() -> list[Any]:
    """The dense cases that say how many passes they took: all at fixed steps, so confidences do not matter."""
    cases = []
    for model in ("llada-mha", "dream-gqa"):
        for number, case in enumerate(json.loads((GOLDEN / model / "generations.json").read_text())):
            if case["name"] == "definition_dense":
                cases.append(pytest.param(case, id=f"{model}-{number}"))
    assert len(cases) == 16
    return cases


@pytest.mark.parametrize("case", golden_cases())
def test_golden_dense_cases_take_as_many_forward_passes(case: dict[str, Any]) -> None:
    """Fed with a golden case's tokens, a request takes its `nfe` steps and cuts where it is cut."""
    args, prompt = case["args"], case["prompt"][0]
    stops = args.get("end_ids", [])
    known = {name: value for name, value in args.items() if name != "end_ids"}
    params = SamplingParams(**known, ignore_eos=True, stop_token_ids=stops)
    spec = ModelSpec(vocab_size=512, mask_id=500, end_ids=(501,), shifted=False, max_positions=256)
    request = RequestState(prompt, params, spec)
    completion = case["tokens"][0][len(prompt) :]
    decode(request, completion)
    first = next((i for i, token in enumerate(completion) if token in stops), len(completion) - 1)
    assert request.result().token_ids == completion[: first + 1]
    assert request.result().forward_passes == case["nfe"]


@pytest.mark.parametrize(
    ("prompt", "gen_length", "infill", "message"),
    [
        ([], 4, {}, r"the prompt is empty \(0 tokens\); expected at least 1 token"),
        ([5] * 61, 4, {}, r"61 tokens and gen_length = 4 make 65 positions; expected at most 64, .* max_positions"),
        ([5, 6, 100], 4, {}, r"prompt\[2\] is 100; expected a token id in \[0, 100\)"),
        ([5, -1], 4, {}, r"prompt\[1\] is -1; expected a token id in \[0, 100\)"),
        ([True], 4, {}, r"prompt\[0\] is True; expected a token id in \[0, 100\)"),
        ([5.0], 4, {}, r"prompt\[0\] is 5\.0; expected a token id in \[0, 100\)"),
        ([5, 10**30], 4, {}, r"prompt\[1\] is 10{30}; expected a token id in \[0, 100\)"),
        ([5], 4, {4: 1}, r"infill offset 4; expected an integer in \[0, 4\)"),
        ([5], 4, {-1: 1}, r"infill offset -1; expected an integer in \[0, 4\)"),
        ([5], 4, {"0": 1}, r"infill offset '0'; expected an integer in \[0, 4\)"),
        ([5], 4, {3: 100}, r"infill\[3\] is 100; expected a token id in \[0, 100\)"),
    ],
)
def test_bad_prompts_are_refused_with_the_numbers(prompt: Any, gen_length: int, infill: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RequestState(prompt, SamplingParams(gen_length=gen_length), SPEC, infill)


def targets(request: RequestState) -> list[int]:
    """Tokens that the head is asked for at the candidates; -1 where none is."""
    found: list[int] = compose(request.table, np.array([0]), 8, MASK).inputs["row_target"].tolist()
    return found[: request.candidates().size]


def test_a_reference_is_what_is_committed_and_what_the_head_is_asked_for() -> None:
    """Wherever the policy commits, and whatever was chosen there; infilled tokens stay as they are."""
    params = SamplingParams(gen_length=4, block_length=2, logprobs=True, ignore_eos=True)
    request = RequestState([5, 6], params, SPEC, {0: 20}, reference=[10, 11, END, 13])
    assert targets(request) == [11]
    request.commit(np.array([3]), np.array([7]), np.array([-0.5]))
    assert targets(request) == [END, 13]
    request.commit(np.array([5]), np.array([7]), np.array([-1.5]))
    request.commit(np.array([4]), np.array([7]), np.array([-2.5]))
    assert request.result().token_ids == [20, 11, END, 13]
    assert request.result().logprobs == [0.0, -0.5, -2.5, -1.5]
    assert targets(RequestState([5], params, SPEC)) == [-1, -1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ([1, 2, 3], "the reference has 3 tokens; expected gen_length = 4 of them"),
        ([1, 2, 3, 100], r"reference\[3\] is 100; expected a token id in \[0, 100\)"),
    ],
)
def test_bad_references_are_refused_with_the_numbers(reference: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RequestState([5], SamplingParams(gen_length=4), SPEC, reference=reference)


def test_params_are_checked_against_the_model() -> None:
    with pytest.raises(RequestError, match=r"SamplingParams.defer_tokens\[0\] is 100; .* \[0, 100\)"):
        RequestState([5], SamplingParams(gen_length=4, defer_tokens=[100]), SPEC)


def test_the_longest_request_fits_exactly() -> None:
    assert RequestState([99] * 60, SamplingParams(gen_length=4), SPEC).token_ids.size == 64


@pytest.mark.parametrize(
    ("policy", "phases"),
    [
        (CachePolicy(mode="none", delay=1), "full full full full full"),
        (CachePolicy(), "refresh reuse reuse reuse reuse"),
        (CachePolicy(delay=2), "full full refresh reuse reuse"),
        (CachePolicy(refresh_interval=2), "refresh reuse refresh reuse refresh"),
        (CachePolicy(delay=1, refresh_interval=3), "full refresh reuse reuse refresh"),
        (CachePolicy(refresh_interval=1), "refresh refresh refresh refresh refresh"),
    ],
)
def test_phases_of_a_block(policy: CachePolicy, phases: str) -> None:
    request = RequestState([5], SamplingParams(gen_length=5, block_length=5), SPEC, cache=policy)
    found = []
    for _ in range(5):
        found.append(request.phase)
        request.commit(request.candidates()[:1], np.array([7]))
    assert found == phases.split()
