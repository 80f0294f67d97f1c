"""The golden outputs as objects: arguments under dllmc's names, one prompt a case, completions without the prompt.

README.md beside this file says how the files are to be read. `dense_cases` are those of `mode="none"`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.spec import ModelSpec

ROOT = Path(__file__).parent
FOLDERS = ("llada-mha", "dream-gqa")
DENSE_NAMES = ("dense", "dense_threshold", "dense_cfg", "definition_dense", "dense_batch_left_padded")
DREAM_REMASKING = {"maskgit_plus": "low_confidence", "entropy": "entropy", "topk_margin": "topk_margin"}
SAMPLING_FIELDS = ("gen_length", "block_length", "steps", "threshold", "remasking", "schedule", "cfg_scale")
CACHE_FIELDS = ("retention", "selection", "pool", "delay", "refresh_interval")


@dataclass(frozen=True)
class Case:
    """One prompt and what it must give. `nfe` is None where forward passes are not given or not to be matched.

    `kwargs` are SamplingParams', always with `ignore_eos`; `cache` holds CachePolicy's arguments, None if dense.
    """

    folder: str
    name: str
    id: str
    prompt_ids: list[int]
    kwargs: dict[str, Any]
    cache: dict[str, Any] | None
    completion: list[int]
    nfe: int | None

    @property
    def dense(self) -> bool:
        """Whether every pass is Full (`mode="none"`)."""
        return self.cache is None

    def __str__(self) -> str:
        return self.id


@cache
def load_model(folder: str) -> tuple[nn.Module, ModelSpec]:
    """The reference model of one of `FOLDERS` with its checkpoint, in float32, and what decoding needs of it."""
    config = json.loads((ROOT / folder / "config.json").read_text())
    model: nn.Module
    if config["model_type"] == "llada":
        model, max_positions = LLaDAModel(LLaDAConfig.from_dict(config)), config["max_sequence_length"]
    else:
        model, max_positions = DreamModel(DreamConfig.from_dict(config)), config["max_position_embeddings"]
    model.load_state_dict(load_file(ROOT / folder / "model.safetensors"))
    spec = ModelSpec(
        vocab_size=config.get("embedding_size", config["vocab_size"]),
        mask_id=config["mask_token_id"],
        end_ids=(config["eos_token_id"],),
        shifted=config["model_type"] == "Dream",
        max_positions=max_positions,
    )
    return model.eval(), spec


def all_cases() -> list[Case]:
    """Every case of both folders, dense and cached."""
    return [case for folder in FOLDERS for case in _cases(folder)]


def dense_cases() -> list[Case]:
    """Every case with `mode="none"`."""
    return [case for case in all_cases() if case.dense]


def _cases(folder: str) -> Iterator[Case]:
    for index, entry in enumerate(json.loads((ROOT / folder / "generations.json").read_text())):
        name, args = entry["name"], entry["args"]
        padding = args.get("attention_mask", [[1] * len(row) for row in entry["prompt"]])
        for row, (prompt, tokens, keep) in enumerate(zip(entry["prompt"], entry["tokens"], padding, strict=True)):
            kwargs = _sampling_kwargs(args)
            yield Case(
                folder=folder,
                name=name,
                id=f"{folder}-{index}-{name}" + (f"-row{row}" if len(padding) > 1 else ""),
                prompt_ids=[token for token, real in zip(prompt, keep, strict=True) if real],
                kwargs=kwargs,
                cache=None if name in DENSE_NAMES else _cache_kwargs(name, args),
                completion=_cut(tokens[len(prompt) :], kwargs.get("stop_token_ids", ())),
                nfe=None if name == "dual_cache_threshold" else entry["nfe"],
            )


def _sampling_kwargs(args: Mapping[str, Any]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {name: args[name] for name in SAMPLING_FIELDS if name in args} | {"ignore_eos": True}
    if "max_new_tokens" in args:  # Dream's own decoder: one block
        length = args["max_new_tokens"]
        kwargs |= {"gen_length": length, "block_length": length, "schedule": "timestep"}
        kwargs["remasking"] = DREAM_REMASKING[args["alg"]]
    if "threshold" in args:
        kwargs.pop("steps", None)
    if "end_ids" in args:
        kwargs["stop_token_ids"] = tuple(args["end_ids"])
    return kwargs


def _cache_kwargs(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    selection = "shared" if name == "sparse_shared" else "per_head"
    defaults = {"delay": 0, "retention": 1.0, "selection": selection, "pool": 3}
    return defaults | {field: args[field] for field in CACHE_FIELDS if field in args}


def _cut(completion: list[int], stop_token_ids: tuple[int, ...]) -> list[int]:
    stop = next((i for i, token in enumerate(completion) if token in stop_token_ids), len(completion))
    return completion[: stop + 1]
