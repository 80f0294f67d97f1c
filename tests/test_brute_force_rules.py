"""The brute force's own rules on cases small enough to work out by hand, where the golden files do not reach.

The model is a table: position i always has the same distribution, whatever the tokens are. Token 9 is the mask,
token 8 the end token; the prompt is one token unless a test says otherwise, so offset j is position j + 1.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from dllmc.spec import ModelSpec
from tests.brute_force import Decoded, decode, gumbel, philox, uniform

SPEC = ModelSpec(vocab_size=10, mask_id=9, end_ids=(8,))
SHIFTED = ModelSpec(vocab_size=10, mask_id=9, end_ids=(8,), shifted=True)
FLAT = [0.1] * 10


class Table:
    """A model whose logits are the logarithms of fixed rows of probabilities; it notes the tokens it was shown."""

    def __init__(self, *rows: list[float]) -> None:
        self.logits = torch.tensor(rows, dtype=torch.float64).log()
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return self.logits[None]

    def commits(self) -> list[list[int]]:
        """The offsets that each pass committed, the last pass having committed all that was left."""
        masked = [[j for j, token in enumerate(ids[1:]) if token == 9] for ids in self.seen]
        return [sorted(set(before) - set(after)) for before, after in pairwise([*masked, []])]


def row(**chances: float) -> list[float]:
    """A distribution over ten tokens from `t3=0.5` and the like; the other tokens have none."""
    return [chances.get(f"t{token}", 0.0) for token in range(10)]


def run(*rows: list[float], prompt: tuple[int, ...] = (0,), **kwargs: Any) -> tuple[Decoded, Table]:
    """Decode the rows of a generation region, as one block unless told otherwise."""
    table = Table(*[[1.0] * len(rows[0])] * len(prompt), *rows)
    return decode(table, SPEC, prompt, **{"gen_length": len(rows), "block_length": len(rows)} | kwargs), table


def sure(token: int, chance: float) -> list[float]:
    """A distribution that prefers one token, the rest going to token 0."""
    return row(**{f"t{token}": chance, "t0": 1 - chance})


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(
    key: tuple[int, int], counter: tuple[int, int, int, int], words: tuple[int, int, int, int]
) -> None:
    """The vectors of Random123's `kat_vectors` for philox4x32, ten rounds."""
    assert philox(key, counter) == words


