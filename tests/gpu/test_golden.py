"""The golden cases of both folders in float32: tokens are exact, alone and in shared steps."""

from collections.abc import Callable
from functools import cache

import pytest

import dllmc
from tests.golden.cases import FOLDERS, ROOT, Case, all_cases
from tests.golden.test_engine import completions, policy
from tests.gpu.engines import DEVICES, engine_on

Engines = Callable[[str, str], dllmc.Engine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Device and folder -> an engine, compiled with default options."""

    @cache
    def engine(device: str, folder: str) -> dllmc.Engine:
        return engine_on(device, ROOT / folder, tmp_path_factory.mktemp("golden") / folder)

    return engine


@pytest.mark.gpu
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case_alone(case: Case, engines: Engines) -> None:
    engine = engines("cuda", case.folder)
    [result] = engine.generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs), policy(case))
    assert result.token_ids in completions(case)
    assert case.nfe in (None, result.forward_passes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_all_cases_together(folder: str, device: str, engines: Engines) -> None:
    """Three times: call by call, as it is recorded, and replayed."""
    cases = [case for case in all_cases() if case.folder == folder]
    prompts, policies = [case.prompt_ids for case in cases], [policy(case) for case in cases]
    params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
    for _ in range(1 if device == "cpu" else 3):
        results = engines(device, folder).generate(prompts, params, policies)
        wrong = [case.id for case, r in zip(cases, results, strict=True) if r.token_ids not in completions(case)]
        assert not wrong
