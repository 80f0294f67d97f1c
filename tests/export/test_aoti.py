"""AOTInductor packages decode as the engine does, from weights that they share, and only where they are trusted."""

import json
from pathlib import Path

import numpy as np
import pytest

import dllmc
from dllmc.errors import ArtifactError, ExportError, ProgramError
from dllmc.export import aoti
from tests.export.models import compiled
from tests.export.steps import CACHED, DENSE, engine_with
from tests.golden.cases import ROOT, Case, all_cases

FOLDER = "llada-mha"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one program: to make it takes half a minute."""
    folder = tmp_path_factory.mktemp("export")
    written = aoti.export(compiled(folder / "artifact"), folder / "out", programs=["dense"])
    assert {"dense.pt2", "model.json", "artifact/manifest.json"} <= written.files.keys()
    return written.path


def test_lengths_that_were_never_traced(export: Path) -> None:
    """The package's tokens are the engine's, at three lengths and with guidance."""
    loaded = aoti.load(export, trust=True)
    ran: set[str] = set()
    packaged = engine_with(loaded.artifact, {"dense": loaded.steps["dense"].run}, ran)
    engine = dllmc.load(loaded.artifact.path)
    for length, guidance in ((1, 0.0), (20, 0.0), (41, 0.0), (7, 1.0)):
        prompt = [10 + at for at in range(length)]
        params = dllmc.SamplingParams(gen_length=16, block_length=8, ignore_eos=True, cfg_scale=guidance)
        [found], [expected] = (each.generate(prompt, params, DENSE) for each in (packaged, engine))
        assert found.token_ids == expected.token_ids
    assert ran == {"dense"}


def test_packages_hold_no_weights(export: Path) -> None:
    """A loaded step uses the tensors that were given to it: another weight, another token."""
    loaded = aoti.load(export, trust=True)
    model = json.loads((export / "model.json").read_text())["programs"]["dense"]
    assert set(model["constants"].values()) == set(loaded.artifact.programs["dense"].weights)
    engine = engine_with(loaded.artifact, {"dense": loaded.steps["dense"].run}, set())
    params = dllmc.SamplingParams(gen_length=4, ignore_eos=True)
    [before] = engine.generate([20, 30], params)
    weights = loaded.artifact.load_weights()
    zeros = {name: weight * 0 for name, weight in weights.items()}
    step = aoti.Step(loaded.artifact.programs["dense"], export / "dense.pt2", zeros, {})
    [after] = engine_with(loaded.artifact, {"dense": step.run}, set()).generate([20, 30], params)
    assert before.token_ids != after.token_ids == [0, 0, 0, 0]


def test_trust_and_hashes(export: Path, tmp_path: Path) -> None:
    """Nothing is loaded without trust, from an altered package, or from what is no export."""
    with pytest.raises(ExportError, match=r"native code, which runs when it is loaded.*trust=True"):
        aoti.load(export)
    altered = tmp_path / "altered"
    altered.mkdir()
    (altered / "artifact").symlink_to(export / "artifact")
    (altered / "model.json").write_bytes((export / "model.json").read_bytes())
    (altered / "dense.pt2").write_bytes((export / "dense.pt2").read_bytes() + b"\0")
    with pytest.raises(ExportError, match=r"dense\.pt2: expected sha256 [0-9a-f]{64}, found"):
        aoti.load(altered, trust=True)
    with pytest.raises(ExportError, match=r"expected the model\.json of an AOTInductor export"):
        aoti.load(tmp_path, trust=True)
    (tmp_path / "model.json").write_text('{"programs": {}, "format": "another"}')
    with pytest.raises(ExportError, match=r"expected the model\.json of an AOTInductor export"):
        aoti.load(tmp_path, trust=True)


def test_sizes_and_inputs_are_checked(export: Path) -> None:
    step = aoti.load(export, trust=True).steps["dense"]
    sizes = {"tokens": 97, "rows": 8, "guided": 0, "segments": 1, "active": 0}
    with pytest.raises(ProgramError, match=r"expected 1 to 96 tokens a step, found 97"):
        step.run(sizes, {})
    with pytest.raises(ProgramError, match=r"expected 2 to 16 rows a step, found 1"):
        step.run(sizes | {"tokens": 5, "rows": 1}, {})
    with pytest.raises(ProgramError, match=r"'token_ids': expected int64 \[5\], found int32 \[5\]"):
        step.run(sizes | {"tokens": 5}, {"token_ids": np.zeros(5, np.int32)})


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"exists and is no AOTInductor export"):
        aoti.export(artifact, tmp_path)


def test_linked_weights_are_refused(tmp_path: Path) -> None:
    """The artifact travels with its packages, and a link would not."""
    artifact = dllmc.compile(ROOT / FOLDER, tmp_path / "artifact", dllmc.CompileOptions(link_weights=True))
    with pytest.raises(ExportError, match="its weights are linked; copy them at compiling"):
        aoti.export(artifact, tmp_path / "out")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dllmc.Engine:
    """An engine on the golden checkpoint, its steps run by packages of all programs."""
    folder = tmp_path_factory.mktemp("golden")
    artifact = dllmc.compile(ROOT / FOLDER, folder / "artifact")
    aoti.export(artifact, folder / "out")
    loaded = aoti.load(folder / "out", trust=True)
    return engine_with(loaded.artifact, {name: step.run for name, step in loaded.steps.items()}, set())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in all_cases() if case.folder == FOLDER], ids=str)
def test_golden(case: Case, golden: dllmc.Engine) -> None:
    """Dense and cached, the tokens are the golden ones."""
    policy = DENSE if case.cache is None else dllmc.CachePolicy(**case.cache)
    [result] = golden.generate([case.prompt_ids], dllmc.SamplingParams(**case.kwargs), policy)
    assert result.token_ids == case.completion


@pytest.mark.slow
def test_golden_in_shared_steps(golden: dllmc.Engine) -> None:
    """Refreshes beside Reuse, which take the program for mixed steps."""
    params = [dllmc.SamplingParams(gen_length=16, block_length=8, steps=s, ignore_eos=True) for s in (4, 8, 16)]
    prompts = [[10 + at for at in range(length)] for length in (5, 9, 30)]
    plain = dllmc.load(golden.artifact.path)
    found, expected = (engine.generate(prompts, params, CACHED) for engine in (golden, plain))
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
