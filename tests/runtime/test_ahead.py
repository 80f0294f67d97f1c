"""Steps that are composed, and begun, while one runs: on a CPU that plays host and GPU, as late as a GPU may be.

The rows that the GPU picks and what it commits are what the host would pick and commit: tokens are the same.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

import dllmc
from dllmc.errors import CancelledError, StepError
from dllmc.runtime.graphs import GraphExecutor
from tests.golden.cases import ROOT
from tests.gpu.engines import SMALL, requests
from tests.ops.calls import interpreted
from tests.runtime.streams import Late, Recorder, engine_on

pytestmark = interpreted

Pair = tuple[dllmc.Engine, dllmc.Engine, Late]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dllmc.Artifact]:
    made: dict[str, dllmc.Artifact] = {}

    def artifact(folder: str) -> dllmc.Artifact:
        if folder not in made:
            out = tmp_path_factory.mktemp("ahead") / folder
            made[folder] = dllmc.compile(ROOT / folder, out, dllmc.CompileOptions(**SMALL, device="cuda"))
        return made[folder]

    return artifact


@pytest.fixture
def pair(loaded: Callable[[str], dllmc.Artifact], request: pytest.FixtureRequest) -> Pair:
    """An engine of the host, one of a GPU, and this one's stream."""
    artifact = loaded(getattr(request, "param", "llada-mha"))
    stream = Late()
    return dllmc.Engine(artifact, device="cpu"), engine_on(stream, artifact), stream


@pytest.mark.parametrize("pair", [pytest.param("llada-mha", marks=pytest.mark.slow), "dream-gqa"], indirect=True)
def test_tokens_and_passes_are_the_same(pair: Pair) -> None:
    """Of requests of every kind, in line and together; two steps are under way at most, and many are launched ahead."""
    host, gpu, stream = pair
    prompts, params, policies = requests()
    expected = host.generate(prompts, params, policies)
    assert gpu.generate(prompts, params, policies) == expected
    assert stream.most == 2
    assert stream.behind > gpu.steps / 4
    stats = gpu.stats()
    assert (stats.waiting, stats.running, stats.pages_in_use, stats.failed) == (0, 0, 0, 0)
    assert stats.tokens == sum(len(result.token_ids) for result in expected)


def test_without_thresholds_a_step_that_ends_no_block_never_waits(pair: Pair) -> None:
    """The next is launched before it is over: of each block all steps but the first. With one, none is."""
    _, gpu, stream = pair
    for params, behind in (
        (dllmc.SamplingParams(gen_length=18, block_length=6, ignore_eos=True), 15),
        (dllmc.SamplingParams(gen_length=18, block_length=6, ignore_eos=True, threshold=1.0), 0),
    ):
        before, steps = stream.behind, gpu.steps
        gpu.generate([[5, 6, 7, 8]], params)
        assert (gpu.steps - steps, stream.behind - before) == (18, behind)


def test_a_reference_and_infilled_tokens_reach_the_gpu(pair: Pair) -> None:
    host, gpu, _ = pair
    reference = [11 + i for i in range(12)]
    prompts = [dllmc.Prompt([5, 6, 7], {1: 40, 8: 41}, reference), dllmc.Prompt([9, 8], {0: 3}), dllmc.Prompt([4] * 30)]
    params = [dllmc.SamplingParams(gen_length=12, block_length=4, logprobs=True, ignore_eos=True) for _ in prompts]
    expected = host.generate(prompts, params)
    assert gpu.generate(prompts, params) == expected
    assert expected[0].token_ids[2:8] == reference[2:8]


def test_snapshots_are_of_steps_that_are_over(pair: Pair) -> None:
    """What a viewer sees of each request is the same, though more is under way when it looks."""
    host, gpu, _ = pair
    prompts, params, policies = requests(5)
    seen: list[list[dllmc.Snapshot]] = [[], []]
    for engine, kept in zip((host, gpu), seen, strict=True):
        engine.generate(prompts, params, policies, on_step=kept.extend)
    for index in range(5):
        mine = [[one for one in kept if one.index == index] for kept in seen]
        assert mine[0] == mine[1]
        assert len(mine[0]) >= 3


