"""The trace in an artifact: stored for people, hashed as any file, parsed when somebody looks, and not needed."""

import json
import shutil
from pathlib import Path

import pytest

import dllmc
from dllmc.artifact import read
from dllmc.errors import ArtifactError
from tests.artifacts import edit_manifest, read_manifest, rehash, write
from tests.ir.test_trace import SMALL

TRACE = "trace.json"
# What the trace of a model of 32 layers may take; the bundled model has 4, and a trace grows with the layers at most.
LARGEST_BYTES, BUNDLED_SHARE = 1_000_000, 4 / 32


@pytest.fixture
def untraced(tiny_llada: Path, tmp_path: Path) -> Path:
    """The bundled model's artifact without its trace."""
    artifact = shutil.copytree(tiny_llada, tmp_path / "out")
    (artifact / TRACE).unlink()
    files = read_manifest(artifact)["files"]
    edit_manifest(artifact, files={name: entry for name, entry in files.items() if name != TRACE})
    return artifact


def test_a_trace_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path / "out", trace=SMALL)
    assert TRACE in written.manifest["files"]
    assert read(tmp_path / "out").load_trace() == SMALL


def test_compiling_leaves_a_trace_of_every_pass(tiny_llada: Path) -> None:
    """It agrees with the manifest, and starts from a graph without dllmc's operators and ends at one with."""
    artifact = read(tiny_llada)
    trace = artifact.load_trace()
    assert trace is not None
    told = [{"pass": entry.text, "modified": entry.modified, **entry.stats} for entry in trace.passes]
    assert told == artifact.manifest["passes"]
    ours = [
        [c.operator for c in graph if c.operator.startswith("dllmc.")] for graph in (trace.graphs[0], trace.after())
    ]
    assert ours[0] == []
    assert "dllmc.decode_head" in ours[1]


def test_a_trace_is_small(tiny_llada: Path) -> None:
    assert (tiny_llada / TRACE).stat().st_size < LARGEST_BYTES * BUNDLED_SHARE


def test_an_artifact_without_a_trace_serves(untraced: Path) -> None:
    assert read(untraced).load_trace() is None
    params = dllmc.SamplingParams(gen_length=2, block_length=2, ignore_eos=True)
    [result] = dllmc.load(untraced).generate([[5, 6]], params)
    assert len(result.token_ids) == 2


def test_a_changed_trace_is_refused_as_any_file(tmp_path: Path) -> None:
    write(tmp_path / "out", trace=SMALL)
    (tmp_path / "out" / TRACE).write_text("{}")
    with pytest.raises(ArtifactError, match=r"trace\.json: expected \d+ bytes, found 2"):
        read(tmp_path / "out")


@pytest.mark.parametrize("content", ["{", json.dumps({"records": []})])
def test_a_trace_that_is_none_hinders_no_reading(tmp_path: Path, content: str) -> None:
    """A forger's: the artifact is read, for nothing is run from it; who asks for the trace is told."""
    write(tmp_path / "out", trace=SMALL)
    (tmp_path / "out" / TRACE).write_text(content)
    rehash(tmp_path / "out")
    artifact = read(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"trace\.json"):
        artifact.load_trace()


def test_an_unlisted_trace_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / TRACE).write_text("[")
    assert read(tmp_path / "out").load_trace() is None
