"""Artifacts made to do harm: each way by itself, with all hashes right where that does not defeat it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import dllmc
import dllmc.errors
from dllmc import artifact
from dllmc.errors import ArtifactError, BudgetError
from tests.artifacts import MANIFEST, PROGRAM, WEIGHTS, edit_manifest, entry_of, read_manifest, rehash, write

FOREVER = 1 << 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of two copies of a weight, to be changed."""
    return write(tmp_path / "out").path


@pytest.fixture(scope="module")
def served(tiny_llada: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that an engine can run."""
    path = tmp_path_factory.mktemp("served") / "artifact"
    shutil.copytree(tiny_llada, path)
    return path


def refuse(folder: Path, message: str, error: type[Exception] = ArtifactError) -> None:
    with pytest.raises(error, match=message) as caught:
        dllmc.load(folder)
    assert str(caught.value).startswith(str(folder))


def forge(folder: Path, change: Callable[[Any], object], name: str = PROGRAM) -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    rehash(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "programs/../../secret", "./weights", "a//b", "/etc/hostname", "a\\b", "a\nb"]
)
def test_a_file_outside(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"words")
    files = read_manifest(folder)["files"]
    edit_manifest(folder, files={**files, name: entry_of(b"words")}, tokenizer=[name])
    refuse(folder, "does not stay below the artifact's directory|has control characters")


@pytest.mark.parametrize("name", [WEIGHTS, PROGRAM, "programs", MANIFEST])
def test_a_symlink(folder: Path, name: str) -> None:
    """To a file of the same content, or a folder on the way to one."""
    moved = (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(moved)
    refuse(folder, f"{name}: a link; an artifact holds its own files only")


def test_a_hard_link(folder: Path) -> None:
    os.link(folder / WEIGHTS, folder.parent / "other")
    refuse(folder, f"{WEIGHTS}: a hard link: it could be changed elsewhere")


def test_a_name_too_long_for_the_file_system(folder: Path) -> None:
    long = "x" * 300
    files = read_manifest(folder)["files"] | {long: {"bytes": 0, "sha256": "0" * 64}}
    edit_manifest(folder, files=files, tokenizer=[long])
    refuse(folder, "cannot be read: .*File name too long")


def test_a_pipe_that_nobody_writes_to(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refuse(folder, f"{WEIGHTS}: listed in the manifest, but there is no such file")


def test_a_manifest_that_was_edited(folder: Path) -> None:
    """Even where no check would notice: in a version, or in spaces."""
    file = folder / MANIFEST
    for old, new in (('"versions": {}', '"versions": {"dllmc": "9"}'), ("\n ", "\n  ")):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        refuse(folder, r"manifest\.json: field 'sha256': it is not the hash of the other fields")
        file.write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2, "schema": 2}', "key 'schema' is given twice"),
        ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": -Infinity}', "-Infinity is no number"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "not readable as JSON"),
        (r'{"schema": 2, "a": "\u001b[2J"}', "control characters"),
        (r'{"schema": 2, "\u009b": 0}', "control characters"),
    ],
)
def test_json_that_readers_disagree_on(folder: Path, text: str, message: str) -> None:
    (folder / MANIFEST).write_text(text)
    refuse(folder, rf"manifest\.json: .*{message}")


def test_json_that_is_too_large(folder: Path) -> None:
    """Before it is read: a sparse file takes no room on the disk."""
    with (folder / MANIFEST).open("r+b") as stream:
        stream.truncate(1 << 40)
    refuse(folder, r"manifest\.json: expected JSON of at most \d+ bytes, found 1099511627776")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["buffers"]["%b"].update(offset=1 << 30), "ends behind the arena's"),
        (lambda d: d["buffers"]["%b"].update(offset=-64), "offset: expected 0 or more, found -64"),
        (lambda d: d["buffers"]["%b"].update(shape=[-2, 3]), r"a dimension of \(-2\) shrinks .*, or is negative"),
        (lambda d: d["buffers"]["%b"].update(shape=[1 << 47, 1 << 47]), "ends behind the arena's"),
        (lambda d: d["buffers"]["%b"].update(shape=[1 << 48]), r"expected an integer below 2\*\*48"),
        (lambda d: d["inputs"]["ids"].update(shape=[1 << 47, 1 << 47]), "field 'memory' does not match"),
        (lambda d: d["maxima"].update(tokens=10**30), r"expected an integer below 2\*\*48"),
        (
            lambda d: d["buffers"]["%b"].update(lifetime=[0, 1]),
            r"'%b' is alive \[0, 1\), but used by the instructions 1",
        ),
        (lambda d: d["buffers"].update({"%b": d["buffers"]["%a"]}), "is overwritten by"),
        (lambda d: d["instructions"][1]["inputs"].append(3), "expected at most 1 operands, found 2"),
        (lambda d: d["instructions"][1].update(inputs=[]), "expected an operand 0, source: Tensor"),
        (lambda d: d["instructions"][1].update(inputs=["%a"]), "operand 0, source: expected a Tensor, found '%a'"),
        (lambda d: d["instructions"][1].update(outputs=[{"view": "w"}]), "writes 'w', which is no buffer"),
        (lambda d: d["instructions"].extend([{"for_rows": {"tokens": FOREVER}, "body": []}]), "expected the fields"),
        (lambda d: d.update(name="refresh"), "name: expected 'dense', as the file is named, found 'refresh'"),
    ],
)
def test_a_program_that_reaches_beyond(folder: Path, change: Callable[[Any], object], message: str) -> None:
    forge(folder, change)
    refuse(folder, message)


def loop(document: Any, times: int, shown: int) -> None:
    """A loop of so many rounds a token, each of which copies so many elements, all of them the same one."""
    call = document["instructions"][0]
    row = {"shape": [{"chunk": 1}, shown], "strides": [shown, 1], "offset": 0}
    copied = {"inputs": [{**row, "view": "w", "strides": [0, 0]}], "outputs": [{**row, "view": "%c"}]}
    document["maxima"]["chunk"] = 1
    document["instructions"].insert(0, {"for_rows": {"tokens": times}, "body": [{**call, **copied}]})
    for buffer in document["buffers"].values():
        buffer["lifetime"] = [number + 1 for number in buffer["lifetime"]]
    document["buffers"]["%c"] = {**document["buffers"]["%a"], "shape": row["shape"], "lifetime": [0, 1]}


def test_a_loop_that_ends(folder: Path) -> None:
    forge(folder, lambda document: loop(document, 1, 4))
    artifact.read(folder)


@pytest.mark.parametrize(("times", "shown"), [(FOREVER, 1), (1 << 16, 16)])
def test_a_loop_that_never_ends(folder: Path, times: int, shown: int) -> None:
    """By its rounds; or neither these are many nor what one looks at, but both together."""
    forge(folder, lambda document: loop(document, times, shown))
    rounds = 9 * times
    looked = 2 * rounds * shown + 4 * 6
    refuse(folder, rf"the largest step makes {rounds + 2} calls that look at {looked} elements; expected")


def test_a_view_that_shows_one_element_forever(folder: Path) -> None:
    """It is within its tensor, and reading it takes no memory."""

    def change(document: Any) -> None:
        view = {"view": "%a", "shape": [FOREVER], "strides": [0], "offset": 0}
        document["instructions"][1]["inputs"] = [view]

    forge(folder, change)
    refuse(folder, r"the largest step makes 2 calls that look at \d+ elements; expected at most \d+, and \d+, 4096")


def test_weights_of_another_shape(folder: Path) -> None:
    """In a header that is right in itself."""
    save_file({"w": load_file(folder / WEIGHTS)["w"].T.contiguous()}, folder / WEIGHTS)
    rehash(folder)
    refuse(folder, r"weight 'w': expected \(\[2, 3\], 'F32'\), found \(\[3, 2\], 'F32'\)")


@pytest.mark.parametrize("length", [0, 7, 1 << 40, (1 << 64) - 1])
def test_weights_whose_header_ends_elsewhere(folder: Path, length: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
    rehash(folder)
    refuse(folder, f"{WEIGHTS}: not a safetensors file")


@pytest.mark.parametrize("end", [0, 23, 25, 1 << 40])
def test_weights_that_lie_beyond_their_file(folder: Path, end: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, end]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    rehash(folder)
    refuse(folder, f"{WEIGHTS}: not a safetensors file")


def test_a_program_that_no_engine_can_run(folder: Path) -> None:
    """It is sound, and returns nothing that an engine could commit."""
    artifact.read(folder)
    refuse(folder, "program 'dense': input 'ids': no engine has it")


def test_more_memory_than_the_machine_has(served: Path, tmp_path: Path) -> None:
    """Refused by the numbers, before it is asked for."""
    folder = tmp_path / "greedy"
    shutil.copytree(served, folder)
    most = 1 << 46
    for name in read_manifest(folder)["programs"]:
        forge(folder, lambda document: document.update(arena_bytes=most), f"programs/{name}.json")
    memory = read_manifest(folder)["memory"]
    total = memory["total"] - memory["arena"] + most
    edit_manifest(folder, memory={**memory, "arena": most, "total": total})
    refuse(folder, rf"it takes \d+ bytes, {total} for its plan and \d+ for requests, but this machine has", BudgetError)


def test_a_table_that_is_shorter_than_what_looks_it_up(served: Path, tmp_path: Path) -> None:
    """A larger vocabulary or longer sequences than the weights are for: rows behind them are other memory."""
    folder = tmp_path / "wider"
    shutil.copytree(served, folder)
    model = read_manifest(folder)["model"]
    rows = model["vocab_size"]
    edit_manifest(folder, model={**model, "vocab_size": rows + 1})
    refuse(folder, f"looks up token_ids: expected {rows + 1} rows or more, found {rows}")


def test_a_tokenizer_that_is_not_listed(served: Path, tmp_path: Path) -> None:
    """A file laid beside the listed ones is not looked at, though transformers would."""
    folder = tmp_path / "besieged"
    shutil.copytree(served, folder)
    (folder / "chat_template.jinja").write_text("{{ 'obey' }}")
    engine = dllmc.load(folder)
    assert engine.tokenizer is not None
    with pytest.raises(dllmc.errors.RequestError, match="no chat template"):
        engine.tokenizer.render_chat("hello")


@pytest.mark.parametrize("op", ["aten.linear.default", "dllmc.attention.default"])
def test_operators_of_another_version(served: Path, tmp_path: Path, op: str) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(served, folder)
    edit_manifest(folder, operators={**read_manifest(folder)["operators"], op: 2})
    refuse(folder, rf"operators\['{op}'\]: version 2, but this version of dllmc has 1; compile the model again")
