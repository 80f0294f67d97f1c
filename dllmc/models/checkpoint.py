"""Checkpoints as Hugging Face folders: where one lies, which reference model it holds, and its weights.

A folder holds config.json, safetensors weights (`dllmc.models.shards`) and tokenizer files. No code of a
checkpoint is run: `model_type` picks one of the reference models here, and pickles are never opened.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllmc.errors import CheckpointError, ConfigError
from dllmc.models.config import Fields, read_json
from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.models.shards import StoredTensor, first_of, stored_tensors
from dllmc.spec import ModelSpec

HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
HUB_PATTERNS = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model", "*.jinja"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old checkpoints store; the angles follow from config.json


@dataclass(frozen=True)
class Architecture:
    """What a `model_type` stands for. `head` and `embedding` name the two tensors that tying makes one."""

    read_config: Callable[[Mapping[str, Any], str], Any]
    build: Callable[[Any], nn.Module]
    spec: Callable[[Any, int, tuple[int, ...]], ModelSpec]
    head: str
    embedding: str


def _llada_spec(c: LLaDAConfig, mask_id: int, end_ids: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(c.embedding_size, mask_id, end_ids, shifted=False, max_positions=c.max_sequence_length)


def _dream_spec(c: DreamConfig, mask_id: int, end_ids: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(c.vocab_size, mask_id, end_ids, shifted=True, max_positions=c.max_position_embeddings)


ARCHITECTURES = {
    "llada": Architecture(
        LLaDAConfig.from_dict,
        LLaDAModel,
        _llada_spec,
        head="model.transformer.ff_out.weight",
        embedding="model.transformer.wte.weight",
    ),
    "Dream": Architecture(
        DreamConfig.from_dict,
        DreamModel,
        _dream_spec,
        head="lm_head.weight",
        embedding="model.embed_tokens.weight",
    ),
}


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or the local copy of a hub id `organisation/name`.

    A hub id is downloaded to the hub's cache, or found there when offline; code and pickles are left out.
    Raises `CheckpointError` where there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source}: expected a folder, found a file; give the folder that holds config.json")
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: expected an existing folder or a hub id 'organisation/name', found neither")
    import huggingface_hub  # here, for a local folder does not need it

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
    except Exception as cause:
        reason = " ".join(str(cause).split()).rstrip(".")
        raise CheckpointError(
            f"{source}: no folder of this name, and the Hugging Face hub could not provide it: "
            f"{type(cause).__name__}: {reason}. Check the id, the connection and your access, or give a local folder"
        ) from cause


def load_model(source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The reference model of a checkpoint, ready for inference: (input_ids [B, T], position_ids) -> logits [B, T, V].

    Weights stay memory-mapped where they have the wanted dtype and device, and are copied elsewhere.
    Raises `ConfigError` for a config.json that is not understood, `CheckpointError` for files or tensors that do
    not fit it.
    """
    if dtype not in FLOATS:
        raise ConfigError(f"dtype: expected float64, float32, float16 or bfloat16, found {dtype}")
    folder = resolve(source)
    architecture, config, _ = _read_config(folder)
    with torch.device("meta"):
        model = architecture.build(config)
    stored, expected = stored_tensors(folder), model.state_dict()
    _check_tensors(folder, architecture, expected, stored)
    weights = {name: stored[name].value.to(device=device, dtype=dtype) for name in expected}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def load_spec(source: str | Path) -> ModelSpec:
    """What decoding must know about a checkpoint: from config.json, and the end tokens of generation_config.json.

    Raises `CheckpointError` without config.json, `ConfigError` for fields that are missing or out of range.
    """
    folder = resolve(source)
    architecture, config, fields = _read_config(folder)
    mask_ids = fields.token_ids("mask_token_id")
    fields.require(len(mask_ids) == 1, "mask_token_id", "one token id")
    end_ids = fields.token_ids("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        end_ids += Fields(read_json(generation), str(generation)).token_ids("eos_token_id")
    try:
        return architecture.spec(config, mask_ids[0], tuple(dict.fromkeys(end_ids)))
    except ConfigError as cause:
        raise ConfigError(f"{folder}: config.json and generation_config.json: {cause}") from cause


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of `TOKENIZER_FILES` that a folder has."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _read_config(folder: Path) -> tuple[Architecture, Any, Fields]:
    """The architecture, its own config, and all fields of config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder, found no config.json; give the folder that holds config.json, "
            "the safetensors files and the tokenizer"
        )
    fields = Fields(read_json(path), str(path))
    model_type = fields.values.get("model_type")
    choices = f"one of {', '.join(sorted(ARCHITECTURES))} (compile any other model as a module with its `ModelSpec`)"
    fields.require(isinstance(model_type, str) and model_type in ARCHITECTURES, "model_type", choices)
    architecture = ARCHITECTURES[str(model_type)]
    return architecture, architecture.read_config(fields.values, fields.where), fields


def _check_tensors(
    folder: Path, architecture: Architecture, expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]
) -> None:
    """Raise `CheckpointError` unless the stored tensors are the expected ones: names, shapes, floats.

    A tied model has no head of its own; one that is stored all the same must look like the embedding, and is not used.
    """
    known = {architecture.head: expected[architecture.embedding], **expected}
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in known and not name.endswith(IGNORED_SUFFIXES)]
    misfits = [
        f"{name} in {stored[name].path.name}: expected floats of shape {list(tensor.shape)}, "
        f"found {stored[name].value.dtype} of shape {list(stored[name].value.shape)}"
        for name, tensor in known.items()
        if name in stored and (stored[name].value.shape != tensor.shape or stored[name].value.dtype not in FLOATS)
    ]
    problems = [
        f"{len(names)} {what}: {first_of(names)}"
        for what, names in (("missing", missing), ("not expected", extra), ("misshapen or not float", misfits))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: the stored tensors do not fit config.json; {'; '.join(problems)}. "
            "Check that config.json and the weights belong to one model, unquantised"
        )
