"""What a dense step takes of memory a token, at the shapes of published models: counted, and no weight is needed.

dllmc's is the arena that the plan of a compiled step says. An eager decoder's is what it cannot do without: the tensors
as wide as the vocabulary that its softmax makes, or, with its head in chunks, what the layers hold at their widest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import report
from benchmarks.compile_time import LLADA_8B
from dllmc.capture import capture
from dllmc.ir.program import CHUNK, Program
from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.passes import pipeline
from dllmc.passes.base import Pass
from dllmc.passes.cache_kv import CacheKV
from dllmc.passes.chunk_activations import ChunkActivations
from dllmc.passes.plan_memory import planned
from dllmc.passes.sizing import resized, with_rows
from dllmc.spec import ModelSpec

# https://huggingface.co/Dream-org/Dream-v0-Instruct-7B/blob/main/config.json
DREAM_7B = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
BYTES = 2  # of an element in bfloat16
WIDEST_TOKENS = 4096  # with as many, what does not grow with tokens is nothing


@dataclass(frozen=True)
class Shape:
    """A published model. Widths in elements; `build(layers)` makes the module, in torch's default dtype."""

    name: str
    build: Callable[[int], nn.Module]
    layers: int
    width: int
    kv_width: int
    vocab: int
    mask_id: int
    shifted: bool = False

    @property
    def bound_bytes(self) -> int:
        """Residual stream, keys and values of a token: while a layer attends, a step holds them of every token."""
        return BYTES * (self.width + 2 * self.kv_width)


def _llada(layers: int) -> nn.Module:
    return LLaDAModel(LLaDAConfig.from_dict({**LLADA_8B, "n_layers": layers}))


def _dream(layers: int) -> nn.Module:
    return DreamModel(DreamConfig.from_dict({**DREAM_7B, "num_hidden_layers": layers}))


SHAPES = (
    Shape("LLaDA-8B", _llada, layers=32, width=4096, kv_width=4096, vocab=126464, mask_id=126336),
    Shape("Dream-7B", _dream, layers=28, width=3584, kv_width=512, vocab=152064, mask_id=151666, shifted=True),
)


def _in_bfloat16(shape: Shape, layers: int) -> nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return shape.build(layers)
    finally:
        torch.set_default_dtype(usual)


def eager_bytes(shape: Shape, layers: int) -> dict[str, int]:
    """Decoder -> what it holds of a token at once, in bytes; of the first two, tensors of the head and no others."""
    return {
        "eager, bfloat16 softmax": 2 * BYTES * shape.vocab,  # logits and probabilities
        "eager, float64 softmax": (BYTES + 8 + 8) * shape.vocab,  # logits, these in float64, probabilities
        "eager, head in chunks": widest_bytes(shape, layers) // WIDEST_TOKENS,
    }


def widest_bytes(shape: Shape, layers: int) -> int:
    """The most that the module without its head holds in tensors of its own, for `WIDEST_TOKENS` tokens, in bytes.

    It runs in eager mode on tensors without memory; attention is one operator that keeps no scores.
    """
    with FakeTensorMode(), torch.no_grad():
        model = _in_bfloat16(shape, layers)
        for owner in model.modules():
            for name, part in owner.named_children():
                if isinstance(part, nn.Linear) and part.out_features == shape.vocab:
                    setattr(owner, name, nn.Identity())
        tokens = torch.zeros(1, WIDEST_TOKENS, dtype=torch.int64)
        with report.LiveBytes() as live:
            model(tokens)
    return live.peak


def compiled(shape: Shape, layers: int, tokens: int, rows: int, chunk: int) -> Program:
    """A step of one request, compiled with loops over chunks, for at most so many tokens and rows; not planned yet."""
    with torch.device("meta"):
        model = _in_bfloat16(shape, layers)
    spec = ModelSpec(shape.vocab, shape.mask_id, (), shape.shifted, max_positions=tokens)
    step = capture(model, spec, with_rows({"tokens": tokens, "segments": 1}, rows))
    pipeline.run(step, pipeline.up_to(in_chunks(chunk), "reuse-in-place"))
    assert step.program is not None
    return step.program


def in_chunks(chunk: int) -> tuple[Pass, ...]:
    """The default pipeline for dense steps, which cache nothing, with loops over so many rows at a time."""
    passes = [each for each in pipeline.parse(pipeline.DEFAULT_PIPELINE) if each.name != CacheKV.name]
    return tuple(ChunkActivations(chunk) if p.name == ChunkActivations.name else p for p in passes)


def longest(program: Program, budget: int) -> tuple[int, int]:
    """The most tokens whose planned arena is within a budget in bytes, and that arena."""

    def arena(tokens: int) -> int:
        sizes = program.maxima | {"tokens": tokens, CHUNK: min(program.maxima[CHUNK], tokens)}
        return planned(resized(program, sizes)).arena_bytes or 0

    low, high = 1, program.maxima["tokens"]
    while low < high:
        middle = (low + high + 1) // 2
        if arena(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low, arena(low)


def measure(shape: Shape, layers: int, budget: int, rows: int, chunk: int) -> list[dict[str, Any]]:
    """One record a decoder: bytes a token, and the longest sequence whose step is within a budget in bytes."""
    bound = budget // shape.bound_bytes
    tokens, arena = longest(compiled(shape, layers, bound, rows, chunk), budget)
    eager = {name: (budget // size, size) for name, size in eager_bytes(shape, layers).items()}
    of_all = {"residual + K + V": (bound, shape.bound_bytes), **eager, "dllmc": (tokens, arena / tokens)}
    return [
        {
            "model": shape.name,
            "layers": layers,
            "decoder": name,
            "tokens": longest_here,
            "bytes_a_token": size,
            "of_bound": longest_here / bound,
            "dllmc_has_times": tokens / longest_here,
        }
        for name, (longest_here, size) in of_all.items()
    ]
