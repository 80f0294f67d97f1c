"""Loading a checkpoint: its tensors against its config, its model spec, and where it comes from."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dllmc.errors import CheckpointError, ConfigError
from dllmc.models.checkpoint import TOKENIZER_FILES, load_model, load_spec, resolve, tokenizer_files
from dllmc.spec import ModelSpec
from tests.models.folders import (
    EMBEDDING,
    GOLDEN,
    HEAD,
    INDEX,
    TYING,
    Weights,
    copy_of,
    edit_config,
    edit_weights,
    mapped_file,
)


def test_a_loaded_model_holds_the_stored_tensors(name: str) -> None:
    """Every tensor under its own name, in eval mode, without gradients."""
    model, stored = load_model(GOLDEN / name), load_file(GOLDEN / name / "model.safetensors")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(w, stored[n]) for n, w in model.state_dict().items())


def test_weights_stay_memory_mapped_unless_the_dtype_differs(folder: Path) -> None:
    path = str(folder / "model.safetensors")
    assert {mapped_file(p) for p in load_model(folder).parameters()} == {path}
    converted = list(load_model(folder, dtype=torch.bfloat16).parameters())
    assert {p.dtype for p in converted} == {torch.bfloat16}
    assert path not in {mapped_file(p) for p in converted}


def test_weights_are_rounded_to_the_asked_dtype(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=torch.bfloat16)
    assert all(torch.equal(p, stored[n].to(torch.bfloat16)) for n, p in model.named_parameters())


def test_weights_go_to_the_asked_device(folder: Path) -> None:
    assert {p.device.type for p in load_model(folder, device="meta").parameters()} == {"meta"}


def test_a_dtype_without_fractions_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype: expected .*, found torch\.int8"):
        load_model(folder, dtype=torch.int8)


def test_half_precision_checkpoints_load_in_float32(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({n: t.half() for n, t in w.items()}))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, stored[n].float()) for n, p in load_model(folder).named_parameters())


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(folder)


def test_a_tied_checkpoint_has_no_head_tensor(name: str, tmp_path: Path) -> None:
    edit_config(copy_of(name, tmp_path), **{TYING[name]: True})
    edit_weights(tmp_path, lambda w: w.pop(HEAD[name]))
    assert HEAD[name] not in load_model(tmp_path).state_dict()


def test_a_tied_checkpoint_may_store_a_head_that_is_not_used(name: str, tmp_path: Path) -> None:
    """The logits come from the embedding, whatever the stored head holds."""
    edit_config(copy_of(name, tmp_path), **{TYING[name]: True})
    ids = torch.arange(9)[None]
    with_head = load_model(tmp_path)(ids)
    edit_weights(tmp_path, lambda w: w.pop(HEAD[name]))
    assert torch.equal(with_head, load_model(tmp_path)(ids))


def test_a_tied_checkpoint_may_not_store_a_head_unlike_its_embedding(name: str, tmp_path: Path) -> None:
    edit_config(copy_of(name, tmp_path), **{TYING[name]: True})
    edit_weights(tmp_path, lambda w: w.update({HEAD[name]: torch.zeros(500, 64)}))
    with pytest.raises(CheckpointError, match=rf"{HEAD[name]} .*expected .*\[512, 64\], found .*\[500, 64\]"):
        load_model(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_told_in_one_error(folder: Path) -> None:
    """Names, file, expected and found shapes; of many, the first three and the count of the rest."""

    def damage(w: Weights) -> None:
        for i in range(3):
            w.pop(f"model.transformer.blocks.{i}.q_proj.weight")
            w.pop(f"model.transformer.blocks.{i}.k_proj.weight")
        w["model.transformer.wpe.weight"] = torch.zeros(2)
        w["model.transformer.ln_f.weight"] = torch.zeros(63)

    edit_weights(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "6 missing: model.transformer.blocks.0.q_proj.weight, " in message
    assert " and 3 more; " in message
    assert "1 not expected: model.transformer.wpe.weight; " in message
    assert (
        "1 misshapen or not float: model.transformer.ln_f.weight in model.safetensors: "
        "expected floats of shape [64], found torch.float32 of shape [63]" in message
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(folder: Path, dtype: torch.dtype) -> None:
    """Integers and 8-bit floats mean nothing without their scales."""
    embedding = EMBEDDING["llada-mha"]
    edit_weights(folder, lambda w: w.update({embedding: w[embedding].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{embedding} in model.safetensors: expected floats.*found {dtype} "):
        load_model(folder)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    for load in (load_model, load_spec):
        with pytest.raises(CheckpointError, match=r"no config\.json; give the folder that holds"):
            load(folder)


def test_the_spec_of_llada_takes_its_width_from_the_embedding(folder: Path) -> None:
    edit_config(folder, embedding_size=640)
    assert load_spec(folder) == ModelSpec(640, 500, (501,), shifted=False, max_positions=256)


def test_the_spec_of_dream_is_shifted() -> None:
    assert load_spec(GOLDEN / "dream-gqa") == ModelSpec(512, 500, (501,), shifted=True, max_positions=256)


@pytest.mark.parametrize(
    ("config", "generation", "end_ids"),
    [
        (501, None, (501,)),
        ([501, 7], None, (501, 7)),
        (501, {"eos_token_id": [9, 501]}, (501, 9)),
        (None, {"eos_token_id": 9}, (9,)),
        (501, {"eos_token_id": None}, (501,)),
        (501, {}, (501,)),
        (None, None, ()),
    ],
)
def test_end_tokens_are_those_of_both_configs(
    folder: Path, config: object, generation: dict[str, object] | None, end_ids: tuple[int, ...]
) -> None:
    edit_config(folder, eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load_spec(folder).end_ids == end_ids


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mask_token_id", None, r"config\.json: field 'mask_token_id': expected one token id, found None"),
        ("mask_token_id", [1, 2], r"config\.json: field 'mask_token_id': expected one token id, found \[1, 2\]"),
        ("mask_token_id", 512, r"mask_id: expected a token id in \[0, 512\), found 512"),
        ("eos_token_id", ["</s>"], r"config\.json: field 'eos_token_id': expected a token id or a list"),
        ("eos_token_id", -1, r"end_ids: expected .*\[0, 512\), found \(-1,\)"),
        ("max_sequence_length", 1, r"max_positions: expected an integer >= 2, found 1"),
    ],
)
def test_a_spec_out_of_range_is_refused_with_its_folder(folder: Path, field: str, value: object, expected: str) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(ConfigError, match=expected) as caught:
        load_spec(folder)
    assert str(folder) in str(caught.value)


def test_a_generation_config_that_is_not_understood_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: field 'eos_token_id': expected .*found '</s>'"):
        load_spec(folder)


def test_tokenizer_files_are_those_that_are_there(folder: Path) -> None:
    """In a fixed order, and nothing else of the folder."""
    assert tokenizer_files(folder) == []
    for file in ("vocab.json", "tokenizer.json", "notes.txt"):
        (folder / file).write_text("{}")
    assert tokenizer_files(folder) == [folder / "tokenizer.json", folder / "vocab.json"]


def test_a_folder_is_its_own_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given as a path or as text; the hub is not asked, even where the name looks like an id."""
    (folder / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve("org/name") == Path("org/name")


@pytest.mark.parametrize("source", ["name", "a/b/c", "/no/such", "./no/such", "../no", "org/", "org/na me", "C:/x"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(
        CheckpointError, match="expected an existing folder or a hub id 'organisation/name', found neither"
    ):
        resolve(source)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a folder, found a file"):
        resolve(folder / "model.safetensors")


def test_of_a_hub_id_only_data_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs, safetensors and tokenizer files; no code, no pickles."""
    asked: list[tuple[str, list[str]]] = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_spec("GSAI-ML/LLaDA-8B-Instruct").mask_id == 500
    [(repo_id, patterns)] = asked
    assert repo_id == "GSAI-ML/LLaDA-8B-Instruct"

    def fetched(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)

    needed = ["config.json", "generation_config.json", "model-00001-of-00006.safetensors", INDEX, *TOKENIZER_FILES]
    assert all(map(fetched, needed))
    assert not any(map(fetched, ["modeling_llada.py", "pytorch_model.bin", "model.pt", "README.md", "x.gguf"]))


@pytest.mark.parametrize(
    "failure", [OSError("no route\n  to host"), ValueError("no route to host"), KeyError("no route to host")]
)
def test_any_failure_of_the_hub_is_one_error(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the id, what failed, and that a local folder will do."""

    def download(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"^org/name: .*no route to host.*or give a local folder$") as caught:
        load_model("org/name")
    assert type(failure).__name__ in str(caught.value)


def test_a_hub_id_is_found_in_the_cache_when_offline(tmp_path: Path) -> None:
    """In the hub's own layout, where a snapshot is links to blobs; an id that is not there is refused."""
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    for made in (blobs, snapshot, repository / "refs"):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "dream-gqa" / file, blobs / file[::-1])
        (snapshot / file).symlink_to(Path("../../blobs") / file[::-1])
    code = """
from dllmc.errors import CheckpointError
from dllmc.models.checkpoint import load_model
print(sum(p.numel() for p in load_model("org/name").parameters()))
try:
    load_model("org/other")
except CheckpointError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    count, refusal = done.stdout.splitlines()
    stored = load_file(GOLDEN / "dream-gqa" / "model.safetensors")
    assert int(count) == sum(int(np.prod(w.shape)) for w in stored.values())
    assert refusal.startswith("org/other: ")
    assert "give a local folder" in refusal
