"""Weights on disk: one file or shards, mapped; an error that names the file for everything else."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dllmc.errors import CheckpointError
from dllmc.models.checkpoint import load_model
from tests.models.folders import EMBEDDING, INDEX, copy_of, mapped_file, shard, write_index

QUICK = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_shards_load_like_one_file(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    shard(folder)
    model = load_model(folder)
    assert all(torch.equal(p, whole[n]) for n, p in model.named_parameters())
    assert len({mapped_file(p) for p in model.parameters()}) == 3


def test_misaligned_tensors_are_copied_to_aligned_memory(folder: Path) -> None:
    """A writer may leave out the padding of the header; kernels expect elements at multiples of their size."""
    path = folder / "model.safetensors"
    stored, data = load_file(path), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.unlink()
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    model = load_model(folder)
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert all(p.data_ptr() % 4 == 0 for p in model.parameters())


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"expected weights in model\.safetensors or {INDEX}, found neither"):
        load_model(folder)


def test_weights_under_another_name_are_told(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"found consolidated\.safetensors$"):
        load_model(folder)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, file: str) -> None:
    """Neither under its own name, which the error tells with what to do, nor as safetensors."""
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        load_model(folder)
    assert file in str(caught.value)
    assert file == "model.safetensors" or "convert it" in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_an_index_must_map_tensors_to_files(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: field 'weight_map': expected .*, found "):
        load_model(folder)


OUTSIDE = ("../model.safetensors", "/tmp/model.safetensors", "inside/../../model.safetensors", "..", "")


@pytest.mark.parametrize("file", [*OUTSIDE, "sub/model.safetensors", "pytorch_model.bin", None, 3])
def test_an_index_names_only_safetensors_files_of_its_folder(folder: Path, file: object) -> None:
    """Not even where the path leads to a file that would load."""
    inside = folder / "inside"
    inside.mkdir()
    (folder / "config.json").rename(inside / "config.json")
    write_index(inside, {"a": file})
    with pytest.raises(CheckpointError, match=rf"{INDEX}: tensor a: expected the name of a .*, found {file!r}"):
        load_model(inside)


def test_an_index_that_is_not_json_is_refused(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text("{'weight_map'")
    with pytest.raises(CheckpointError, match=rf"{INDEX}: expected JSON"):
        load_model(folder)


def test_a_missing_shard_is_named_with_its_tensors(folder: Path) -> None:
    weight_map = shard(folder)
    lost = weight_map[EMBEDDING["llada-mha"]]
    (folder / lost).unlink()
    with pytest.raises(
        CheckpointError, match=rf"{INDEX}: names {lost} for .* and \d+ more, but .*{lost} does not exist"
    ):
        load_model(folder)


def test_a_tensor_that_its_shard_does_not_hold_is_named(folder: Path) -> None:
    weight_map = shard(folder)
    embedding = EMBEDDING["llada-mha"]
    wrong = next(file for file in weight_map.values() if file != weight_map[embedding])
    write_index(folder, {**weight_map, embedding: wrong})
    with pytest.raises(
        CheckpointError, match=rf"{wrong}: expected what {INDEX} says it holds, did not find {embedding};"
    ):
        load_model(folder)


@QUICK
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    copy_of("llada-mha", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: expected a complete safetensors file, found \d+ bytes"
    ):
        load_model(tmp_path)


@QUICK
@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_damaged_header_gives_no_other_error(tmp_path: Path, position: int, byte: int) -> None:
    """Whatever byte of the header is overwritten: the file still loads, or there is a `CheckpointError`."""
    copy_of("llada-mha", tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    assert int.from_bytes(data[:8], "little") > 3000
    data[position] = byte
    path.write_bytes(data)
    error = None
    try:
        load_model(tmp_path)
    except CheckpointError as caught:
        error = caught
    assert error is None or str(tmp_path) in str(error)