@pytest.mark.parametrize(("lane", "word"), [(0, 0xD16CFE09), (1, 0x94FDCCEB), (2, 0x5001E420), (3, 0x24126EA1)])
def test_noise_is_keyed_by_seed_token_position_step_and_stream(lane: int, word: int) -> None:
    """The third known answer again: seed's low half first, four tokens a counter, 23 bits centred in (0, 1)."""
    u = uniform(0x299F31D0_A4093822, 4 * 0x243F6A88 + lane, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert u == (word // 512 + 0.5) / 2**23


def test_gumbel_noise_comes_from_stream_zero() -> None:
    """-log(-log u), u being the first word of the all-zero known answer."""
    assert gumbel(0, 0, 0, 0) == pytest.approx(-math.log(-math.log((0x6627E8D5 // 512 + 0.5) / 2**23)))


@pytest.mark.parametrize(("steps", "counts"), [(1, [7]), (3, [3, 2, 2]), (7, [1] * 7), (9, [1] * 7)])
def test_uniform_schedule_gives_the_remainder_to_the_first_steps(steps: int, counts: list[int]) -> None:
    """Seven positions; a block that is full before its steps are used up ends there."""
    decoded, table = run(*[sure(3, 0.9)] * 7, steps=steps)
    assert [len(offsets) for offsets in table.commits()] == counts
    assert decoded.forward_passes == len(counts)


@pytest.mark.parametrize(("length", "counts"), [(8, [1, 2, 2, 3]), (2, [0, 0, 0, 2])])
def test_timestep_schedule_rounds_down_and_empties_at_the_last_step(length: int, counts: list[int]) -> None:
    """With t = 1, .75025, .5005, .25075, .001: shares .24975, .3329, .499 of what is left, then all of it."""
    decoded, table = run(*[sure(3, 0.9)] * length, steps=4, schedule="timestep")
    assert [len(offsets) for offsets in table.commits()] == counts
    assert decoded.forward_passes == 4


def test_without_steps_or_threshold_a_pass_commits_one_token() -> None:
    """In blocks of two, the last of one."""
    _, table = run(*[sure(3, 0.9)] * 5, block_length=2)
    assert table.commits() == [[0], [1], [2], [3], [4]]


def test_steps_must_split_evenly_over_the_blocks() -> None:
    """Five tokens in blocks of two are three blocks."""
    with pytest.raises(ValueError, match="3 blocks do not divide 4 steps"):
        run(*[FLAT] * 5, block_length=2, steps=4)


def test_threshold_commits_all_that_reach_it_and_always_the_best() -> None:
    """0.9 and exactly 0.5 pass; then 0.4 and 0.3 go one by one, the better first."""
    table = Table(
        FLAT, row(t1=0.3, t2=0.26, t3=0.22, t4=0.22), sure(3, 0.9), row(t1=0.5, t2=0.5), row(t1=0.4, t2=0.35, t3=0.25)
    )
    decode(table, SPEC, [0], gen_length=4, block_length=4, threshold=0.5)
    assert table.commits() == [[1, 2], [3], [0]]


@pytest.mark.parametrize(
    ("remasking", "order"),
    [("low_confidence", [0, 2, 1]), ("topk_margin", [1, 0, 2]), ("entropy", [2, 0, 1])],
)
def test_confidences_rank_as_their_formulas_do(remasking: str, order: list[int]) -> None:
    """p1 = .5, .45, .48; p1 - p2 = .1, .175, 0; sum p log p = -.943, -1.069, -.833."""
    rows = row(t1=0.5, t2=0.4, t3=0.1), row(t1=0.45, t2=0.275, t3=0.275), row(t1=0.48, t2=0.48, t3=0.04)
    _, table = run(*rows, remasking=remasking)
    assert table.commits() == [[j] for j in order]


def test_random_confidence_is_drawn_anew_at_each_pass_from_its_own_stream() -> None:
    """Token 0 of stream 1 at each masked position of the block, at each of the request's passes; the largest wins."""
    expected: list[list[int]] = []
    for left in ([0, 1, 2], [3, 4, 5]):
        while left:
            winner = max(left, key=lambda j: uniform(5, 0, j + 1, len(expected), 1))
            left.remove(winner)
            expected.append([winner])
    _, table = run(*[sure(3, 0.9)] * 6, block_length=3, remasking="random", seed=5)
    assert table.commits() == expected
    assert expected != [[j] for j in range(6)]


def test_ties_go_to_the_lowest_position_and_the_lowest_token() -> None:
    """Three equal rows, each with three equally probable tokens."""
    decoded, table = run(*[row(t2=0.25, t4=0.25, t7=0.25, t1=0.25)] * 3)
    assert decoded.token_ids == [1, 1, 1]
    assert table.commits() == [[0], [1], [2]]


def test_deferred_choices_wait_while_another_choice_is_left() -> None:
    """Most confident, yet last; once only deferred choices are left, their own confidences rank them."""
    rows = sure(8, 0.7), sure(8, 0.9), sure(3, 0.6)
    _, table = run(*rows, defer_tokens=(8,))
    assert table.commits() == [[2], [1], [0]]


def test_a_deferred_choice_is_committed_if_the_count_demands_it() -> None:
    """Two a pass, one choice that is not deferred: the lowest deferred position goes along, not the surest."""
    _, table = run(sure(8, 0.7), sure(8, 0.9), sure(3, 0.6), sure(8, 0.8), steps=2, defer_tokens=(8,))
    assert table.commits() == [[0, 2], [1, 3]]


def test_a_deferred_choice_does_not_pass_a_threshold() -> None:
    """Until nothing else is left, when 0.9 passes and 0.7 follows."""
    _, table = run(sure(8, 0.7), sure(8, 0.9), sure(3, 0.6), threshold=0.8, defer_tokens=(8,))
    assert table.commits() == [[2], [1], [0]]


def test_suppressed_tokens_leave_the_softmax() -> None:
    """Without token 1, token 2 has 0.3 / 0.5 and is surer than the 0.55 beside it."""
    decoded, table = run(row(t1=0.5, t2=0.3, t3=0.2), row(t3=0.55, t4=0.45), suppress_tokens=(1,))
    assert decoded.token_ids == [2, 3]
    assert table.commits() == [[0], [1]]
    assert decoded.logprobs == pytest.approx([math.log(0.6), math.log(0.55)])


def test_infilled_tokens_are_there_from_the_start_and_stay() -> None:
    """The schedule divides what is masked: three positions in two steps."""
    decoded, table = run(*[sure(3, 0.9)] * 5, steps=2, infill={1: 5, 4: 6})
    assert table.seen[0] == [0, 9, 5, 9, 9, 6]
    assert table.commits() == [[0, 2], [3]]
    assert decoded.token_ids == [3, 5, 3, 3, 6]
    assert [logprob is None for logprob in decoded.logprobs] == [False, True, False, False, True]


def test_a_fully_infilled_block_takes_no_step() -> None:
    """Of two blocks of two, the first is given; the other takes its two steps."""
    decoded, table = run(*[sure(3, 0.9)] * 4, block_length=2, steps=4, infill={0: 5, 1: 5})
    assert table.commits() == [[2], [3]]
    assert decoded.forward_passes == 2


def test_an_infilled_end_token_ends_decoding_with_its_block() -> None:
    """As any end token would, once its block is reached."""
    decoded, _ = run(*[sure(3, 0.9)] * 6, block_length=2, infill={3: 8})
    assert (decoded.token_ids, decoded.finish_reason, decoded.forward_passes) == ([3, 3, 3, 8], "stop", 3)


def test_a_reference_is_committed_where_and_when_the_choices_would_be() -> None:
    """Offset 1 is the surer one, so it goes first; what is written, seen next and scored is the reference."""
    rows = row(t1=0.6, t4=0.4), row(t2=0.9, t5=0.1)
    decoded, table = run(*rows, reference=[4, 5])
    assert decoded.token_ids == [4, 5]
    assert table.seen == [[0, 9, 9], [0, 9, 5]]
    assert decoded.logprobs == [pytest.approx(math.log(0.4)), pytest.approx(math.log(0.1))]


@pytest.mark.parametrize(
    ("kwargs", "tokens", "reason"),
    [
        ({}, [3, 8], "stop"),
        ({"ignore_eos": True}, [3, 8, 8, 3, 5, 3], "length"),
        ({"ignore_eos": True, "stop_token_ids": (5, 7)}, [3, 8, 8, 3, 5], "stop"),
        ({"stop_token_ids": (3,)}, [3], "stop"),
    ],
)
def test_completion_is_cut_after_the_first_end_or_stop_token(
    kwargs: dict[str, Any], tokens: list[int], reason: str
) -> None:
    """`ignore_eos` sets aside the model's end tokens, not the stop tokens."""
    rows = [sure(token, 0.9) for token in (3, 8, 8, 3, 5, 3)]
    decoded, _ = run(*rows, block_length=3, **kwargs)
    assert (decoded.token_ids, decoded.finish_reason) == (tokens, reason)
    assert len(decoded.logprobs) == len(tokens)


def test_a_stop_is_noticed_only_when_its_block_is_full() -> None:
    """The end token comes first, the block's other two positions still take their passes."""
    decoded, table = run(sure(8, 0.9), *[sure(3, 0.6)] * 5, block_length=3)
    assert (decoded.token_ids, decoded.forward_passes) == ([8], 3)
    assert len(table.seen) == 3


def test_a_mask_token_in_the_prompt_or_chosen_is_an_ordinary_token() -> None:
    """Chosen in the first pass, it is not touched again; the prompt is shown as it is."""
    decoded, table = run(sure(9, 0.9), sure(3, 0.8), prompt=(9, 9))
    assert decoded.token_ids == [9, 3]
    assert table.seen == [[9, 9, 9, 9], [9, 9, 9, 9]]


def test_a_shifted_model_predicts_from_the_row_before() -> None:
    """The prompt's last row predicts the first offset; the last row predicts nothing."""
    table = Table(sure(1, 0.9), sure(2, 0.9), sure(3, 0.9), sure(4, 0.9))
    decoded = decode(table, SHIFTED, [0, 0], gen_length=2, block_length=2)
    assert decoded.token_ids == [2, 3]


def test_guidance_moves_away_from_the_pass_without_the_prompt() -> None:
    """By s + 1 = 3 times the difference; masks replace the prompt alone, and the two passes count as one."""
    seen = []

    def model(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        prompted = input_ids[0, 0] != 9
        return torch.tensor([1.0, 0.0, 2.0] if prompted else [0.0, -2.0, 2.0]).expand(1, input_ids.shape[1], 3)

    decoded = decode(model, SPEC, [5, 6], gen_length=2, block_length=2, cfg_scale=2.0, infill={1: 7})
    assert seen == [[5, 6, 9, 7], [9, 9, 9, 7]]
    assert decoded.token_ids == [1, 7]  # z = 3, 4, 2
    assert decoded.logprobs[0] == pytest.approx(4 - math.log(math.exp(3) + math.exp(4) + math.exp(2)))
    assert decoded.forward_passes == 1


def test_sampling_adds_keyed_noise_to_scaled_logits() -> None:
    """The step goes on counting over blocks, the position starts at the prompt; the log-probability stays clean."""
    p = row(t1=0.5, t2=0.3, t3=0.2)
    decoded, _ = run(*[p] * 12, block_length=1, temperature=0.7, seed=2**40 + 3)
    expected = [max((1, 2, 3), key=lambda v: math.log(p[v]) / 0.7 + gumbel(2**40 + 3, v, j + 1, j)) for j in range(12)]
    assert decoded.token_ids == expected
    assert set(expected) == {1, 2, 3}
    assert decoded.logprobs == pytest.approx([math.log(p[v]) for v in expected])


@pytest.mark.parametrize(
    ("kwargs", "tokens"),
    [
        ({}, {1, 2, 3, 4}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.25}, {1, 2}),
        ({"top_p": 0.24}, {1}),
        ({"top_p": 0.5, "top_k": 2}, {1, 2}),
        ({"top_p": 0.5, "top_k": 4}, {1, 2, 3}),
    ],
)
def test_filters_keep_the_best_ranks(kwargs: dict[str, Any], tokens: set[int]) -> None:
    """Four equal tokens rank by id; one is kept if the better ones have at most top_p together."""
    decoded, _ = run(*[row(t1=0.25, t2=0.25, t3=0.25, t4=0.25)] * 40, temperature=1.0, steps=1, **kwargs)
    assert set(decoded.token_ids) == tokens


@pytest.mark.parametrize(("top_p", "tokens"), [(0.6, {1, 2}), (0.55, {1})])
def test_top_p_measures_probability_at_the_temperature(top_p: float, tokens: set[int]) -> None:
    """0.64 and 0.36 at t = 2 are 4/7 and 3/7, for their square roots are 0.8 and 0.6."""
    decoded, _ = run(*[row(t1=0.64, t2=0.36)] * 40, temperature=2.0, steps=1, top_p=top_p)
    assert set(decoded.token_ids) == tokens


def test_top_p_looks_within_the_best_1024() -> None:
    """Of 1100 equally probable tokens the last 76 cannot be chosen; without top-p they can."""
    flat = [[1 / 1100] * 1100] * 40
    filtered, _ = run(*flat, temperature=1.0, steps=1, ignore_eos=True, top_p=1.0)
    free, _ = run(*flat, temperature=1.0, steps=1, ignore_eos=True)
    assert max(filtered.token_ids) < 1024 <= max(free.token_ids)


@pytest.mark.parametrize(
    ("rows", "kwargs", "margin"),
    [
        ((row(t1=0.6, t2=0.4),), {}, math.log(0.6 / 0.4)),  # the other token
        ((row(t1=0.9, t2=0.1), row(t1=0.88, t2=0.12)), {}, 0.02),  # the commit boundary
        ((row(t1=0.9, t2=0.1), row(t1=0.88, t2=0.12)), {"steps": 1}, math.log(0.88 / 0.12)),  # no boundary
        ((row(t1=0.9, t2=0.1), row(t1=0.7, t2=0.3)), {"threshold": 0.65}, 0.05),  # just above the threshold
        ((row(t1=0.9, t2=0.1), row(t1=0.7, t2=0.3)), {"threshold": 0.89}, 0.19),  # the best passes in any case
        ((row(t1=0.9, t2=0.1), row(t1=0.8, t2=0.2)), {"threshold": 0.99}, 0.1),  # none passes: which is best
        ((row(t1=0.9, t2=0.1), row(t1=0.9, t2=0.1)), {"remasking": "random"}, math.log(9)),  # exact confidences
        ((row(t1=0.9, t8=0.1), row(t8=0.9, t1=0.1)), {"defer_tokens": (8,)}, math.log(9)),  # deferred, not close
        ((row(t1=0.6, t2=0.4),), {"temperature": 1.0, "top_k": 1}, math.log(0.6 / 0.4)),  # the filter's edge
        ((row(t1=0.6, t2=0.4),), {"temperature": 1.0, "top_p": 0.5, "seed": 6}, 0.1),  # let in, token 2 would win
    ],
)
def test_margin_is_the_smallest_change_that_matters(
    rows: tuple[list[float], ...], kwargs: dict[str, Any], margin: float
) -> None:
    """In logits for a token, in probability for a confidence."""
    assert run(*rows, **kwargs)[0].margin == pytest.approx(margin)
