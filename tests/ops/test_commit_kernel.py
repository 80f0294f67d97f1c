"""What a GPU does between two steps, against the host's composing of rows and a brute force that commits alone."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllmc
from dllmc.ir import interface
from dllmc.ops.kernels import commit as kernels
from dllmc.runtime.batch import Batch, compose
from dllmc.runtime.buckets import Buckets
from dllmc.runtime.launch import unknown
from dllmc.runtime.request import RequestState
from dllmc.runtime.table import Table
from dllmc.spec import ModelSpec
from tests.ops.calls import interpreted
from tests.runtime.test_sampling import CONFIDENCES, Row, one_request

SPEC = ModelSpec(vocab_size=100, mask_id=99, end_ids=(), max_positions=400)
MAXIMA = {"tokens": 3000, "rows": 1000, "guided": 1000, "segments": 16, "active": 1000}
DEVICES = (pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu))


@st.composite
def tables(draw: st.DrawFn, lengths: tuple[int, ...] = (1, 5, 12)) -> Table:
    """Up to six requests in their first block, some with guidance, a reference, tokens infilled or deferred."""
    table = Table(8, 400)
    for row in draw(st.permutations(range(8)))[: draw(st.integers(1, 6))]:
        block = draw(st.sampled_from(lengths))
        threshold = draw(st.sampled_from([None, None, 0.5, 1.0]))
        count = draw(st.integers(1, block)) if threshold is None else 1
        params = dllmc.SamplingParams(
            gen_length=block * 2,
            block_length=block,
            steps=None if threshold else 2 * count,
            threshold=threshold,
            cfg_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
            defer_tokens=draw(st.sampled_from([(), (1, 2), tuple(range(0, 90, 2))])),
        )
        reference = draw(st.sampled_from([None, [7] * (2 * block)]))
        infill = draw(st.dictionaries(st.integers(0, block - 1), st.integers(0, 98), max_size=block // 2))
        state = RequestState([5] * draw(st.integers(1, 9)), params, SPEC, infill, reference)
        done = draw(st.integers(0, int(state.table.left[0]) - 1))
        state.commit(state.candidates()[:done], np.arange(done))
        state.move(table, row)
        table.lost[row] = draw(st.integers(0, 7)) == 0
    return table


class Device(NamedTuple):
    """What a GPU has after it has picked the rows of a step."""

    places: torch.Tensor
    sequences: torch.Tensor
    counts: torch.Tensor
    inputs: dict[str, torch.Tensor]


def composed(table: Table) -> Batch:
    return compose(table, np.flatnonzero(table.length), MAXIMA["rows"], SPEC.mask_id, buckets=Buckets.of(MAXIMA))


def picked(step: Batch, device: str) -> Device:
    """All that is to be written is wrong at first."""
    table, sizes = step.table, step.sizes
    table.fresh[:] = True
    sequences = torch.full((8, 2, 400), 77, dtype=torch.int32)
    for row, part in unknown(table, step.rows).items():
        sequences[row, :, : part.shape[1]] = torch.from_numpy(part)
    inputs = {"token_ids": torch.from_numpy(step.given["token_ids"].copy())}
    inputs["token_ids"][inputs["token_ids"] == SPEC.mask_id] = 98
    for name in kernels.PICKED:
        dtype, shape = interface.INPUTS[name]
        inputs[name] = torch.full([dim.at(sizes) for dim in shape], -9, dtype=getattr(torch, dtype))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    found = Device(
        torch.from_numpy(step.places()).to(device),
        sequences.to(device),
        torch.full((16,), -9, dtype=torch.int32, device=device),
        inputs,
    )
    kernels.select(*found, sizes["rows"], sizes["guided"], SPEC.mask_id)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_the_rows_are_those_that_the_host_picks(device: str) -> None:
    """Padding too; and tokens of blocks are as they are by now, whatever the host gave."""

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(tables())
    def any_step(table: Table) -> None:
        step = composed(table)
        found = picked(step, device).inputs
        for name, value in step.picked().items():
            np.testing.assert_array_equal(found[name].cpu().numpy(), value, err_msg=name)
        masked = step.given["token_ids"] == SPEC.mask_id
        own = table.token_ids[step.committing], table.masked[step.committing]
        assert own[0][own[1]].tolist() == [SPEC.mask_id] * int(own[1].sum())
        where = found["rows"].cpu().numpy()[: step.candidates[0].size]
        assert (found["token_ids"].cpu().numpy()[where] == SPEC.mask_id).all()
        assert masked[where].all()

    any_step()


def checked(table: Table, draw_confidence: list[float], tokens: list[int], device: str) -> None:
    """Commit made-up predictions, and compare with each request alone."""
    step = composed(table)
    found = picked(step, device)
    rows, (segment, position) = step.sizes["rows"], step.candidates
    token = np.array([tokens[i % len(tokens)] for i in range(rows)], np.int64)
    confidence = np.array([draw_confidence[i % len(draw_confidence)] for i in range(rows)], np.float32)
    logprob = -np.arange(rows, dtype=np.float32) / 4
    outputs = {"token": token, "confidence": confidence, "logprob": logprob}
    committed = torch.full((2, rows), -9, dtype=torch.int32, device=device)
    given_outputs = {name: torch.from_numpy(value).to(device) for name, value in outputs.items()}
    before = found.sequences.clone()
    kernels.commit(found.places, found.sequences, found.counts, found.inputs["row_position"], given_outputs, committed)
    commits = step.chosen(committed.cpu().numpy())
    expected = []
    for index, row in enumerate(step.committing.tolist()):
        mine = np.flatnonzero(segment == index)
        deferred = set(table.deferred[row].tolist())
        candidates = [Row(index, int(position[i]), float(confidence[i]), int(token[i]) in deferred) for i in mine]
        chosen = one_request(candidates, int(step.counts[index]), float(table.threshold[row]))
        places = {one.position for one in chosen}
        expected += [i for i in mine if position[i] in places]
    assert commits.segment.tolist() == segment[expected].tolist()
    assert commits.position.tolist() == position[expected].tolist()
    assert commits.token.tolist() == token[expected].tolist()
    assert commits.logprob.tolist() == logprob[expected].tolist()
    after = before.clone()
    for i in expected:
        row = int(step.committing[segment[i]])
        target = int(table.reference[row, position[i]])
        after[row, 0, int(position[i])] = int(token[i]) if target < 0 else target
    assert torch.equal(found.sequences, after)


@pytest.mark.parametrize("device", DEVICES)
def test_commits_are_those_of_each_request_alone(device: str) -> None:
    """Ties, NaN and infinities, deferred tokens and thresholds; what is committed stands in the sequence."""

    @settings(deadline=None, derandomize=True, max_examples=80)
    @given(
        tables(), st.lists(CONFIDENCES, min_size=1, max_size=12), st.lists(st.integers(0, 9), min_size=1, max_size=7)
    )
    def any_step(table: Table, confidences: list[float], tokens: list[int]) -> None:
        checked(table, confidences, tokens, device)

    any_step()


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_longer_than_a_tile(device: str) -> None:
    """Of which each row is compared with those of all tiles."""

    @settings(deadline=None, derandomize=True, max_examples=4)
    @given(tables(lengths=(1, kernels.TILE, 2 * kernels.TILE + 7)), st.integers(0, 5))
    def any_step(table: Table, seed: int) -> None:
        random = np.random.default_rng(seed)
        confidences = [*random.choice(60, 300).tolist(), math.nan, -math.inf]
        checked(table, confidences, random.integers(0, 90, 50).tolist(), device)
        step = composed(table)
        found = picked(step, device).inputs
        for name, value in step.picked().items():
            np.testing.assert_array_equal(found[name].cpu().numpy(), value, err_msg=name)

    any_step()
