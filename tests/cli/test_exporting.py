"""`dllmc export`."""

import json
import os
from pathlib import Path

import pytest

from tests.artifacts import tree
from tests.cli.test_commands import is_one_line, run
from tests.export.models import compiled


def test_onnx(tiny_llada: Path, tmp_path: Path) -> None:
    """A line a file with its size; as JSON, the same numbers."""
    out = tmp_path / "out"
    result = run("export", tiny_llada, "--format", "onnx", "--out", out)
    assert result.exit_code == 0
    files = {name: len(content) for name, content in tree(out).items()}
    assert [Path(line.split()[-1]).name for line in result.stdout.splitlines()] == sorted(files)
    assert {"dense.onnx", "refresh.onnx", "reuse.onnx", "weights.bin", "model.json"} <= files.keys()
    again = run("export", tiny_llada, "--format", "onnx", "--out", out, "--json")
    assert json.loads(again.stdout) == {"out": str(out), "format": "onnx", "files": files, "report": ""}


def test_an_export_is_not_served(tiny_llada: Path, tmp_path: Path) -> None:
    """Dllmc opens what holds no code; what is an export is told apart from what is nothing."""
    run("export", tiny_llada, "--format", "onnx", "--out", tmp_path / "out")
    for command in ("generate", "verify", "inspect"):
        result = run(command, tmp_path / "out")
        assert result.exit_code == 2
        assert "out: an export, which is for another runtime; give a directory that `dllmc compile`" in result.stderr


def test_options_of_another_format_are_refused(tiny_llada: Path, tmp_path: Path) -> None:
    for form, option in (("onnx", "--dry-run"), ("aoti", "--logits"), ("tensorrt", "--keep-custom-ops")):
        result = run("export", tiny_llada, "--format", form, "--out", tmp_path / "out", option)
        assert result.exit_code == 2
        assert is_one_line(result)
        assert f"--format {form} does not go with {option}" in result.stderr
    assert os.listdir(tmp_path) == []


def test_logits_and_custom_operators_are_in_the_models(tiny_llada: Path, tmp_path: Path) -> None:
    import onnx

    run("export", tiny_llada, "--format", "onnx", "--out", tmp_path / "out", "--logits", "--keep-custom-ops")
    model = onnx.load(tmp_path / "out" / "dense.onnx", load_external_data=False)
    assert "logits" in {value.name for value in model.graph.output}
    assert {opset.domain for opset in model.opset_import} == {"", "dllmc"}


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    result = run("export", tmp_path, "--format", "onnx", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert is_one_line(result)
    assert "no artifact, for it has no manifest.json" in result.stderr


@pytest.mark.slow
def test_a_dry_run_of_tensorrt_reports_partitions(tmp_path: Path) -> None:
    """And writes nothing; without a dry run, it says what to install."""
    artifact = compiled(tmp_path / "artifact").path
    out = tmp_path / "out"
    result = run("export", artifact, "--format", "tensorrt", "--out", out, "--dry-run")
    assert result.exit_code == 0
    assert "program 'reuse': dllmc's own cut of the graph: " in result.stdout
    refused = run("export", artifact, "--format", "tensorrt", "--out", out)
    assert refused.exit_code == 2
    assert is_one_line(refused)
    assert "pip install 'dllmc[tensorrt]'" in refused.stderr
    assert not out.exists()
