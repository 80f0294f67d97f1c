"""`dllmc verify`, `inspect --diff`, and weights that are linked or not hashed."""

import json
import shutil
from pathlib import Path

import pytest

import dllmc
from dllmc.ir.graph_printer import size
from tests.artifacts import read_manifest, tree
from tests.cli.test_commands import TINY_LLADA, is_one_line, run


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model for 16 requests, not 64, without fused projections."""
    passes = dllmc.CompileOptions().passes
    assert isinstance(passes, str)
    options = dllmc.CompileOptions(max_requests=16, passes=passes.replace("fuse-projections,", ""))
    return dllmc.compile(TINY_LLADA, tmp_path_factory.mktemp("smaller") / "out", options).path


def test_verify_says_what_it_checked(tiny_llada: Path) -> None:
    """Counted from the files themselves."""
    result = run("verify", tiny_llada)
    assert result.exit_code == 0
    manifest = read_manifest(tiny_llada)
    lines = result.stdout.splitlines()
    files = {name: content for name, content in tree(tiny_llada).items() if name != "manifest.json"}
    total = size(sum(map(len, files.values())))
    assert lines[0] == f"files      {len(files)}, {total}: names, sizes and sha256"
    for line, name in zip(lines[2:6], ("dense", "mixed", "refresh", "reuse"), strict=True):
        program = json.loads((tiny_llada / "programs" / f"{name}.json").read_text())
        counts = f"{len(program['instructions'])} instructions over {len(program['buffers'])} buffers"
        assert line == f"program    {name}: {counts}: operands, bounds, plan"
    assert lines[-2] == f"memory     {size(manifest['memory']['total'])}, as the programs take, and as this machine has"
    assert lines[-1] == f"{tiny_llada} is sound"


def test_verify_as_json(tiny_llada: Path) -> None:
    found = json.loads(run("verify", tiny_llada, "--json", "--no-hash").stdout)
    manifest = read_manifest(tiny_llada)
    assert found["artifact"] == str(tiny_llada)
    assert found["hashed"] is False
    assert found["files"] == len(manifest["files"])
    assert found["memory_bytes"] == manifest["memory"]
    assert found["programs"] == ["dense", "mixed", "refresh", "reuse"]


def test_verify_names_what_is_wrong(tiny_llada: Path, tmp_path: Path) -> None:
    """In one line, with status 2; bytes of weights only where they are hashed."""
    folder = Path(shutil.copytree(tiny_llada, tmp_path / "copy"))
    [shard] = read_manifest(folder)["weights"]
    content = bytearray((folder / shard).read_bytes())
    content[-1] ^= 1
    (folder / shard).write_bytes(content)
    for command in (("verify", folder), ("generate", folder, "--prompt-ids", "1")):
        result = run(*command)
        assert result.exit_code == 2
        assert is_one_line(result)
        assert f"{folder}/{shard}: expected sha256" in result.stderr
        assert run(*command, "--no-hash").exit_code == 0


def test_an_artifact_does_not_differ_from_itself(tiny_llada: Path) -> None:
    assert run("inspect", "--diff", tiny_llada, tiny_llada).stdout == "no difference\n"
    assert run("inspect", "--diff", tiny_llada, tiny_llada, "--program").stdout == "no difference\n"
    assert json.loads(run("inspect", "--diff", tiny_llada, tiny_llada, "--json").stdout)["changes"] == []


def test_a_difference_is_told_fact_by_fact(tiny_llada: Path, smaller: Path) -> None:
    """Options, counts of operators, memory with its change, weights joined or not; nothing that is the same."""
    lines = run("inspect", "--diff", tiny_llada, smaller).stdout.splitlines()
    told = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert lines[0].split() == ["old", "new", "change"]
    assert told["options.max_requests"] == ["64", "16"]
    old, new = (read_manifest(path)["memory"]["total"] for path in (tiny_llada, smaller))
    assert told["memory.total_bytes"] == [*size(old).split(), *size(new).split(), f"{new / old - 1:+.1%}"]
    linears = [
        sum(call["op"] == "aten.linear.default" for call in program["instructions"])
        for program in (json.loads((path / "programs" / "dense.json").read_text()) for path in (tiny_llada, smaller))
    ]
    assert linears[0] < linears[1]
    assert told["programs.dense.aten.linear.default"] == list(map(str, linears))
    assert not {"versions.torch", "model.vocab_size", "memory.weights_bytes"} & told.keys()
    assert {line.split()[-1] for line in lines if line.startswith("weights.") and "+" in line} == {"-"}


def test_a_difference_as_json_and_as_programs(tiny_llada: Path, smaller: Path) -> None:
    found = json.loads(run("inspect", "--diff", tiny_llada, smaller, "--json").stdout)
    assert (found["old"], found["new"]) == (str(tiny_llada), str(smaller))
    assert {"what": "options.max_requests", "old": 64, "new": 16} in found["changes"]
    text = run("inspect", "--diff", tiny_llada, smaller, "--program").stdout
    assert f"--- {tiny_llada}/programs/dense.json\n+++ {smaller}/programs/dense.json\n@@ " in text
    assert any(line.startswith("-") and "+" in line and "aten.linear" in line for line in text.splitlines())


def test_diff_refuses_what_is_no_artifact(tiny_llada: Path, tmp_path: Path) -> None:
    result = run("inspect", "--diff", tmp_path, tiny_llada)
    assert result.exit_code == 2
    assert is_one_line(result)
    assert f"{tmp_path}: no artifact, for it has no manifest.json" in result.stderr


def test_linked_weights(tmp_path: Path) -> None:
    """`compile --link-weights` writes little, and `verify` counts what it links to."""
    checkpoint = shutil.copytree(TINY_LLADA, tmp_path / "checkpoint")
    assert run("compile", checkpoint, tmp_path / "out", "--link-weights").exit_code == 0
    weights = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert sum(map(len, tree(tmp_path / "out").values())) < weights / 4
    files = len(read_manifest(tmp_path / "out")["files"])
    assert run("verify", tmp_path / "out").stdout.startswith(f"files      {files} and 1 linked file, ")
