"""A sample of `benchmarks/artifact_fuzz.py`, and what its whole run found."""

import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import artifact_fuzz, report

# Where what is read is checked, and the functions there that refuse something else than an artifact.
MODULES = {
    "artifact": ("read",),  # of what the file system refuses
    "artifact.directory": ("replacing",),
    "artifact.documents": (),
    "artifact.manifest": (),
    "artifact.weights": ("write",),
    "ir.interface": (),
    "ir.program_json": ("from_json",),  # of operands nested too deeply: then JSON's own reader gives up first
    "memory.verifier": (),
    "ops.registry": (),
    "ops.signatures": (),
}
_REFUSALS = {"ArtifactError", "ProgramError", "BudgetError"}


def checks() -> Iterator[str]:
    """Every function that refuses, by the statements in it that do."""
    for name, others in MODULES.items():
        file = importlib.import_module(f"dllmc.{name}").__file__
        assert file is not None
        for function in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in (*others, "_require"):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                if {call.id for call in calls if isinstance(call, ast.Name)} & {*_REFUSALS, "_require"}:
                    yield f"{name}.{function.name}"


@pytest.mark.parametrize("way", ["altered", "forged"])
def test_a_sample_of_mutants_does_no_harm(way: str, tmp_path: Path) -> None:
    artifact_fuzz.prepare(tmp_path)
    found = artifact_fuzz.fuzz(way, tmp_path, mutants=50, seed=7)
    assert found["wrong"] == []
    assert sum(found["refused_by"].values()) > 30


@pytest.mark.parametrize("way", ["altered", "forged"])
def test_the_whole_run_found_nothing(way: str) -> None:
    found = json.loads((report.RESULTS / "artifact_fuzz.json").read_text())[way]
    assert found["mutants"] >= 10_000
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == found["mutants"]
    assert way == "forged" or found["outcomes"].get("finished", 0) == 0


def test_every_check_refused_some() -> None:
    """Of the whole run: no check is there for nothing."""
    run = json.loads((report.RESULTS / "artifact_fuzz.json").read_text())
    refused = run["altered"]["refused_by"].keys() | run["forged"]["refused_by"].keys()
    assert sorted(set(checks()) - refused) == []
