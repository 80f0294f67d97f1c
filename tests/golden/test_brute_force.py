"""The brute force gives the outputs of the published decoders, so other tests may rely on it."""

import pytest

from tests.brute_force import decode
from tests.golden.cases import Case, all_cases, dense_cases, load_model
from tests.layered import layered, shaken

CLOSE = "dream-gqa-33-definition_cached"
"""At one Refresh of this case two candidates' scores differ by 1.8e-6 in exact arithmetic, less than float32 resolves,
and the golden file, which float32 made, keeps the other one."""


@pytest.mark.parametrize("case", [case for case in all_cases() if case.id != CLOSE], ids=str)
def test_tokens_and_passes_match_the_golden_output(case: Case) -> None:
    """Token for token; forward passes too where the file gives them."""
    model, spec = load_model(case.folder)
    decoded = decode(model, spec, case.prompt_ids, **case.kwargs, cache=case.cache)
    assert decoded.token_ids == case.completion
    assert case.nfe is None or decoded.forward_passes == case.nfe


def test_the_case_that_rounding_decides_matches_one_of_its_two_outcomes() -> None:
    """Errors of float32's size lead to the exact outcome or to the golden one, token for token, and to no third."""
    [case] = [case for case in all_cases() if case.id == CLOSE]
    model, spec = load_model(case.folder)
    exact = decode(model, spec, case.prompt_ids, **case.kwargs, cache=case.cache)
    assert exact.margin < 2e-6
    golden = (case.completion, case.nfe)
    outcomes = []
    for seed in range(10):
        decoded = decode(shaken(layered(model), seed), spec, case.prompt_ids, **case.kwargs, cache=case.cache)
        outcomes.append((decoded.token_ids, decoded.forward_passes))
    assert golden in outcomes
    assert all(outcome in (golden, (exact.token_ids, exact.forward_passes)) for outcome in outcomes)


def test_the_dense_cases_are_all_there() -> None:
    """Each kind of dense case is read, the left-padded batch as one case a row; cached cases carry a policy."""
    by_name = [case.name for case in dense_cases()]
    assert {name: by_name.count(name) for name in by_name} == {
        "dense": 14,
        "dense_threshold": 3,
        "dense_cfg": 1,
        "definition_dense": 16,
        "dense_batch_left_padded": 3,
    }
    assert sorted(len(case.prompt_ids) for case in dense_cases() if case.name == "dense_batch_left_padded") == [
        9,
        15,
        20,
    ]
    assert all(case.cache is not None for case in all_cases() if "cache" in case.name or "sparse" in case.name)
