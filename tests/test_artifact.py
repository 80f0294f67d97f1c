"""Artifacts: what is written reads back equal, and writing harms nothing else on the disk."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dllmc
from dllmc import artifact
from dllmc.artifact import Artifact, weights
from dllmc.errors import ArtifactError
from dllmc.models.llada import LLaDAConfig
from tests.artifacts import PROGRAM, SPEC, WEIGHTS, edit_manifest, entry_of, read_manifest, tree, write
from tests.programs import program, tensor
from tests.strategies import TinyModel, build

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llada"
OPTIONS = dllmc.CompileOptions(max_tokens_per_step=32, max_requests=2, max_logit_rows=8)


def tiny_model() -> nn.Module:
    """One layer of LLaDA, width 16."""
    fields = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 8, "vocab_size": SPEC.vocab_size}
    config = LLaDAConfig.from_dict({**fields, "max_sequence_length": SPEC.max_positions, "rope": True})
    return build(TinyModel(config, SPEC, seed=3))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model's artifact; not to be changed."""
    return dllmc.compile(tiny_model(), tmp_path_factory.mktemp("artifact") / "tiny", OPTIONS, SPEC)


def test_what_is_written_reads_back(compiled: Artifact) -> None:
    again = artifact.read(str(compiled.path))
    assert again == compiled
    assert again.spec == SPEC
    assert again.manifest["options"]["max_tokens_per_step"] == 32
    assert [entry["pass"] for entry in again.manifest["passes"]] == OPTIONS.passes.split(",")
    assert set(again.programs) == {"mixed", "dense", "refresh", "reuse"}
    assert again.programs["dense"].maxima == OPTIONS.maxima
    assert again.programs["mixed"].maxima == {**OPTIONS.maxima, "pages": 1 + OPTIONS.max_requests}


def test_weights_read_back_bit_for_bit(compiled: Artifact) -> None:
    """Every parameter of the module under its name, joined ones end to end under all of theirs; constants beside."""
    weights = compiled.load_weights()
    parameters = dict(tiny_model().named_parameters())
    assert weights.keys() == compiled.programs["mixed"].weights.keys()
    written = {name: name.split("+") for name in weights if not name.startswith("constant.")}
    assert sorted(part for parts in written.values() for part in parts) == sorted(parameters)
    assert any(len(parts) == 2 for parts in written.values())
    for name, parts in written.items():
        assert torch.equal(weights[name], torch.cat([parameters[part] for part in parts])), name


def test_the_manifest_lists_every_file_with_size_and_hash(compiled: Artifact) -> None:
    files = tree(compiled.path)
    programs = {f"programs/{name}.json" for name in ("mixed", "dense", "refresh", "reuse")}
    assert set(files) == {"manifest.json", WEIGHTS, "trace.json"} | programs
    del files["manifest.json"]
    assert read_manifest(compiled.path)["files"] == {name: entry_of(content) for name, content in files.items()}


def test_memory_is_the_sum_of_its_parts(compiled: Artifact) -> None:
    """The parts from the program itself: bytes of its weights, its arena, its caches and its inputs, aligned to 64."""
    mixed = compiled.programs["mixed"]
    weights = sum(w.nbytes for w in compiled.load_weights().values())
    state = sum(-(-t.size_bytes(mixed.maxima) // 64) * 64 for t in mixed.inputs.values())
    pages, heads, layers, head_dim = 1 + OPTIONS.max_requests, 2, 1, 8
    pool = layers * 2 * heads * pages * 32 * head_dim * 4
    parts = {"weights": weights, "arena": mixed.arena_bytes, "kv_pool": pool, "state": state}
    assert compiled.memory == {**parts, "total": weights + (mixed.arena_bytes or 0) + pool + state}
    assert all((part.arena_bytes or 0) <= (mixed.arena_bytes or 0) for part in compiled.programs.values())


def test_the_same_inputs_give_the_same_bytes(compiled: Artifact, tmp_path: Path) -> None:
    again = dllmc.compile(tiny_model(), tmp_path / "again", OPTIONS, SPEC)
    assert tree(again.path) == tree(compiled.path)


@pytest.mark.slow
@pytest.mark.parametrize("linked", [False, True])
def test_the_same_inputs_give_the_same_bytes_elsewhere(linked: bool, tmp_path: Path) -> None:
    """In another process, with another seed of its hashes, from another folder; nothing tells of time or place."""
    shutil.copytree(EXAMPLE, tmp_path / "checkpoint")
    code = (
        "import sys, dllmc; dllmc.compile('checkpoint', 'out', dllmc.CompileOptions(link_weights=bool(sys.argv[1:])))"
    )
    trees = []
    for seed in ("1", "2"):
        shutil.copytree(tmp_path / "checkpoint", tmp_path / seed / "checkpoint")
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(dllmc.__file__).parents[1])}
        command = [sys.executable, "-c", code, *(["linked"] if linked else [])]
        subprocess.run(command, cwd=tmp_path / seed, env=environment, check=True)
        trees.append(tree(tmp_path / seed / "out"))
    assert trees[0] == trees[1]


def test_the_order_of_the_tensors_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for which shard holds which."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 8)
    tensors = {"a": torch.zeros(1), "b": torch.ones(2), "c": torch.ones(1)}
    dense = program({}, [], weights={name: tensor(w.numel()) for name, w in tensors.items()}, arena_bytes=0)
    first = write(tmp_path / "first", tensors, dense)
    again = write(tmp_path / "again", dict(reversed(tensors.items())), dense)
    assert tree(again.path) == tree(first.path)


