"""What goes to TensorRT, what Torch-TensorRT is called with, and what one is told who has neither it nor a GPU."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dllmc.artifact import Artifact
from dllmc.errors import ExportError
from dllmc.export import tensorrt
from dllmc.export.torch_step import exported
from tests.export.models import compiled


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact of one program: what decoding without caches needs."""
    artifact = compiled(tmp_path_factory.mktemp("export") / "artifact")
    return Artifact(artifact.path, artifact.spec, {"dense": artifact.programs["dense"]}, artifact.manifest)


def test_partitions(dense: Artifact) -> None:
    """The graph is cut at dllmc's operators, of which there are four, and nothing is lost."""
    step = exported(dense.programs["dense"], dense.load_weights())
    names = [str(node.target) for node in step.graph.nodes if str(node.target).startswith("dllmc")]
    assert names == [
        "dllmc.attention.default",
        "dllmc.attention.default",
        "dllmc.guide_rows.default",
        "dllmc.decode_head.default",
    ]
    assert {str(operator) for operator in tensorrt.left_to_torch(step)} == set(names)
    parts = tensorrt.partitions(step)
    assert [call for part in parts if not part.in_tensorrt for call in part.calls] == names
    engines = [part for part in parts if part.in_tensorrt]
    assert len(engines) == 3
    assert sum(call == "aten.linear.default" for part in engines for call in part.calls) == 2 * 7
    assert not [call for part in engines for call in part.calls if "as_strided" in call or "scatter" in call]


def test_dry_run_needs_nothing(dense: Artifact, tmp_path: Path) -> None:
    """The report says whose view it is, and no file is written."""
    report = tensorrt.export(dense, tmp_path / "out", dry_run=True).report
    assert "program 'dense': dllmc's own cut of the graph: 3 partitions for TensorRT" in report
    assert not (tmp_path / "out").exists()


def test_what_is_missing(dense: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch_tensorrt, which is not installed.*pip install 'dllmc\[tensorrt\]'"):
        tensorrt.export(dense, tmp_path / "out")


def test_its_compiler_is_called(dense: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch_tensorrt a dry run is its own: told the range of shapes, and what to leave to torch."""
    calls: list[dict[str, Any]] = []
    module = ModuleType("torch_tensorrt")
    module.__spec__ = ModuleSpec("torch_tensorrt", None)
    module.Input = SimpleNamespace  # type: ignore[attr-defined]
    module.dynamo = SimpleNamespace(compile=lambda step, **given: calls.append(given))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    tensorrt.export(dense, tmp_path / "out", dry_run=True)
    [given] = calls
    assert given["dryrun"] is True
    assert torch.ops.dllmc.attention.default in given["torch_executed_ops"]
    rows = given["kwarg_inputs"]["inputs"]["rows"]
    assert (rows.min_shape, rows.max_shape, rows.dtype) == ([2], [32], torch.int64)
