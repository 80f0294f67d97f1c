"""The tensors of a checkpoint folder, memory-mapped from safetensors: one file, or the shards that an index names.

Nothing is read here but the files' headers. Pickled checkpoints are never opened: unpickling runs code.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllmc.errors import CheckpointError
from dllmc.models.config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor over the mapped bytes of its file; they are read when it is first touched."""

    value: Tensor
    path: Path


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name; `model.safetensors` goes before an index, as in transformers.

    Raises `CheckpointError` for absent or pickled weights, a corrupt shard, and an index that does not fit its shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return _map_shard(single)
    if not index.is_file():
        raise _no_weights(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard, names in _shards_of(index).items():
        if not shard.is_file():
            raise CheckpointError(
                f"{index}: names {shard.name} for {first_of(names)}, but {shard} does not exist; fetch it"
            )
        held = _map_shard(shard)
        if absent := [name for name in names if name not in held]:
            raise CheckpointError(
                f"{shard}: expected what {INDEX} says it holds, did not find {first_of(absent)}; "
                "fetch the index and the shards of one revision"
            )
        tensors |= {name: held[name] for name in names}
    return tensors


def first_of(items: Iterable[str], limit: int = 3) -> str:
    """The first few items of a list that may be long, and how many more there are."""
    listed = list(items)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def _shards_of(index: Path) -> dict[Path, list[str]]:
    """The shards that an index names, each with the names of its tensors."""
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: field 'weight_map': expected tensor names and their files, found {weight_map!r}"
        )
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        # A plain name: nothing outside the folder may be opened, whatever the index says.
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
            raise CheckpointError(
                f"{index}: tensor {name}: expected the name of a .safetensors file in this folder, found {file!r}"
            )
        shards.setdefault(index.parent / file, []).append(name)
    return shards


def _map_shard(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as shard:
            names = shard.keys()
            return {name: StoredTensor(_aligned(shard.get_tensor(name)), path) for name in names}
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(
            f"{path}: expected a complete safetensors file, found {path.stat().st_size} bytes that are not one "
            f"({cause}); fetch the file again (after `git clone`, with `git lfs pull`)"
        ) from cause


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy where a writer put it at an address that its element type does not allow."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _no_weights(folder: Path) -> CheckpointError:
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    pickles = [name for name in files if Path(name).suffix in PICKLE_SUFFIXES]
    others = [name for name in files if Path(name).suffix == ".safetensors"]
    if pickles and not others:
        return CheckpointError(
            f"{folder}: expected {SINGLE} or {INDEX}, found only pickles ({first_of(pickles)}). A pickle can run code "
            "and is never opened here: convert it where you trust it, with `safetensors.torch.save_file`"
        )
    return CheckpointError(f"{folder}: expected weights in {SINGLE} or {INDEX}, found {first_of(others) or 'neither'}")
