"""Models of the transformers library as they are: masked LMs, and causal ones with `is_causal` switched off."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dllmc
from dllmc.errors import CaptureError
from dllmc.ops.facts import argument
from tests.breadth.check import check_decoding, check_logits
from tests.published import drawn

VOCAB, MASK, MAX_POSITIONS = 67, 5, 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
SPEC = dllmc.ModelSpec(VOCAB, MASK, (), max_positions=MAX_POSITIONS)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def roberta() -> nn.Module:
    """Counts positions from the padding token's id on, and takes them from the values of tokens if left alone."""
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, **IDS))


def modernbert() -> nn.Module:
    """Every third layer is global, the others see four tokens to either side."""
    options = {**SIZES, **IDS, "cls_token_id": 2, "sep_token_id": 3, "num_hidden_layers": 3, "local_attention": 8}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**options))


def bidirectional(model: type[nn.Module], config: type[Any], **options: Any) -> nn.Module:
    settings = config(**GROUPED, **options)
    settings.is_causal = False
    return model(settings)


def llama() -> nn.Module:
    """Biases everywhere."""
    return bidirectional(transformers.LlamaForCausalLM, transformers.LlamaConfig, attention_bias=True, mlp_bias=True)


def qwen2() -> nn.Module:
    """Biases on queries, keys and values."""
    return bidirectional(transformers.Qwen2ForCausalLM, transformers.Qwen2Config)


def qwen3() -> nn.Module:
    """Norms of queries and keys of their own width."""
    return bidirectional(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, head_dim=12)


GROUPED_MODELS = (llama, qwen2, qwen3)
MODELS = (bert, roberta, modernbert, *GROUPED_MODELS)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_logits_are_those_of_the_eager_model(build: Callable[[], nn.Module]) -> None:
    """At three lengths that were never traced, in one packed step."""
    step = check_logits(drawn(build()), SPEC)
    attentions = list(step.calls(torch.ops.dllmc.attention.default))
    windows = [argument(node, 6) for node in attentions]
    assert windows == ([None, 4, 4] if build is modernbert else [None] * 2)
    kv_heads = {operand.meta["val"].shape[1] for node in attentions for operand in node.args[1:3]}
    assert kv_heads == {2 if build in GROUPED_MODELS else 4}, "repeated keys are to be read where they are"


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_decoding_is_that_of_the_eager_model(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Tokens and log-probabilities through the artifact, a window in the layers of ModernBERT."""
    check_decoding(drawn(build()), SPEC, tmp_path)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
        (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    ],
)
def test_causal_models_are_refused(model: type[nn.Module], config: type[Any], tmp_path: Path) -> None:
    """By that name, with the line in the library that calls attention, and what to do."""
    with pytest.raises(CaptureError, match="is causal: a token sees all tokens behind and none ahead") as error:
        dllmc.compile(drawn(model(config(**GROUPED))), tmp_path / "artifact", spec=SPEC)
    assert re.search(r"modeling_\w+\.py:\d+, in forward: attn_output, attn_weights = attention_i", str(error.value))
    assert "set is_causal = False" in str(error.value)


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    """RoBERTa's table of 64 serves 62 positions, for it begins at 2."""
    with pytest.raises(CaptureError, match=r"it looks up row 65 of a table of 64 .* max_positions to 62 or less"):
        dllmc.compile(drawn(roberta()), tmp_path / "artifact", spec=dllmc.ModelSpec(VOCAB, MASK, (), max_positions=64))
