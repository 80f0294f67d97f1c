"""The simulator: traces, the cost model by hand, and that what it serves adds up."""

import numpy as np
import pytest

import dllmc
from benchmarks import workloads
from benchmarks.calibrate import fit
from benchmarks.cost_model import Device, Shape, Work, work_of
from benchmarks.simulate import Setting, commit, run
from dllmc.runtime.request import RequestState
from dllmc.runtime.scheduler import POLICIES

LOADED = workloads.load()
SPEC = dllmc.ModelSpec(100, 99, (98,), max_positions=4096)
SHAPE = Shape(hidden=8, layers=3, heads=4, kv_heads=2, ffn=16, vocab=100, dtype_bytes=2)


@pytest.mark.parametrize("name", ["livebench", "burst", "osc", "mixed"])
def test_traces_are_those_of_the_mix(name: str) -> None:
    trace = LOADED.trace(name, 4000, rate=2.0, seed=0)
    assert LOADED.trace(name, 4000, rate=2.0, seed=0) == trace != LOADED.trace(name, 4000, rate=2.0, seed=1)
    assert 4000 / trace[-1].seconds == pytest.approx(2.0, rel=0.25 if name == "burst" else 0.1)
    assert all(one.gen_length % 32 == 0 for one in trace)
    if name != "mixed":
        mix = LOADED.mixes[name]
        prompts = [one.prompt_length for one in trace]
        assert np.median(prompts) == pytest.approx(mix["prompt"]["median"], rel=0.1)
        assert mix["prompt"]["min"] <= min(prompts) <= max(prompts) <= mix["prompt"]["max"]
        assert all(one.steps == one.gen_length * mix["steps_per_token"] for one in trace)
    bursts = {one.seconds for one in trace}
    assert len(bursts) == (125 if name == "burst" else 4000)
    together = LOADED.trace(name, 10, rate=np.inf, seed=0)
    assert [one.seconds for one in together] == [0.0] * 10
    assert [one.prompt_length for one in LOADED.trace(name, 10, np.inf, 0, scale=8)] == [
        max(1, round(one.prompt_length / 8)) for one in together
    ]


def request(prompt: int, cache: dllmc.CachePolicy, cfg: float = 0.0) -> RequestState:
    params = dllmc.SamplingParams(gen_length=8, block_length=4, cfg_scale=cfg)
    return RequestState([1] * prompt, params, SPEC, cache=cache)


def work(one: RequestState) -> Work:
    return work_of(SHAPE, one.table, np.array([one.row]))


def test_the_work_of_a_step_by_hand() -> None:
    """Of a Refresh all 18 tokens, of Reuse the 4 of the block and what is kept of the 14 others."""
    one = request(10, dllmc.CachePolicy(retention=0.5))
    layer = 2 * 8 * (8 + 4) + 3 * 8 * 16
    kv = 2 * 3 * 4 * 2  # keys and values, layers, two heads of two, bytes
    refresh = work(one)
    assert refresh.matmul_flops == 2 * 18 * 3 * layer
    assert refresh.attention_flops == 4 * 18 * 18 * 3 * 8
    assert refresh.attention_bytes == (18 + 7) * kv
    assert refresh.head_flops == 2 * 4 * 8 * 100
    assert refresh.head_bytes == 2 * 8 * 100
    one.commit(one.candidates()[:1], np.array([7]))
    reuse = work(one)
    assert reuse.matmul_flops == 2 * 4 * 3 * layer
    assert reuse.attention_flops == 4 * 4 * (4 + 7) * 3 * 8
    assert reuse.attention_bytes == (4 + 7) * kv
    assert reuse.head_flops == 2 * 3 * 8 * 100
    guided = work(request(10, dllmc.CachePolicy(retention=0.5), cfg=1.0))
    assert guided.matmul_flops == 2 * refresh.matmul_flops
    assert guided.head_flops == 2 * refresh.head_flops


def test_seconds_are_the_longer_of_operations_and_bytes() -> None:
    device = Device(matmul=10.0, attention=20.0, head=40.0, bandwidth=2.0, launch=0.5)
    assert device.seconds(Work(100, 2, 20, 10, 40, 2, 4)) == 10 + 5 + 1 + 2


def test_speeds_are_found_again() -> None:
    """From steps that follow the model."""
    random = np.random.default_rng(0)
    flops, size = 10 ** random.uniform(6, 11, (3, 200)), 10 ** random.uniform(4, 9, (3, 200))
    steps = Work(flops[0], size[0], flops[1], size[1], flops[2], size[2], np.full(200, 50.0))
    truth = Device(matmul=1.5e11, attention=4e10, head=2.5e11, bandwidth=1.2e10, launch=2e-6)
    found = fit(steps, truth.seconds(steps))
    for name, value in truth.__dict__.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.05), name


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_is_served_once(policy: str) -> None:
    setting = Setting("rtx4090", tokens=4096, requests=16, retention=0.5)
    outcome = run(setting, "mixed", 40, 1.0, 0, policy)
    trace = LOADED.trace("mixed", 40, 1.0, 0)
    assert len(outcome.latencies) == 40
    assert outcome.tokens == sum(one.gen_length for one in trace)
    assert outcome.seconds >= trace[-1].seconds
    assert outcome.steps <= sum(one.steps for one in trace)
    least = setting.shape.weight_bytes / setting.speeds.bandwidth
    assert min(outcome.latencies) > 32 * 0.5 * least * 0.9
    assert setting.fixed_bytes <= outcome.memory <= 0.9 * 24 * 2**30


def test_a_simulated_commit_is_the_schedules() -> None:
    """As many tokens and steps as a request that is decoded."""
    params = dllmc.SamplingParams(gen_length=12, block_length=6, steps=8)
    one = RequestState([1] * 5, params, SPEC, cache=dllmc.CachePolicy())
    counts = []
    while not one.finished:
        committed, full = commit(one.table, np.array([0]))
        counts.append(committed)
        if full.size:
            one.table.masked[0, one.start : one.end] = False
            one.leave_full_blocks()
    assert counts == [2, 2, 1, 1] * 2
