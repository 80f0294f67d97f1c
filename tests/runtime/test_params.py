"""What parameters, cache policies and prompts refuse by themselves, and what they refuse for a given model."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.errors import RequestError
from dllmc.runtime.params import CONFIDENCE_RULES, CachePolicy, Prompt, SamplingParams, require_servable

BAD_VALUES = [
    ("gen_length", 0, "an integer >= 1"),
    ("gen_length", True, "an integer >= 1"),
    ("gen_length", 8.0, "an integer >= 1"),
    ("block_length", -3, "an integer >= 1"),
    ("block_length", None, "an integer >= 1"),
    ("steps", 0, "an integer >= 1, or None"),
    ("steps", "8", "an integer >= 1, or None"),
    ("steps", np.True_, "an integer >= 1, or None"),
    ("top_k", 0, "an integer in [1, 1024], or None"),
    ("top_k", 1025, "an integer in [1, 1024], or None"),
    ("top_k", 2.0, "an integer in [1, 1024], or None"),
    ("top_p", 0.0, "a number in (0, 1], or None"),
    ("top_p", 1.01, "a number in (0, 1], or None"),
    ("top_p", math.nan, "a number in (0, 1], or None"),
    ("top_p", True, "a number in (0, 1], or None"),
    ("temperature", -0.1, "a finite float32 number >= 0"),
    ("temperature", math.inf, "a finite float32 number >= 0"),
    ("temperature", 1e39, "a finite float32 number >= 0"),
    ("temperature", 10**400, "a finite float32 number >= 0"),
    ("temperature", False, "a finite float32 number >= 0"),
    ("cfg_scale", -1.0, "a finite float32 number >= 0"),
    ("cfg_scale", math.nan, "a finite float32 number >= 0"),
    ("cfg_scale", "1", "a finite float32 number >= 0"),
    ("seed", 2**63, "an integer in [-2**63, 2**63 - 1]"),
    ("seed", -(2**63) - 1, "an integer in [-2**63, 2**63 - 1]"),
    ("seed", 0.0, "an integer in [-2**63, 2**63 - 1]"),
    ("ignore_eos", 1, "True or False"),
    ("logprobs", None, "True or False"),
    ("remasking", "confidence", "one of low_confidence, topk_margin, entropy, random"),
    ("remasking", ["entropy"], "one of low_confidence, topk_margin, entropy, random"),
    ("schedule", "cosine", "one of uniform, timestep"),
    ("stop_token_ids", 7, "a list of integer token ids"),
    ("stop_token_ids", "7", "a list of integer token ids"),
    ("stop_token_ids", b"7", "a list of integer token ids"),
    ("suppress_tokens", [1, True], "a list of integer token ids"),
    ("defer_tokens", [1.0], "a list of integer token ids"),
    ("threshold", 0.0, "a number in (0, 1] with remasking = 'low_confidence', or None"),
    ("threshold", 1.5, "a number in (0, 1] with remasking = 'low_confidence', or None"),
    ("threshold", True, "a number in (0, 1] with remasking = 'low_confidence', or None"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_with_name_value_and_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value) == f"SamplingParams.{name} is {value!r}; expected {expected}"


@pytest.mark.parametrize(
    "values",
    [
        {"gen_length": 1, "block_length": 1, "steps": 1},
        {"top_k": 1, "top_p": 1.0, "temperature": 3},
        {"top_k": 1024, "top_p": 1e-6, "temperature": np.float32(0.5)},
        {"seed": -(2**63), "cfg_scale": 0},
        {"seed": 2**63 - 1, "gen_length": np.int64(4)},
        {"suppress_tokens": range(64)},
        {"threshold": 1.0, "remasking": "topk_margin"},
        {"threshold": 1, "remasking": "random"},
        {"threshold": 0.0, "remasking": "entropy"},
        {"threshold": -2.5, "remasking": "entropy"},
    ],
)
def test_the_ends_of_every_range_are_accepted(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items() if name != "suppress_tokens")


@pytest.mark.parametrize("threshold", [0.5, math.nan, -math.inf, -1e39])
def test_an_entropy_threshold_is_a_finite_number_of_at_most_zero(threshold: float) -> None:
    """Entropy confidences are sum p log p <= 0: with a positive threshold no candidate would ever reach it."""
    message = f"threshold is {threshold!r}; expected a finite float32 number <= 0 with remasking = 'entropy'"
    with pytest.raises(RequestError, match=re.escape(message)):
        SamplingParams(threshold=threshold, remasking="entropy")


@pytest.mark.parametrize("name", ["suppress_tokens", "defer_tokens"])
def test_at_most_64_tokens_are_named(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} is .* expected at most 64 ids, not 65"):
        SamplingParams(**{name: list(range(65))})  # type: ignore[arg-type]


def test_steps_and_threshold_contradict_each_other() -> None:
    with pytest.raises(RequestError, match=r"steps = 128 and threshold = 0\.9 are both given; expected at most one"):
        SamplingParams(steps=128, threshold=0.9)


@pytest.mark.parametrize("values", [{}, {"threshold": 0.9}])
def test_the_timestep_schedule_needs_steps(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="schedule is 'timestep' and steps is None; expected steps"):
        SamplingParams(schedule="timestep", **values)


def test_steps_divide_over_the_blocks_or_the_message_says_what_would() -> None:
    with pytest.raises(RequestError, match=r"steps is 9; expected a multiple of 4, .* 12 would do"):
        SamplingParams(gen_length=29, block_length=8, steps=9)


@given(gen=st.integers(1, 200), block=st.integers(1, 200), per_block=st.integers(1, 20))
@settings(deadline=None, derandomize=True)
def test_blocks_and_steps_per_block(gen: int, block: int, per_block: int) -> None:
    """Blocks are counted by cutting the region up; a block longer than the region is one short block."""
    blocks = len(range(0, gen, block))
    params = SamplingParams(gen_length=gen, block_length=block, steps=per_block * blocks)
    assert (params.blocks, params.steps_per_block) == (blocks, per_block)
    assert SamplingParams(gen_length=gen, block_length=block).steps_per_block is None


def test_lists_become_tuples_so_that_params_are_hashable_and_later_edits_do_not_reach_them() -> None:
    stops = [3, np.int64(4)]
    params = SamplingParams(stop_token_ids=stops)
    stops.append(5)
    assert params.stop_token_ids == (3, 4)
    assert hash(params) == hash(SamplingParams(stop_token_ids=(3, 4)))


def test_rule_codes_are_those_of_decode_head() -> None:
    assert CONFIDENCE_RULES == ("low_confidence", "topk_margin", "entropy", "random")


@pytest.mark.parametrize("name", ["stop_token_ids", "suppress_tokens", "defer_tokens"])
@pytest.mark.parametrize("token", [-1, 50])
def test_unknown_token_ids_are_refused_for_the_model(name: str, token: int) -> None:
    require_servable(SamplingParams(**{name: [0, 49]}), vocab_size=50)
    with pytest.raises(RequestError, match=rf"SamplingParams.{name}\[1\] is {token}; .* in \[0, 50\)"):
        require_servable(SamplingParams(**{name: [0, token]}), vocab_size=50)


def test_suppressing_the_whole_vocabulary_is_refused() -> None:
    require_servable(SamplingParams(suppress_tokens=[0, 1, 2, 2]), vocab_size=4)
    with pytest.raises(RequestError, match=r"all 4 tokens .* expected at most 3"):
        require_servable(SamplingParams(suppress_tokens=[3, 2, 1, 0]), vocab_size=4)


def test_the_default_policy_is_the_dual_cache() -> None:
    dual_cache = CachePolicy("block", retention=1.0, selection="per_head", pool=3, delay=0, refresh_interval=None)
    assert CachePolicy() == dual_cache


@pytest.mark.parametrize(
    ("field", "bad", "expected"),
    [
        ("mode", "lru", "one of block, none"),
        *[("retention", bad, "a number in (0, 1]") for bad in (0, 0.0, -0.5, 1.01, math.nan, True, "1")],
        ("selection", "global", "one of per_head, shared"),
        *[("pool", bad, "an odd integer in [1, 255]") for bad in (0, 2, -3, 257, 3.0, None, True)],
        *[("delay", bad, "an integer >= 0") for bad in (-1, 0.5, None, False)],
        *[("refresh_interval", bad, "an integer >= 1, or None") for bad in (0, -1, 2.0, True)],
    ],
)
def test_a_policy_that_cannot_be_served_is_refused(field: str, bad: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"CachePolicy.{field} is {bad!r}; expected {expected}")):
        CachePolicy(**{field: bad})


@pytest.mark.parametrize(
    ("retention", "candidates", "kept"),
    [(1.0, 7, 7), (0.5, 7, 3), (0.1, 7, 1), (0.01, 7, 1), (0.3, 0, 0), (1.0, 1, 1), (0.99, 100, 99)],
)
def test_how_many_keys_a_head_keeps(retention: float, candidates: int, kept: int) -> None:
    """`min(max(1, int(n * retention)), n)`"""
    assert CachePolicy(retention=retention).kept(candidates) == kept


@pytest.mark.parametrize("content", [7, None, b"text", {1: 2}])
def test_a_prompt_is_text_or_a_list(content: Any) -> None:
    message = re.escape(f"Prompt.content is {content!r}; expected text or a list of integer token ids")
    with pytest.raises(RequestError, match=message):
        Prompt(content)


def test_infill_is_a_mapping() -> None:
    with pytest.raises(RequestError, match=r"Prompt.infill is \[\(0, 1\)\]; expected a mapping"):
        Prompt("text", infill=[(0, 1)])  # type: ignore[arg-type]
