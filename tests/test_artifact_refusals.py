"""Whatever is wrong with an artifact on disk, reading it is a typed error that names the file, and runs nothing."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dllmc import artifact
from dllmc.errors import ArtifactError
from tests.artifacts import (
    MANIFEST,
    PROGRAM,
    SPEC,
    WEIGHTS,
    edit_manifest,
    entry_of,
    read_manifest,
    rehash,
    tree,
    write,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact, to be changed."""
    return write(tmp_path / "out").path


def refuse(folder: Path, message: str) -> None:
    """Reading fails, and the error names a file of the artifact."""
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.read(folder)
    assert str(caught.value).startswith(str(folder))


def forge(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the program's JSON in place, and its hash with it."""
    document = json.loads((folder / PROGRAM).read_text())
    change(document)
    (folder / PROGRAM).write_text(json.dumps(document))
    rehash(folder)


def test_a_missing_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
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
    (folder / MANIFEST).write_bytes(content)
    refuse(folder, rf"manifest\.json: {message}")


@pytest.mark.parametrize("schema", [0, 1, 10**6])
def test_another_schema_is_refused_with_what_to_do(folder: Path, schema: int) -> None:
    """Before the other fields are looked at: another version may have others."""
    write_manifest(folder, {"schema": schema, "novelty": []})
    refuse(folder, rf"manifest\.json: schema {schema}, but this version of dllmc reads 2; compile the model again")


@pytest.mark.parametrize("schema", [True, "1", 1.0, None])
def test_a_schema_that_is_no_integer_is_refused(folder: Path, schema: object) -> None:
    edit_manifest(folder, schema=schema)
    refuse(folder, r"manifest\.json: expected an artifact's manifest with a field 'schema'")


def test_an_unknown_or_missing_field_is_refused_by_name(folder: Path) -> None:
    manifest = read_manifest(folder)
    without = {
        field: {k: v for k, v in manifest.items() if k != field} for field in manifest.keys() - {"schema", "sha256"}
    }
    for field, changed in {**without, "plugins": {**manifest, "plugins": []}}.items():
        write_manifest(folder, changed)
        refuse(folder, rf"manifest\.json: missing or unknown fields \['{field}'\]$")


@pytest.mark.parametrize("bad", [None, 3, "x"])
def test_a_field_of_another_type_is_refused_by_name(folder: Path, bad: object) -> None:
    manifest = read_manifest(folder)
    for field in manifest.keys() - {"schema", "sha256"}:
        write_manifest(folder, {**manifest, field: bad})
        refuse(folder, rf"manifest\.json: field '{field}': expected a (dict|list), found {bad!r}$")
    for field in ("passes", "programs", "weights", "tokenizer"):
        write_manifest(folder, {**manifest, field: [7]})
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
    files = read_manifest(folder)["files"]
    edit_manifest(folder, files={**files, PROGRAM: entry})
    refuse(folder, rf"manifest\.json: files\['{PROGRAM}'\]: expected bytes and sha256, found")


@pytest.mark.parametrize("listing", ["files", "weights", "tokenizer", "programs"])
def test_a_file_listed_in_one_place_only_is_refused(folder: Path, listing: str) -> None:
    """Whether in `files` or in the list of its kind."""
    manifest = read_manifest(folder)
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
    files = read_manifest(folder)["files"] | {name: entry_of(b"x")}
    edit_manifest(folder, files=files, weights=[WEIGHTS, name])
    refuse(folder, r"manifest\.json: file name .* does not stay below the artifact's directory$")


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
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    weights = {name: w.clone() for name, w in load_file(folder / WEIGHTS).items()}
    save_file(change(weights), folder / WEIGHTS)
    rehash(folder)
    refuse(folder, message)


def test_a_plan_that_overlaps_is_refused(folder: Path) -> None:
    """All hashes being right: two buffers that an instruction uses together, moved onto each other."""
    forge(folder, lambda document: [buffer.update(offset=0) for buffer in document["buffers"].values()])
    refuse(folder, rf"{PROGRAM}: instruction 1 \(copy\): '%a' at \[0, 24\) is overwritten by '%b' at \[0, 24\)$")


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
        (lambda d: d["instructions"][0]["inputs"].append(float("nan")), "not readable as JSON: NaN is no number"),
        (lambda d: d["maxima"].update(rows=0), "maxima.rows: expected 1 or more, found 0"),
        (lambda d: d.update(arena_bytes=0), r"buffer '%\w' at \[\d+, \d+\) ends behind the arena's 0 bytes"),
        (lambda d: d.update(arena_bytes=None), "has no memory plan"),
    ],
)
def test_a_malformed_program_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    forge(folder, change)
    refuse(folder, rf"{PROGRAM}: .*{message}")


def test_memory_that_the_programs_do_not_take_is_refused(folder: Path) -> None:
    """A plan with a larger arena, or a manifest that says less than its programs take."""
    memory = read_manifest(folder)["memory"]
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
    manifest = read_manifest(folder)
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
def test_any_value_of_any_field_gives_an_artifact_or_a_typed_error(folder: Path, data: st.DataObject) -> None:
    original = read_manifest(folder)
    field = data.draw(st.sampled_from(sorted(original.keys() - {"sha256"})))
    changed, inner = data.draw(JSON), original[field]
    if isinstance(inner, dict) and inner and data.draw(st.booleans()):
        changed = {**inner, data.draw(st.sampled_from(sorted(inner))): changed}
    write_manifest(folder, {**original, field: changed})
    refusal = None
    try:
        artifact.read(folder)
    except ArtifactError as error:
        refusal = str(error)
    write_manifest(folder, original)
    assert refusal is None or refusal.startswith(str(folder))
