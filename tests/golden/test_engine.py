"""Every golden case through the compiled artifact: one at a time, and all of a folder in shared steps."""

from collections.abc import Callable

import pytest

import dllmc
from tests.brute_force import decode
from tests.golden.cases import FOLDERS, Case, all_cases, load_model
from tests.golden.test_brute_force import CLOSE

GoldenEngine = Callable[[str], dllmc.Engine]


def policy(case: Case) -> dllmc.CachePolicy:
    return dllmc.CachePolicy(mode="none") if case.cache is None else dllmc.CachePolicy(**case.cache)


def completions(case: Case) -> list[list[int]]:
    """What a case may give: the golden output; on another machine the exact one, of the case that rounding decides."""
    if case.id != CLOSE:
        return [case.completion]
    exact = decode(*load_model(case.folder), case.prompt_ids, **case.kwargs, cache=case.cache)
    return [case.completion, exact.token_ids]


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case_alone(case: Case, golden_engine: GoldenEngine) -> None:
    """Tokens are exact, and so is the number of forward passes where the case gives it; all pages are free again."""
    engine = golden_engine(case.folder)
    [result] = engine.generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs), policy(case))
    assert result.token_ids in completions(case)
    assert case.nfe in (None, result.forward_passes)
    assert engine.pool is not None
    assert engine.pool.free == engine.pool.pages


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_cases_together(folder: str, golden_engine: GoldenEngine) -> None:
    """Sharing steps with other requests of other lengths, policies and phases changes no token."""
    cases = [case for case in all_cases() if case.folder == folder]
    params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
    engine = golden_engine(folder)
    before = engine.steps
    results = engine.generate([case.prompt_ids for case in cases], params, [policy(case) for case in cases])
    assert all(r.token_ids in completions(case) for r, case in zip(results, cases, strict=True))
    assert engine.steps - before < sum(r.forward_passes for r in results) / 4
