"""Hypothesis strategies for tiny random models and for requests that are valid for them.

Weights are drawn by a seed at scales that make logits differ between tokens and between positions without
saturating the softmax, so that few examples are decided by rounding (`Decoded.decisive`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from dllmc.models.dream import DreamConfig, DreamModel
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.spec import ModelSpec

MAX_PROMPT, MAX_GEN, MAX_POSITIONS = 12, 20, 64


@dataclass(frozen=True)
class TinyModel:
    """A model configuration, what decoding needs of it, and the seed of its weights."""

    config: LLaDAConfig | DreamConfig
    spec: ModelSpec
    seed: int


@dataclass(frozen=True)
class Request:
    """A prompt, SamplingParams' arguments, tokens fixed in the generation region, those forced on it, CachePolicy's."""

    prompt_ids: list[int]
    params: dict[str, Any]
    infill: dict[int, int]
    reference: list[int] | None
    cache: dict[str, Any]


def build(tiny: TinyModel) -> nn.Module:
    """The model with its weights drawn: float32, in evaluation mode."""
    model = LLaDAModel(tiny.config) if isinstance(tiny.config, LLaDAConfig) else DreamModel(tiny.config)
    generator = torch.Generator().manual_seed(tiny.seed)
    scales_logits = isinstance(tiny.config, LLaDAConfig) and tiny.config.scale_logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = _distribution(name, parameter, scales_logits)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _distribution(name: str, parameter: nn.Parameter, scales_logits: bool) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's entries; `scales_logits`: the model divides them by sqrt(width)."""
    if parameter.ndim == 1:
        return (1.0, 0.2) if "norm" in name or "ln_f" in name else (0.0, 0.3)
    fan_in = parameter.shape[1]
    if any(part in name for part in ("wte", "embed_tokens", "lm_head", "transformer.ff_out")):
        return 0.0, 2.0 if scales_logits else 2.0 / math.sqrt(fan_in)  # logits of spread 2
    if any(part in name for part in ("q_proj", "k_proj")):
        return 0.0, 3.0 / math.sqrt(fan_in)  # attention that differs between positions
    return 0.0, 3.0 / math.sqrt(fan_in)


@st.composite
def models(draw: st.DrawFn) -> TinyModel:
    """LLaDA (MHA or GQA, tied or separate head, wider embedding, biases) or Dream (GQA, biases on q, k, v)."""
    vocab_size = draw(st.integers(11, 60))
    mask_id, *end_ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=2, max_size=3, unique=True))
    config = draw(st.one_of(llada_configs(vocab_size), dream_configs(vocab_size)))
    width = vocab_size if isinstance(config, DreamConfig) else config.embedding_size
    spec = ModelSpec(width, mask_id, tuple(end_ids), isinstance(config, DreamConfig), MAX_POSITIONS)
    return TinyModel(config, spec, draw(st.integers(0, 2**32 - 1)))


@st.composite
def llada_configs(draw: st.DrawFn, vocab_size: int) -> LLaDAConfig:
    """Configurations of LLaDA: width 16 to 32, one or two layers."""
    heads = draw(st.sampled_from((2, 4)))
    return LLaDAConfig(
        d_model=draw(st.sampled_from((16, 24, 32))),
        n_heads=heads,
        n_kv_heads=heads // draw(st.sampled_from((1, 2))),
        n_layers=draw(st.integers(1, 2)),
        mlp_hidden_size=draw(st.integers(8, 48)),
        vocab_size=vocab_size,
        embedding_size=vocab_size + draw(st.integers(0, 5)),
        max_sequence_length=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_theta=draw(st.sampled_from((10000.0, 500000.0))),
        weight_tying=draw(st.booleans()),
        include_bias=draw(st.booleans()),
        include_qkv_bias=draw(st.booleans()),
        norm_affine=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        scale_logits=draw(st.booleans()),
    )


