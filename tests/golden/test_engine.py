"""Every dense golden case through the compiled artifact: one at a time, and all of a folder in shared steps."""

from collections.abc import Callable

import pytest

import dllmc
from tests.golden.cases import FOLDERS, Case, dense_cases

GoldenEngine = Callable[[str], dllmc.Engine]


@pytest.mark.parametrize("case", dense_cases(), ids=str)
def test_case_alone(case: Case, golden_engine: GoldenEngine) -> None:
    """Tokens are exact, and so is the number of forward passes where the case gives it."""
    [result] = golden_engine(case.folder).generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs))
    assert result.token_ids == case.completion
    assert case.nfe in (None, result.forward_passes)


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_cases_together(folder: str, golden_engine: GoldenEngine) -> None:
    """Sharing steps with other requests of other lengths and rules changes no token."""
    cases = [case for case in dense_cases() if case.folder == folder]
    params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
    results = golden_engine(folder).generate([case.prompt_ids for case in cases], params)
    assert [r.token_ids for r in results] == [case.completion for case in cases]
