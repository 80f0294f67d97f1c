"""Artifacts: what is written reads back, nothing else on disk is harmed, and nothing that was altered is read."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import dllmc
from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.errors import ArtifactError
from dllmc.ir.program import Program
from dllmc.models.llada import LLaDAConfig
from tests.programs import program, tensor
from tests.strategies import MAX_POSITIONS, TinyModel, build

WEIGHTS = "weights-00001.safetensors"
PROGRAM = "programs/dense.json"
SPEC = dllmc.ModelSpec(vocab_size=13, mask_id=12, end_ids=(0,), max_positions=MAX_POSITIONS)
OPTIONS = dllmc.CompileOptions(max_tokens_per_step=32, max_requests=2, max_logit_rows=8)


def tiny_model() -> nn.Module:
    """One layer of LLaDA, width 16."""
    fields = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 8, "vocab_size": SPEC.vocab_size}
    config = LLaDAConfig.from_dict({**fields, "max_sequence_length": MAX_POSITIONS, "rope": True})
    return build(TinyModel(config, SPEC, seed=3))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model's artifact; not to be changed."""
    return dllmc.compile(tiny_model(), tmp_path_factory.mktemp("artifact") / "tiny", OPTIONS, SPEC)


@pytest.fixture
def folder(compiled: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact, to be changed."""
    return shutil.copytree(compiled.path, tmp_path / "copy")


WEIGHT = {"w": tensor(2, 3)}
READS_W = program({}, [(["w"], [])], weights=WEIGHT, arena_bytes=0)


def write(
    out: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    dense: Program = READS_W,
    tokenizer_files: Iterable[Path] = (),
) -> Artifact:
    """Write an artifact of one hand-made program, which has one weight."""
    tensors = {"w": torch.arange(6.0).view(2, 3)} if tensors is None else tensors
    return artifact.write(
        out,
        spec=SPEC,
        programs={"dense": dense},
        tensors=tensors,
        tokenizer_files=tokenizer_files,
        options={},
        passes=[],
        versions={},
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_written_reads_back(compiled: Artifact) -> None:
    again = artifact.read(str(compiled.path))
    assert again == compiled
    assert again.spec == SPEC
    assert again.manifest["options"]["max_tokens_per_step"] == 32
    assert [entry["pass"] for entry in again.manifest["passes"]] == OPTIONS.passes.split(",")
    assert list(again.programs) == ["dense"]
    assert again.programs["dense"].maxima == OPTIONS.maxima


def test_weights_read_back_bit_for_bit(compiled: Artifact) -> None:
    """Every parameter of the module that the program needs, under its name, and the constants beside them."""
    weights = compiled.load_weights()
    parameters = dict(tiny_model().named_parameters())
    assert weights.keys() == compiled.programs["dense"].weights.keys()
    assert parameters.keys() <= weights.keys()
    for name, parameter in parameters.items():
        assert torch.equal(weights[name], parameter), name


def test_the_manifest_lists_every_file_with_size_and_hash(compiled: Artifact) -> None:
    files = tree(compiled.path)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert set(files) == {PROGRAM, WEIGHTS}


def test_memory_is_the_sum_of_its_parts(compiled: Artifact) -> None:
    """The parts from the program itself: bytes of its weights, its arena, and its inputs, each aligned to 64."""
    dense = compiled.programs["dense"]
    weights = sum(w.nbytes for w in compiled.load_weights().values())
    state = sum(-(-t.size_bytes(dense.maxima) // 64) * 64 for t in dense.inputs.values())
    parts = {"weights": weights, "arena": dense.arena_bytes, "kv_pool": 0, "state": state}
    assert compiled.memory == {**parts, "total": weights + (dense.arena_bytes or 0) + state}


def test_the_same_inputs_give_the_same_bytes(compiled: Artifact, tmp_path: Path) -> None:
    again = dllmc.compile(tiny_model(), tmp_path / "again", OPTIONS, SPEC)
    assert tree(again.path) == tree(compiled.path)


def test_weights_are_split_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds at most `SHARD_BYTES`, or a single tensor that is larger."""
    monkeypatch.setattr(artifact, "SHARD_BYTES", 100)
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
    refuse(written.path, r"vocab\.json: expected sha256")


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
    monkeypatch.setattr(artifact, "save_file", fail)
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
        ({"tensors": {}}, r"weight 'w': expected \(\[2, 3\], 'F32'\), found nothing"),
        ({"dense": overlapping, "tensors": {}}, r"instruction 1 \(copy\): 'a' at \[0, 16\) conflicts with"),
        ({"dense": program({}, [([float("nan")], [])], arena_bytes=0), "tensors": {}}, "expected a finite number"),
        ({"tokenizer_files": [tmp_path / "vocab.txt"]}, "cannot be written: .*No such file"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            write(tmp_path / "out", **arguments)  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []


def refuse(folder: Path, message: str) -> None:
    """Reading fails, and the error names a file of the artifact."""
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.read(folder)
    assert str(caught.value).startswith(str(folder))


def edit_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rehash(folder: Path) -> None:
    """Bring the manifest's sizes and hashes up to date, as a careful forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the program's JSON in place, and its hash with it."""
    document = json.loads((folder / PROGRAM).read_text())
    change(document)
    (folder / PROGRAM).write_text(json.dumps(document))
    rehash(folder)


def test_a_missing_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    refuse(folder, r"manifest\.json: no such file; expected a directory that `dllmc compile` wrote$")
    refuse(folder / "nowhere", r"manifest\.json: no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b'{"schema": 1, "ver', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1]", "expected an artifact's manifest with a field 'schema'"),
        (b"{}", "expected an artifact's manifest with a field 'schema'"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    refuse(folder, rf"manifest\.json: {message}")


@pytest.mark.parametrize("schema", [0, 2, 10**6])
def test_another_schema_is_refused_with_what_to_do(folder: Path, schema: int) -> None:
    """Before the other fields are looked at: another version may have others."""
    (folder / "manifest.json").write_text(json.dumps({"schema": schema, "novelty": []}))
    refuse(folder, rf"manifest\.json: schema {schema}, but this version of dllmc reads 1; compile the model again")


@pytest.mark.parametrize("schema", [True, "1", 1.0, None])
def test_a_schema_that_is_no_integer_is_refused(folder: Path, schema: object) -> None:
    edit_manifest(folder, schema=schema)
    refuse(folder, r"manifest\.json: expected an artifact's manifest with a field 'schema'")


def test_an_unknown_or_missing_field_is_refused_by_name(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for field in [*manifest, "plugins"]:
        if field == "schema":
            continue
        changed = (
            {**manifest, "plugins": []} if field == "plugins" else {k: v for k, v in manifest.items() if k != field}
        )
        (folder / "manifest.json").write_text(json.dumps(changed))
        refuse(folder, rf"manifest\.json: missing or unknown fields \['{field}'\]$")


@pytest.mark.parametrize("bad", [None, 3, "x"])
def test_a_field_of_another_type_is_refused_by_name(folder: Path, bad: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for field in manifest.keys() - {"schema"}:
        (folder / "manifest.json").write_text(json.dumps({**manifest, field: bad}))
        refuse(folder, rf"manifest\.json: field '{field}': expected a (dict|list), found {bad!r}$")
    for field in ("passes", "programs", "weights", "tokenizer"):
        (folder / "manifest.json").write_text(json.dumps({**manifest, field: [7]}))
        refuse(folder, rf"manifest\.json: field '{field}': expected a list of (dict|str), found \[7\]$")


def test_an_artifact_without_a_program_is_refused(folder: Path) -> None:
    edit_manifest(folder, programs=[])
    refuse(folder, r"manifest\.json: field 'programs': expected at least one program$")


def test_a_model_that_is_out_of_range_is_refused(folder: Path) -> None:
    edit_manifest(folder, model={**SPEC.to_dict(), "mask_id": 13})
    refuse(folder, r"manifest\.json: field 'model': model spec: mask_id: expected a token id in \[0, 13\), found 13$")
    edit_manifest(folder, model={})
    refuse(folder, r"manifest\.json: field 'model': model spec: expected exactly the fields")


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_an_altered_file_is_refused(folder: Path, name: str) -> None:
    """Of another size, of other content, or gone."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"\n")
    refuse(folder, rf"{name}: expected {len(content)} bytes, found {len(content) + 1}; copy the artifact again$")
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse(folder, rf"{name}: expected sha256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}; copy the artifact again$")
    (folder / name).unlink()
    refuse(folder, rf"{name}: listed in the manifest, but there is no such file$")


@pytest.mark.parametrize("entry", [None, 3, {}, {"bytes": 1}, {"bytes": 1, "sha256": "", "url": ""}])
def test_an_entry_of_a_file_that_is_malformed_is_refused(folder: Path, entry: object) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files={**files, PROGRAM: entry})
    refuse(folder, rf"manifest\.json: files\['{PROGRAM}'\]: expected bytes and sha256, found")


@pytest.mark.parametrize("listing", ["files", "weights", "tokenizer", "programs"])
def test_a_file_listed_in_one_place_only_is_refused(folder: Path, listing: str) -> None:
    """Whether in `files` or in the list of its kind."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "extra.bin").write_bytes(b"")
    if listing == "files":
        edit_manifest(folder, files={**manifest["files"], "extra.bin": {}})
        rehash(folder)
    else:
        edit_manifest(folder, **{listing: [*manifest[listing], "extra.bin"]})
    refuse(folder, r"manifest\.json: files \['(programs/)?extra\.bin(\.json)?'\] are listed in one place and not in")


@pytest.mark.parametrize(
    "name",
    ["../outside.bin", "programs/../../outside.bin", "/etc/hostname", "./a", "a//b", "", "programs/", "a\\..\\b"],
)
def test_a_path_that_leaves_the_directory_is_refused(folder: Path, name: str) -> None:
    """Even where the file exists and its hash is right."""
    (folder.parent / "outside.bin").write_bytes(b"x")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit_manifest(folder, files={**files, name: entry}, weights=[WEIGHTS, name])
    with pytest.raises(
        ArtifactError, match=r"manifest\.json: file name .* does not stay below the artifact's directory"
    ):
        artifact.read(folder)


def test_a_link_is_refused_even_to_the_right_content(folder: Path) -> None:
    """For a file and for a directory on its path."""
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")
    refuse(folder, rf"{WEIGHTS}: a link; an artifact holds its own files only$")
    (folder / WEIGHTS).unlink()
    (folder.parent / "elsewhere").rename(folder / WEIGHTS)
    (folder / "programs").rename(folder.parent / "programs")
    (folder / "programs").symlink_to(folder.parent / "programs")
    refuse(folder, r"programs: a link; an artifact holds its own files only$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "w": w["w"].T.contiguous()},
            r"weight 'w': expected \(\[2, 3\], 'F32'\), found \(\[3, 2\], 'F32'\)",
        ),
        (lambda w: {**w, "w": w["w"].half()}, r"weight 'w': expected \(\[2, 3\], 'F32'\), found \(\[2, 3\], 'F16'\)"),
        (lambda w: {}, "weight 'w': expected .*, found nothing"),
        (lambda w: {**w, "more": torch.zeros(1)}, r"no program has the weights \['more'\]"),
    ],
)
def test_weights_that_are_not_the_programs_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    folder = write(tmp_path / "out").path
    weights = {name: w.clone() for name, w in load_file(folder / WEIGHTS).items()}
    save_file(change(weights), folder / WEIGHTS)
    rehash(folder)
    refuse(folder, message)


def test_a_plan_that_overlaps_is_refused(folder: Path) -> None:
    """All hashes being right: two buffers that an instruction uses together, moved onto each other."""

    def overlap(document: Any) -> None:
        first = document["instructions"][1]
        (read, written) = first["inputs"][0]["view"], first["outputs"][0]["view"]
        document["buffers"][written]["offset"] = document["buffers"][read]["offset"]

    forge(folder, overlap)
    refuse(
        folder, rf"{PROGRAM}: instruction 1 \(aten[\w.]+\): '%\w+' at \[\d+, \d+\) conflicts with \[\d+, \d+\) of '%"
    )


@pytest.mark.parametrize("op", ["os.system", "aten.add.out", "copy_", "", "aten.embedding"])
def test_an_operator_that_is_not_on_the_allow_list_is_refused(folder: Path, op: str) -> None:
    """When the artifact is read, before anything is bound or run, and with the operators there are."""
    forge(folder, lambda document: document["instructions"][-1].update(op=op))
    refuse(folder, rf"{PROGRAM}: operator '{op}' is not on the allow-list; this version has: .*aten\.linear\.default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(author="x"), "expected the fields arena_bytes, "),
        (lambda d: d["instructions"][0].update(op=3), r"instructions\[0\]\.op: expected text, found 3"),
        (lambda d: d["instructions"][0]["inputs"].append(float("nan")), "expected a finite number, found nan"),
        (lambda d: d["maxima"].update(rows=0), "maxima.rows: expected 1 or more, found 0"),
        (lambda d: d.update(arena_bytes=0), r"buffer '%\w+' at \[\d+, \d+\) ends behind the arena's 0 bytes"),
        (lambda d: d.update(arena_bytes=None), "has no memory plan"),
    ],
)
def test_a_malformed_program_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    forge(folder, change)
    refuse(folder, rf"{PROGRAM}: .*{message}")


def test_memory_that_the_programs_do_not_take_is_refused(folder: Path) -> None:
    """A plan with a larger arena, or a manifest that says less than its programs take."""
    memory = json.loads((folder / "manifest.json").read_text())["memory"]
    edit_manifest(folder, memory={**memory, "total": 0})
    refuse(folder, r"manifest\.json: field 'memory' does not match the programs")
    edit_manifest(folder, memory=memory)
    forge(folder, lambda document: document.update(arena_bytes=document["arena_bytes"] + 64))
    refuse(folder, r"manifest\.json: field 'memory' does not match the programs")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_pickle_is_never_read(folder: Path, tmp_path: Path) -> None:
    """Not as weights, not as a program, not as a tokenizer's file, each listed with the right hash, nor beside them."""
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap).close()
    assert sprung.exists()  # it would work
    sprung.unlink()

    content = tree(folder)
    for name, message in [(WEIGHTS, "not a safetensors file"), (PROGRAM, "not readable as JSON")]:
        (folder / name).write_bytes(trap)
        rehash(folder)
        refuse(folder, rf"{name}: {message}")
        (folder / name).write_bytes(content[name])
        rehash(folder)
    for name in ("pytorch_model.bin", "weights.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(trap)
    manifest = json.loads((folder / "manifest.json").read_text())
    edit_manifest(folder, files={**manifest["files"], "tokenizer.pkl": {}}, tokenizer=["tokenizer.pkl"])
    rehash(folder)
    artifact.read(folder).load_weights()
    assert not sprung.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from((WEIGHTS, "dense")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field_gives_an_artifact_or_a_typed_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "out"
    if not folder.exists():
        write(folder)
    original = (folder / "manifest.json").read_text()
    manifest = json.loads(original)
    field = data.draw(st.sampled_from(sorted(manifest)))
    inner = manifest[field]
    if isinstance(inner, dict) and inner and data.draw(st.booleans()):
        manifest[field] = {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(JSON)}
    else:
        manifest[field] = data.draw(JSON)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refusal = f"{folder}: none"
    try:
        artifact.read(folder)
    except ArtifactError as error:
        refusal = str(error)
    (folder / "manifest.json").write_text(original)
    assert refusal.startswith(str(folder))


def test_an_artifact_may_be_moved(compiled: Artifact, folder: Path) -> None:
    """Nothing in it depends on where it lies."""
    assert replace(artifact.read(folder), path=compiled.path) == compiled
