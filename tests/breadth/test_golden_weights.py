"""The golden checkpoints' weights in modules of published style give the golden tokens."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

import dllmc
from tests.breadth.published import Dream, LLaDA
from tests.golden.cases import FOLDERS, ROOT, dense_cases, load_model

STYLES: dict[str, type[nn.Module]] = {"llada-mha": LLaDA, "dream-gqa": Dream}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_dense_case_in_shared_steps(folder: str, tmp_path: Path) -> None:
    """Compiled as bare modules; tokens are exact, whatever the requests that share a step."""
    module = STYLES[folder](json.loads((ROOT / folder / "config.json").read_text()))
    module.load_state_dict(load_file(ROOT / folder / "model.safetensors"))
    _, spec = load_model(folder)
    engine = dllmc.load(dllmc.compile(module, tmp_path / "artifact", spec=spec).path)
    cases = [case for case in dense_cases() if case.folder == folder]
    assert len(cases) > 10
    params = [dllmc.SamplingParams(**case.kwargs) for case in cases]
    results = engine.generate([case.prompt_ids for case in cases], params)
    assert [r.token_ids for r in results] == [case.completion for case in cases]
    assert all(case.nfe in (None, r.forward_passes) for case, r in zip(cases, results, strict=True))
