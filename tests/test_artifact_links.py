"""Artifacts that refer to a checkpoint's own safetensors: the same model, and nothing taken on trust."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dllmc
from dllmc import artifact
from dllmc.errors import ArtifactError, ConfigError
from tests.artifacts import edit_manifest, entry_of, read_manifest, tree

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llada"
LINK = "../checkpoint/model.safetensors"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundled checkpoint and, beside it, `linked` and `copied`; not to be changed."""
    folder = tmp_path_factory.mktemp("links")
    shutil.copytree(EXAMPLE, folder / "checkpoint")
    for name, linked in (("linked", True), ("copied", False)):
        dllmc.compile(folder / "checkpoint", folder / name, dllmc.CompileOptions(link_weights=linked))
    return folder


@pytest.fixture
def folder(compiled: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(compiled, tmp_path / "moved"))


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        artifact.read(path)
    assert str(path.parent) in str(caught.value)


def relink(path: Path, **changes: Any) -> None:
    """Change the entry of the linked file, or its name."""
    (entry,) = read_manifest(path)["linked"].values()
    name = changes.pop("name", LINK)
    edit_manifest(path, linked={name: {**entry, **changes}})


def test_it_decodes_as_the_copy_does_and_is_small(compiled: Path) -> None:
    linked, copied = (dllmc.load(compiled / name) for name in ("linked", "copied"))
    assert linked.artifact.memory == copied.artifact.memory
    for name, weight in copied.artifact.load_weights().items():
        assert torch.equal(weight, linked.artifact.load_weights()[name]), name
    sizes = {name: sum(map(len, tree(compiled / name).values())) for name in ("linked", "copied")}
    weights = sum(tensor.nbytes for tensor in load_file(EXAMPLE / "model.safetensors").values())
    assert sizes["linked"] < sizes["copied"] - 0.9 * weights


def test_joined_weights_are_recipes(compiled: Path) -> None:
    """What the programs join is named part by part, as the checkpoint has it; only constants are stored."""
    manifest = read_manifest(compiled / "linked")
    stored = load_file(EXAMPLE / "model.safetensors")
    assert manifest["linked"].keys() == {LINK}
    assert all(name.split("+") == recipe for name, recipe in manifest["recipes"].items())
    assert {part for recipe in manifest["recipes"].values() for part in recipe} <= stored.keys()
    own = load_file(compiled / "linked" / manifest["weights"][0])
    assert all(name.startswith("constant.") for name in own)


def test_a_checkpoint_of_another_dtype_is_cast_when_it_is_loaded(compiled: Path, tmp_path: Path) -> None:
    """One in bfloat16, compiled in float32."""
    half = tmp_path / "checkpoint"
    shutil.copytree(compiled / "checkpoint", half)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    written = dllmc.compile(half, tmp_path / "linked", dllmc.CompileOptions(link_weights=True))
    loaded = written.load_weights()
    for name, recipe in written.manifest["recipes"].items():
        assert torch.equal(loaded[name], torch.cat([weights[part].float() for part in recipe])), name


def test_tensors_that_nothing_is_made_of_are_not_read(folder: Path) -> None:
    """Of whatever dtype: safetensors has some that torch has not."""
    file = folder / "checkpoint" / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + length]), file.read_bytes()[8 + length :]
    header["other"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [len(data), len(data) + 3]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(3))
    relink(folder / "linked", **entry_of(file.read_bytes()))
    linked, copied = (artifact.read(folder / name).load_weights() for name in ("linked", "copied"))
    assert linked.keys() == copied.keys()
    assert all(torch.equal(weight, copied[name]) for name, weight in linked.items())


def test_both_may_be_moved_together(folder: Path) -> None:
    """And the artifact may be opened by another way to it."""
    artifact.read(folder / "linked")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "link").symlink_to(folder / "linked")
    artifact.read(folder / "elsewhere" / "link")


def test_one_without_the_other_is_refused(folder: Path) -> None:
    (folder / "checkpoint").rename(folder / "gone")
    refuse(folder / "linked", r"is not there; keep the checkpoint where it was beside the artifact, or compile without")


def test_other_bytes_are_refused_unless_they_are_not_looked_at(folder: Path) -> None:
    """A retrained checkpoint of the same shapes: `hash_weights=False` takes it, and says so in its name."""
    file = folder / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file, {"format": "pt"})
    refuse(folder / "linked", r"model\.safetensors: expected sha256 \w+, found \w+")
    artifact.read(folder / "linked", hash_weights=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/hostname", "expected a relative path to a .safetensors file"),
        ("../checkpoint/config.json", "expected a relative path to a .safetensors file"),
        ("../checkpoint/../checkpoint/model.safetensors", "expected a relative path to a .safetensors file"),
        ("../checkpoint/none.safetensors", "is not there"),
        ("../checkpoint.safetensors", "is not there"),
    ],
)
def test_a_link_to_anything_else_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / "checkpoint.safetensors").mkdir()
    relink(folder / "linked", name=name)
    refuse(folder / "linked", message)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], r"expected tensors of the linked files, found \[\]"),
        (["nothing"], r"expected tensors of the linked files, found \['nothing'\]"),
        ([3], r"expected tensors of the linked files, found \[3\]"),
        (["model.transformer.wte.weight", "model.transformer.ln_f.weight"], "do not make one F32"),
        (["model.transformer.ln_f.weight", "model.transformer.ln_f.weight"], r"expected \(\[\d+\], 'F32'\), found"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(folder: Path, recipe: list[Any], message: str) -> None:
    recipes = read_manifest(folder / "linked")["recipes"]
    edit_manifest(folder / "linked", recipes={**recipes, "model.transformer.ln_f.weight": recipe})
    refuse(folder / "linked", message)


def test_a_recipe_for_what_no_program_reads_is_refused(folder: Path) -> None:
    recipes = read_manifest(folder / "linked")["recipes"]
    edit_manifest(folder / "linked", recipes={**recipes, "x": ["model.transformer.ln_f.weight"]})
    refuse(folder / "linked", r"no program has the weights \['x'\]")


def test_a_module_has_nothing_to_link_to(tmp_path: Path) -> None:
    model, spec = dllmc.load_model(EXAMPLE), dllmc.load_spec(EXAMPLE)
    with pytest.raises(ConfigError, match="link_weights: expected a checkpoint folder to link to, found a module"):
        dllmc.compile(model, tmp_path / "out", dllmc.CompileOptions(link_weights=True), spec)


def test_a_checkpoint_behind_a_link_is_found(compiled: Path, tmp_path: Path) -> None:
    """As the hub's cache has its files: folders of links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (compiled / "checkpoint").iterdir():
        (snapshot / file.name).symlink_to(file)
    written = dllmc.compile(snapshot, tmp_path / "out", dllmc.CompileOptions(link_weights=True))
    assert read_manifest(written.path)["linked"].keys() == {"../snapshot/model.safetensors"}
    artifact.read(written.path)
