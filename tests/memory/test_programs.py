"""The plans of the programs of supported models, at every depth, on all rows at once and in chunks: proven optimal."""

import pytest
import torch
from torch import nn

from dllmc.compiler import CompileOptions, rewrite
from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.passes import pipeline
from dllmc.spec import ModelSpec

LLADA = {"d_model": 64, "n_heads": 4, "mlp_hidden_size": 160, "vocab_size": 200, "max_sequence_length": 256}
DREAM = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 200,
    "max_position_embeddings": 256,
}


def model(name: str, layers: int) -> nn.Module:
    """Without weights."""
    with torch.device("meta"):
        if name == "llada":
            return LLaDAModel(LLaDAConfig.from_dict({**LLADA, "rope": True, "n_layers": layers}))
        return DreamModel(DreamConfig.from_dict({**DREAM, "num_hidden_layers": layers}))


@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("layers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 32, 80))])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_plan_meets_the_bound(name: str, layers: int, chunk: int) -> None:
    text = pipeline.DEFAULT_PIPELINE.replace("chunk-activations", f"chunk-activations{{chunk={chunk}}}")
    spec = ModelSpec(200, 0, (), shifted=name == "dream", max_positions=256)
    step, _ = rewrite(model(name, layers), spec, CompileOptions(passes=text))
    assert step.program is not None
    assert step.program.arena_bytes == step.program.lower_bound_bytes