def test_requests_come_and_go(pair: Pair) -> None:
    """Some are cancelled while a step of theirs is under way, others take places; the rest decode the same."""
    host, gpu, _ = pair
    given = list(zip(*requests(16), strict=True))
    expected = [result.token_ids for result in host.generate(*map(list, requests(16)))]
    submitted = []
    for index, one in enumerate(given):
        submitted.append(gpu.submit(*one, priority=index // 5))
        gpu.step()
        if index % 5 == 4:
            submitted[index - 2].cancel()
    for index, request in enumerate(submitted):
        if request.status == "cancelled":
            with pytest.raises(CancelledError):
                request.result()
        else:
            assert request.result().token_ids == expected[index]
    stats = gpu.stats()
    assert stats.cancelled > 1
    assert stats.preemptions > 0
    assert (stats.waiting, stats.running, stats.pages_in_use) == (0, 0, 0)


def test_a_step_of_nobody_is_waited_for(pair: Pair) -> None:
    """Once all of its requests are gone, before anything else runs: none of it is counted or seen."""
    host, gpu, stream = pair
    params = dllmc.SamplingParams(gen_length=12, block_length=12, ignore_eos=True)
    request = gpu.submit([5, 6, 7], params)
    gpu.step()
    assert len(stream.line) == 1
    request.cancel()
    assert not stream.line
    assert gpu.steps == 1
    assert gpu.generate([[9, 9]], params) == host.generate([[9, 9]], params)


def test_a_launch_ahead_that_fails_fails_when_it_is_due(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step under way is committed first. What fails for all is then tried for each request alone."""
    host, gpu, _ = pair
    launch = GraphExecutor.launch
    params = dllmc.SamplingParams(gen_length=6, block_length=6, ignore_eos=True)
    expected = host.generate([[5, 6], [7, 8, 9]], params)

    def launched(executor: GraphExecutor, sizes: dict[str, int], *args: object) -> object:
        if sizes["segments"] > 1 and gpu.steps >= 2:
            raise RuntimeError("no")
        return launch(executor, sizes, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphExecutor, "launch", launched)
    assert gpu.generate([[5, 6], [7, 8, 9]], params) == expected
    assert gpu.stats().failed == 0

    def broken(executor: GraphExecutor, sizes: dict[str, int], *args: object) -> object:
        raise RuntimeError("for good")

    monkeypatch.setattr(GraphExecutor, "launch", broken)
    with pytest.raises(StepError, match="step 0 failed: RuntimeError: for good"):
        gpu.generate([[5, 6]], params)


def test_a_step_that_fails_on_the_gpu_ends_its_requests(pair: Pair) -> None:
    """They cannot be told apart, and what was committed is not known, nor what the step behind did. Others go on."""
    host, gpu, stream = pair
    params = dllmc.SamplingParams(gen_length=6, block_length=6, ignore_eos=True)
    failing = [gpu.submit([token] * 60, params) for token in (5, 6)]
    other = gpu.submit([4] * 240, params)  # a step holds none beside it
    gpu.step()

    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    assert len(gpu._line) == len(stream.line) == 1
    gpu._line[0] = replace(gpu._line[0], wait=fails)  # type: ignore[arg-type]
    gpu.step()
    assert not gpu._line
    for request in failing:
        with pytest.raises(StepError, match="step 1 failed: RuntimeError: an illegal memory access"):
            request.result()
    assert gpu.stats().failed == 2
    assert other.result() == host.generate([[4] * 240], params)[0]


@pytest.mark.parametrize("where", [pytest.param("launch", marks=pytest.mark.slow), "wait"])
def test_an_interrupted_step_is_not_lost(where: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ran it is interrupted, by Ctrl-C say; the requests stay, and decode what they would have."""
    host, gpu, stream = pair
    prompts, params, policies = requests(8)
    expected = host.generate(prompts, params, policies)
    submitted = [gpu.submit(*one) for one in zip(prompts, params, policies, strict=True)]
    launch = GraphExecutor.launch
    calls = count(1)

    def interrupted() -> None:
        if next(calls) % 5 == 0:
            raise KeyboardInterrupt

    def launched(*args: Any) -> Any:
        wait = launch(*args)
        if where == "launch":
            while stream.line:  # the GPU may be as far as that
                stream.line.pop(0)()
            interrupted()
            return wait

        def waited() -> Any:
            interrupted()
            return wait()

        return waited

    monkeypatch.setattr(GraphExecutor, "launch", launched)
    times = 0
    while not all(request.done for request in submitted):
        try:
            gpu.step()
        except KeyboardInterrupt:
            times += 1
    assert times > 3
    assert [request.result() for request in submitted] == expected


def test_warming_up_between_two_steps(loaded: Callable[[str], dllmc.Artifact]) -> None:
    """Records what it wants, and leaves alone what a step under way returns."""
    artifact = loaded("llada-mha")
    host, gpu = dllmc.Engine(artifact, device="cpu"), engine_on(Recorder(), artifact)
    params = dllmc.SamplingParams(gen_length=12, block_length=12, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9]]
    expected = host.generate(prompts, params)
    submitted = [gpu.submit(prompt, params) for prompt in prompts]
    for length in range(20, 26):
        gpu.step()
        gpu.warm_up(length, dllmc.SamplingParams(gen_length=2, block_length=2))
    assert [request.result() for request in submitted] == expected
