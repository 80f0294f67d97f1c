"""Models without a checkpoint: their shapes, programs of them compiled in memory, and random weights on a device.

A decoder in plain torch and an engine are given the same weights. Programs can be kept in a folder, so that compiling
takes no time where time is dear; this runs anywhere:

python -m benchmarks.gpu --only prepare --device cuda --programs FOLDER
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dllmc
from benchmarks import baselines
from benchmarks.compile_time import LLADA_8B
from benchmarks.context_planned import DREAM_7B
from dllmc import artifact, compiler
from dllmc.ir.program import PAGES, Program
from dllmc.ir.program_json import from_json, to_json
from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.runtime.engine import Engine

SEED = 0
WEIGHT_STD = 0.02

_TINY = LLADA_8B | {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 96,
    "vocab_size": 512,
    "embedding_size": 512,
    "max_sequence_length": 256,
}


@dataclass(frozen=True)
class Model:
    """A model's shape. Widths in elements; `build(layers)` makes the module where torch's default device is."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    build: Callable[[int], baselines.Model]
    spec: dllmc.ModelSpec

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def token_kv_bytes(self, layers: int, dtype: torch.dtype) -> int:
        """Keys and values of a token in so many layers."""
        return 2 * layers * self.kv_heads * self.head_dim * dtype.itemsize


def _llada(name: str, config: Mapping[str, Any], mask_id: int) -> Model:
    def build(layers: int) -> baselines.Model:
        return LLaDAModel(LLaDAConfig.from_dict({**config, "n_layers": layers}))

    width, heads, vocab = config["d_model"], config["n_heads"], config["embedding_size"]
    spec = dllmc.ModelSpec(vocab, mask_id, (), max_positions=config["max_sequence_length"])
    return Model(name, config["n_layers"], width, heads, heads, config["mlp_hidden_size"], build, spec)


def _dream() -> Model:
    c = DREAM_7B

    def build(layers: int) -> baselines.Model:
        return DreamModel(DreamConfig.from_dict({**c, "num_hidden_layers": layers}))

    spec = dllmc.ModelSpec(c["vocab_size"], 151666, (), shifted=True, max_positions=4096)
    heads = c["num_attention_heads"], c["num_key_value_heads"]
    return Model(
        "dream-7b", c["num_hidden_layers"], c["hidden_size"], *heads, c["intermediate_size"], build=build, spec=spec
    )


MODELS = {model.name: model for model in (_llada("llada-8b", LLADA_8B, 126336), _dream(), _llada("tiny", _TINY, 511))}


@dataclass(frozen=True)
class Limits:
    """What a compiled step takes at most."""

    tokens: int
    requests: int
    rows: int


@dataclass(frozen=True)
class Compiled:
    """Programs, and what their weights are made of: of each the tensors that it joins, and constants' own bytes."""

    model: Model
    layers: int
    dtype: torch.dtype
    programs: Mapping[str, Program]
    recipes: Mapping[str, list[str]]
    constants: Mapping[str, Tensor]

    def joined(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Every weight that the programs name, of the module's tensors."""
        found = {name: constant.to(device) for name, constant in self.constants.items()}
        for name, parts in self.recipes.items():
            found[name] = torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]]
        return found


def compiled(model: Model, layers: int, limits: Limits, dtype: torch.dtype, device: torch.device) -> Compiled:
    """Capture a step of a module without weights, and run all passes, for steps up to `limits` on a device."""
    with torch.device("meta"):
        module = model.build(layers).to(dtype)
    options = dllmc.CompileOptions(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        max_tokens_per_step=limits.tokens,
        max_requests=limits.requests,
        max_logit_rows=limits.rows,
    )
    step, _ = compiler.rewrite(module, model.spec, options)
    assert step.program is not None
    programs = {program.name: program for program in (step.program, *step.phases.values())}
    named = sorted({name for program in programs.values() for name in program.weights})
    constants = {name: step.tensors[name] for name in named if name in step.tensors and not step.tensors[name].is_meta}
    recipes = {name: list(step.tensors.sources(name)) for name in named if name not in constants}
    return Compiled(model, layers, dtype, programs, recipes, constants)


def kept(folder: Path, model: Model, layers: int, limits: Limits, dtype: torch.dtype, device: torch.device) -> Compiled:
    """`compiled`, from the folder if it is there, else written there."""
    sizes = f"{limits.tokens}-{limits.requests}-{limits.rows}"
    place = folder / f"{model.name}-{layers}-{sizes}-{str(dtype).removeprefix('torch.')}-{device.type}"
    if not (place / "recipes.json").exists():
        made = compiled(model, layers, limits, dtype, device)
        place.mkdir(parents=True, exist_ok=True)
        for name, program in made.programs.items():
            (place / f"{name}.program.json").write_text(json.dumps(to_json(program)))
        save_file({name: constant.contiguous() for name, constant in made.constants.items()}, place / "constants")
        (place / "recipes.json").write_text(json.dumps(made.recipes))  # last: what is there is whole
    files = sorted(place.glob("*.program.json"))
    programs = [from_json(json.loads(file.read_text()), file.name) for file in files]
    recipes = json.loads((place / "recipes.json").read_text())
    named = {program.name: program for program in programs}
    return Compiled(model, layers, dtype, named, recipes, load_file(place / "constants"))


def random_tensors(model: Model, layers: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A module's parameters by name: norms 1, all else normal; the same at every call on a device."""
    with torch.device("meta"):
        shapes = model.build(layers).state_dict()
    generator = torch.Generator(device).manual_seed(SEED)
    tensors = {}
    for name, meta in shapes.items():
        tensor = torch.ones(meta.shape, dtype=dtype, device=device)
        tensors[name] = tensor.normal_(0, WEIGHT_STD, generator=generator) if meta.ndim > 1 else tensor
    return tensors


def module_of(model: Model, layers: int, tensors: Mapping[str, Tensor]) -> baselines.Model:
    """The module over these parameters."""
    with torch.device("meta"):
        module = model.build(layers)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def engine_of(
    made: Compiled,
    weights: Mapping[str, Tensor],
    device: torch.device,
    pages: int | None = None,
    scheduling: str = "multiplexed",
) -> Engine:
    """An engine on a device, its KV pool with that many pages. None: with as many as its largest step caches."""
    opened = artifact.in_memory(made.model.spec, made.programs)
    if opened.program.caches:
        opened = opened.with_pages(pages or opened.program.maxima[PAGES])
    return Engine(opened, scheduling, device=device, weights=weights)
