"""Checkpoint folders for tests: copies of the golden ones, and ways to change them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("llada-mha", "dream-gqa")
HEAD = {"llada-mha": "model.transformer.ff_out.weight", "dream-gqa": "lm_head.weight"}
EMBEDDING = {"llada-mha": "model.transformer.wte.weight", "dream-gqa": "model.embed_tokens.weight"}
TYING = {"llada-mha": "weight_tying", "dream-gqa": "tie_word_embeddings"}
INDEX = "model.safetensors.index.json"
Weights = dict[str, torch.Tensor]


def copy_of(name: str, folder: Path) -> Path:
    """Copy a golden checkpoint into a folder; returns the folder."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[Weights], Any]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    path.unlink()  # not in place: `weights` are mapped from it
    save_file(weights, path)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Deal the tensors out to `count` shards with an index; returns the index's weight map."""
    weights = load_file(folder / "model.safetensors")
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(weights)}
    for file in files:
        save_file({name: w for name, w in weights.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose mapping holds the tensor's bytes; empty for ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *rest = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in addresses.split("-"))
        if first <= tensor.data_ptr() < last:
            return rest[4] if len(rest) == 5 else ""
    return ""