def test_weights_are_split_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds at most `SHARD_BYTES`, or a single tensor that is larger."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 100)
    sizes = {"a": 10, "b": 12, "c": 30, "d": 3, "e": 22}
    dense = program({}, [], weights={name: tensor(n) for name, n in sizes.items()}, arena_bytes=0)
    tensors = {name: torch.randn(n) for name, n in sizes.items()}
    written = write(tmp_path / "out", tensors, dense)
    shards = [sorted(load_file(written.path / name)) for name in written.manifest["weights"]]
    assert shards == [["a", "b"], ["c"], ["d", "e"]]
    loaded = written.load_weights()
    assert all(torch.equal(loaded[name], tensors[name]) for name in sizes)


def test_weights_that_share_memory_are_written_each(tmp_path: Path) -> None:
    """As modules have whose parameters were given the same data; and a transposed one is written in its own order."""
    w = torch.arange(6.0).view(2, 3)
    dense = program({}, [], weights={"a": tensor(2, 3), "b": tensor(2, 3), "c": tensor(3, 2)}, arena_bytes=0)
    loaded = write(tmp_path / "out", {"a": w, "b": w.view(2, 3), "c": w.T}, dense).load_weights()
    assert torch.equal(loaded["a"], w)
    assert torch.equal(loaded["b"], w)
    assert torch.equal(loaded["c"], w.T)


def test_tokenizer_files_are_copied_and_checked(tmp_path: Path) -> None:
    """Files that are links, as in the hub's cache, too."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "vocab.json").symlink_to(tmp_path / "tokenizer.json")
    written = write(tmp_path / "out", tokenizer_files=[tmp_path / "vocab.json", tmp_path / "tokenizer.json"])
    assert written.manifest["tokenizer"] == ["tokenizer.json", "vocab.json"]
    (written.path / "vocab.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"vocab\.json: expected sha256"):
        artifact.read(written.path)


def test_a_directory_that_is_no_artifact_is_not_overwritten(tmp_path: Path) -> None:
    """Nor a file, nor a folder with another kind of manifest.json, as web applications have."""
    out = tmp_path / "out"
    out.mkdir()
    for name, content in [("thesis.txt", "words"), ("manifest.json", '{"name": "app"}'), ("manifest.json", "[]")]:
        (out / name).write_text(content)
        before = tree(tmp_path)
        with pytest.raises(ArtifactError, match=f"^{out} exists and is no artifact; choose another output directory$"):
            write(out)
        assert tree(tmp_path) == before
    with pytest.raises(ArtifactError, match="exists and is no artifact"):
        write(out / "thesis.txt")


def test_an_older_artifact_is_replaced(tmp_path: Path) -> None:
    """Files of the old one that the new one has not are gone, whatever its schema, and nothing else is left."""
    out = tmp_path / "out"
    write(out)
    (out / "weights-00002.safetensors").write_bytes(b"old")
    edit_manifest(out, schema=0)
    written = write(out, {"w": torch.ones(2, 3)})
    assert written == artifact.read(out)
    assert torch.equal(written.load_weights()["w"], torch.ones(2, 3))
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(tree(out)) == ["manifest.json", PROGRAM, WEIGHTS]


def test_an_artifact_is_written_below_folders_that_do_not_exist(tmp_path: Path) -> None:
    assert write(tmp_path / "a" / "b" / "c").path == tmp_path / "a" / "b" / "c"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), KeyboardInterrupt()])
def test_a_failing_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Nothing where nothing was, the old artifact where one was; an error of the disk names the directory."""

    def fail(*_: object) -> None:
        raise error

    write(tmp_path / "old")
    before = tree(tmp_path)
    monkeypatch.setattr(weights, "save_file", fail)
    for out in (tmp_path / "new", tmp_path / "old"):
        expected = ArtifactError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            write(out)
        assert not isinstance(error, OSError) or str(caught.value) == f"{out}: cannot be written: disk full"
        assert os.listdir(tmp_path) == ["old"]
        assert tree(tmp_path) == before


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """A weight that is missing, an unsound plan, a constant that is NaN, a tokenizer file that does not exist."""
    overlapping = program(
        {"a": tensor(4, offset=0), "b": tensor(4, offset=0)}, [((), ["a"]), (["a"], ["b"])], arena_bytes=64
    )
    for arguments, message in [
        ({"tensors": {}}, "weight 'w': a program reads it; expected a tensor, found nothing"),
        ({"dense": overlapping, "tensors": {}}, r"instruction 1 \(copy\): 'a' at \[0, 16\) is overwritten by 'b'"),
        (
            {"dense": program({}, [([float("nan")], [])], arena_bytes=0), "tensors": {}},
            "not readable as JSON: NaN is no number",
        ),
        ({"tokenizer_files": [tmp_path / "vocab.txt"]}, "cannot be written: .*No such file"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            write(tmp_path / "out", **arguments)  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []


def test_an_artifact_may_be_moved(tmp_path: Path) -> None:
    """Nothing in it depends on where it lies."""
    written = write(tmp_path / "here")
    moved = written.path.rename(tmp_path / "there")
    assert artifact.read(moved) == replace(written, path=moved)
