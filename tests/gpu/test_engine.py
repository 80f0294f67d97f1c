"""An engine with more requests than a step holds: mixes, preemption, cancels; graphs and calls give the same bits."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

import dllmc
from dllmc.errors import CancelledError, DeviceError
from dllmc.runtime import graphs
from tests.golden.cases import FOLDERS, ROOT
from tests.gpu.engines import DEVICES, SMALL, engine_on, requests

Engines = Callable[..., dllmc.Engine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Device and folder -> an engine whose steps hold few requests."""

    @cache
    def engine(device: str, folder: str = FOLDERS[0]) -> dllmc.Engine:
        return engine_on(device, ROOT / folder, tmp_path_factory.mktemp("engines") / folder, **SMALL)

    return engine


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_together_is_alone(folder: str, device: str, engines: Engines) -> None:
    """What a request shares its steps with, and how they are padded, changes none of its tokens."""
    engine = engines(device, folder)
    prompts, params, policies = requests()
    together = engine.generate(prompts, params, policies)
    alone = [engine.generate([p], s, c)[0] for p, s, c in zip(prompts, params, policies, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len({tuple(r.token_ids) for r in together}) > len(together) / 2


@pytest.mark.parametrize("device", DEVICES)
def test_taking_places_changes_no_token(device: str, engines: Engines) -> None:
    """Urgent requests take the places of those that run; these replay their Refresh, and go on."""
    engine = engines(device)
    prompts, params, policies = requests()
    expected = [r.token_ids for r in engine.generate(prompts, params, policies)]
    before = engine.stats().preemptions
    given = list(zip(prompts, params, policies, strict=True))
    submitted = [engine.submit(*one) for one in given[:8]]
    for index, one in enumerate(given[8:]):
        engine.step()
        submitted.append(engine.submit(*one, priority=index))
    assert [request.result().token_ids for request in submitted] == expected
    assert engine.stats().preemptions > before


@pytest.mark.parametrize("device", DEVICES)
def test_cancelling_leaves_the_others_alone(device: str, engines: Engines) -> None:
    engine = engines(device)
    prompts, params, policies = requests()
    expected = [r.token_ids for r in engine.generate(prompts, params, policies)]
    submitted = [engine.submit(*one) for one in zip(prompts, params, policies, strict=True)]
    for request in submitted[::3]:
        engine.step()
        request.cancel()
    for index, request in enumerate(submitted):
        if index % 3 == 0 and request.status == "cancelled":
            with pytest.raises(CancelledError):
                request.result()
        else:
            assert request.result().token_ids == expected[index]
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_in_use) == (0, 0, 0)


@pytest.mark.gpu
def test_a_graph_gives_the_bits_of_its_calls(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and log-probabilities, of a fresh engine that records nothing and of one that replays all."""
    engine = engines("cuda")
    prompts, params, policies = requests()
    params = [replace(one, logprobs=True) for one in params]
    for _ in range(3):
        replayed = engine.generate(prompts, params, policies)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 0)
    called = dllmc.Engine(engine.artifact).generate(prompts, params, policies)
    assert replayed == called


@pytest.mark.gpu
def test_warming_up_records_what_the_first_requests_need(engines: Engines) -> None:
    """After it, requests like the given one run in recorded steps alone, from the first on; tokens are the same."""
    loaded = engines("cuda").artifact
    params = dllmc.SamplingParams(gen_length=18, block_length=6, ignore_eos=True)
    prompts = [[(7 * i + 13 * j) % 480 for j in range(30)] for i in range(5)]
    expected = engines("cuda").generate(prompts, params)
    engine = dllmc.Engine(loaded)
    assert engine.warm_up(30, params) > 0
    assert engine.warm_up(30, params) == 0
    assert engine.generate(prompts, params) == expected
    assert not any(executor._bindings for executor in engine._executors.values())


@pytest.mark.gpu
def test_loading_chooses_the_artifacts_device(engines: Engines) -> None:
    """Without a device its own; a CPU where it is asked for; a GPU that is not there never."""
    path = engines("cuda").artifact.path
    assert dllmc.load(path).device == torch.device("cuda", torch.cuda.current_device())
    assert dllmc.load(path, "cpu").device == torch.device("cpu")
    with pytest.raises(DeviceError, match="this machine has"):
        dllmc.load(path, f"cuda:{torch.cuda.device_count()}")
