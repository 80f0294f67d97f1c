"""The dense golden cases under three memory budgets: tokens are those of a step that works on everything at once."""

import re
from pathlib import Path

import pytest

import dllmc
from dllmc.errors import BudgetError
from dllmc.ir.program import ForRows
from tests.golden.cases import FOLDERS, ROOT, dense_cases

AMPLE = 1 << 30


def sizes(folder: str) -> dict[str, int]:
    """The smallest step that holds any one case of a folder: a guided request has its tokens twice."""
    cases = [case for case in dense_cases() if case.folder == folder]
    guided = {case.id: 1 + bool(case.kwargs.get("cfg_scale")) for case in cases}
    lengths = [guided[c.id] * (len(c.prompt_ids) + c.kwargs["gen_length"]) for c in cases]
    rows = [min(c.kwargs["block_length"], c.kwargs["gen_length"]) for c in cases]
    return {"max_tokens_per_step": max(lengths), "max_logit_rows": max(rows), "max_requests": 2}


def compiled(folder: str, budget: int, out: Path) -> dllmc.Artifact:
    return dllmc.compile(ROOT / folder, out, dllmc.CompileOptions(**sizes(folder), memory_budget=budget))


def smallest_budget(folder: str, out: Path) -> int:
    """What the refusal of a budget of one byte says would do."""
    with pytest.raises(BudgetError) as refusal:
        compiled(folder, 1, out)
    found = re.search(r"give (\d+) bytes or more", str(refusal.value))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("folder", "every"), [(FOLDERS[0], 10), *(pytest.param(f, 1, marks=pytest.mark.slow) for f in FOLDERS)]
)
def test_tokens_under_three_budgets(folder: str, every: int, tmp_path: Path) -> None:
    """The smallest budget that works, one between, and one that holds every row at once; of all cases or a part."""
    least = smallest_budget(folder, tmp_path / "none")
    with pytest.raises(BudgetError):
        compiled(folder, least - 1, tmp_path / "none")
    chunks = []
    ample = compiled(folder, AMPLE, tmp_path / "ample").memory["total"]
    for index, budget in enumerate((least, (least + ample) // 2, AMPLE)):
        artifact = compiled(folder, budget, tmp_path / str(index))
        program = artifact.programs["dense"]
        assert artifact.memory["total"] <= budget
        assert any(isinstance(item, ForRows) for item in program.instructions)
        chunks.append(program.maxima["chunk"])
        cases = [case for case in dense_cases() if case.folder == folder][::every]
        params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
        results = dllmc.load(artifact.path).generate([case.prompt_ids for case in cases], params)
        assert [r.token_ids for r in results] == [case.completion for case in cases]
    assert chunks[0] < chunks[1] <= chunks[2] == sizes(folder)["max_tokens_per_step"]