@st.composite
def dream_configs(draw: st.DrawFn, vocab_size: int) -> DreamConfig:
    """Configurations of Dream: width 16 to 32, one or two layers."""
    heads = draw(st.sampled_from((2, 4)))
    return DreamConfig(
        hidden_size=draw(st.sampled_from((16, 24, 32))),
        intermediate_size=draw(st.integers(8, 48)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=heads // draw(st.sampled_from((1, 2))),
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_theta=draw(st.sampled_from((10000.0, 1000000.0))),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn, spec: ModelSpec) -> Request:
    """A prompt, parameters that are valid together, a cache policy, now and then infilled tokens or a reference."""
    params = draw(sampling_params(spec))
    infill = draw(st.one_of(st.just({}), infills(spec, params["gen_length"])))
    length = params["gen_length"]
    forced = st.lists(st.integers(0, spec.vocab_size - 1), min_size=length, max_size=length)
    reference = draw(forced) if draw(st.integers(0, 3)) == 0 else None
    return Request(draw(prompts(spec)), params, infill, reference, draw(cache_policies()))


def prompts(spec: ModelSpec) -> st.SearchStrategy[list[int]]:
    """Token ids of a prompt; the mask token may be among them."""
    return st.lists(st.integers(0, spec.vocab_size - 1), min_size=1, max_size=MAX_PROMPT)


def infills(spec: ModelSpec, gen_length: int) -> st.SearchStrategy[dict[int, int]]:
    """Tokens fixed at some, or all, offsets of the generation region."""
    return st.dictionaries(st.integers(0, gen_length - 1), st.integers(0, spec.vocab_size - 1), max_size=gen_length)


@st.composite
def sampling_params(draw: st.DrawFn, spec: ModelSpec) -> dict[str, Any]:
    """SamplingParams' arguments: steps that split evenly over the blocks, or a threshold, or neither."""
    gen_length = draw(st.integers(1, MAX_GEN))
    block_length = draw(st.integers(1, gen_length))
    blocks = math.ceil(gen_length / block_length)
    pace = draw(
        st.one_of(
            st.just({}),
            st.fixed_dictionaries(
                {
                    "steps": st.integers(1, block_length + 2).map(lambda per_block: per_block * blocks),
                    "schedule": st.sampled_from(("uniform", "timestep")),
                }
            ),
            st.fixed_dictionaries({"threshold": st.integers(1, 19).map(lambda n: n / 20)}),
        )
    )
    few_tokens = st.lists(st.integers(0, spec.vocab_size - 1), max_size=3, unique=True).map(tuple)
    rest = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from((0.0, 0.0, 0.3, 0.7, 1.0, 2.0)),
            "top_k": st.none() | st.integers(1, spec.vocab_size),
            "top_p": st.none() | st.integers(1, 20).map(lambda n: n / 20),
            "remasking": st.sampled_from(("low_confidence", "topk_margin", "entropy", "random")),
            "cfg_scale": st.sampled_from((0.0, 0.0, 0.5, 1.5)),
            "seed": st.integers(0, 2**63 - 1),
            "ignore_eos": st.booleans(),
            "stop_token_ids": few_tokens,
            "suppress_tokens": few_tokens,
            "defer_tokens": few_tokens,
        }
    )
    params = {"gen_length": gen_length, "block_length": block_length, **pace, **draw(rest)}
    if "threshold" in params and params["remasking"] == "entropy":  # its confidences are negative
        params["threshold"] = math.log(params["threshold"])
    return params


@st.composite
def cache_policies(draw: st.DrawFn) -> dict[str, Any]:
    """CachePolicy's arguments: dense now and then, else any schedule, and selections from a single key to all.

    Short delays and long intervals are the rule, for blocks are short and steps of Reuse are what is to be seen.
    """
    if draw(st.sampled_from(("block", "block", "block", "block", "block", "none"))) == "none":
        return {"mode": "none"}
    return {
        "mode": "block",
        "retention": draw(st.sampled_from((0.5, 0.3, 0.25, 0.7, 0.1, 0.9, 1e-6, 1.0))),
        "selection": draw(st.sampled_from(("per_head", "shared"))),
        "pool": draw(st.sampled_from((1, 3, 5, 7))),
        "delay": draw(st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3))),
        "refresh_interval": draw(st.sampled_from((None, None, None, 1, 2, 3, 4))),
    }
