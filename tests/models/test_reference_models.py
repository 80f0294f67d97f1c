"""The reference models against golden logits, and against a float64 forward pass written here from the papers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file

from dllmc.models.checkpoint import load_model
from tests.models.folders import GOLDEN

Array = NDArray[np.float64]
Weights = dict[str, Array]

LLADA = {
    "model_type": "llada",
    "d_model": 24,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 40,
    "vocab_size": 33,
    "max_sequence_length": 64,
    "rope_theta": 500.0,
    "weight_tying": False,
}
DREAM = {
    "model_type": "Dream",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 33,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
}
LLADA_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": None, "multi_query_attention": True},
    "tied": {"weight_tying": True},
    "embedding wider than the vocabulary": {"embedding_size": 48},
    "biases": {"include_bias": True},
    "biases, tied": {"include_bias": True, "weight_tying": True},
    "q, k, v biases": {"include_qkv_bias": True},
    "norm biases": {"bias_for_layer_norm": True},
    "biases but not in norms": {"include_bias": True, "bias_for_layer_norm": False},
    "norms without weights": {"layer_norm_with_affine": False},
    "scaled logits": {"scale_logits": True},
    "default feed-forward width": {"mlp_hidden_size": None, "mlp_ratio": 3},
    "coarse epsilon": {"rms_norm_eps": 0.1},
    "several": {
        "n_kv_heads": 2,
        "weight_tying": True,
        "include_bias": True,
        "scale_logits": True,
        "embedding_size": 40,
    },
}
# One transformer, two vocabularies of names: what each layer of `forward` is called in a checkpoint.
LLADA_NAMES = {
    "embed": "model.transformer.wte",
    "block": "model.transformer.blocks.{}.",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "before attention": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "before mlp": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
DREAM_NAMES = {
    "embed": "model.embed_tokens",
    "block": "model.layers.{}.",
    "norm": "model.norm",
    "head": "lm_head",
    "before attention": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "before mlp": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"before attention", "before mlp", "norm"}


def forward(
    w: Weights, names: dict[str, str], ids: NDArray[np.int64], heads: int, layers: int, eps: float, theta: float
) -> Array:
    """Ids [B, T] -> logits [B, T, V] in float64: pre-norm, rotary angles as complex turns, attention without a mask."""

    def norm(x: Array, name: str) -> Array:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return np.asarray(y * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0))

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0))

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)

    def turn(x: Array) -> Array:
        half = size // 2
        angles = np.arange(ids.shape[1])[:, None] * theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate((turned.real, turned.imag), axis=-1)

    x = w[names["embed"] + ".weight"][ids]
    size = x.shape[-1] // heads
    for layer in range(layers):
        at = {key: names["block"].format(layer) + name for key, name in names.items()}
        h = norm(x, at["before attention"])
        q, k, v = turn(split(linear(h, at["q"]))), turn(split(linear(h, at["k"]))), split(linear(h, at["v"]))
        shared = np.arange(heads) * k.shape[1] // heads  # the KV head of each query head
        scores = np.exp(q @ k[:, shared].swapaxes(-1, -2) / np.sqrt(size))
        mixed = scores / scores.sum(-1, keepdims=True) @ v[:, shared]
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), at["o"])
        h = norm(x, at["before mlp"])
        gate = linear(h, at["gate"])
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, at["up"]), at["down"])
    x = norm(x, names["norm"])
    return linear(x, names["head"] if names["head"] + ".weight" in w else names["embed"])


def matrix_sizes(width: int, kv_width: int, feed_forward: int, rows: int, tied: bool) -> dict[str, tuple[int, int]]:
    """[out, in] of every matrix."""
    sizes = {"embed": (rows, width), "q": (width, width), "k": (kv_width, width), "v": (kv_width, width)}
    sizes |= {"o": (width, width), "gate": (feed_forward, width), "up": (feed_forward, width)}
    return sizes | {"down": (width, feed_forward)} | ({} if tied else {"head": (rows, width)})


def random_weights(
    names: dict[str, str], sizes: dict[str, tuple[int, int]], norms: set[str], biased: set[str], layers: int
) -> Weights:
    """Weights by checkpoint name: matrices [out, in] of `sizes`, norm weights for `norms`, biases for `biased`."""
    rng = np.random.default_rng(0)
    width = sizes["embed"][1]
    weights: Weights = {}
    for key in names.keys() - {"block"}:
        outside = key in ("embed", "norm", "head")
        for prefix in [""] if outside else [names["block"].format(layer) for layer in range(layers)]:
            name = prefix + names[key]
            if key in sizes:
                weights[f"{name}.weight"] = rng.normal(size=sizes[key]) / np.sqrt(sizes[key][1])
            if key in norms:
                weights[f"{name}.weight"] = rng.uniform(0.5, 1.5, size=width)
            if key in biased:
                weights[f"{name}.bias"] = rng.normal(size=sizes[key][0] if key in sizes else width)
    return {name: w.astype(np.float32).astype(np.float64) for name, w in weights.items()}


def write(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Write a checkpoint folder in float32."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: w.astype(np.float32) for name, w in weights.items()}, folder / "model.safetensors")


def test_loaded_checkpoints_give_the_golden_logits(name: str) -> None:
    golden = load_file(GOLDEN / name / "logits.safetensors")
    logits = load_model(GOLDEN / name)(golden["input_ids"])
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", LLADA_VARIANTS)
def test_llada_variants_match_a_float64_forward(variant: str, tmp_path: Path) -> None:
    """Every published configuration option changes the computation as LLaDA's definition says."""
    c: dict[str, Any] = {**LLADA, **LLADA_VARIANTS[variant]}
    width, feed_forward = c["d_model"], c["mlp_hidden_size"] or c["d_model"] * c["mlp_ratio"]
    kv_width = width // c["n_heads"] * (c["n_kv_heads"] or 1)
    rows = c.get("embedding_size", c["vocab_size"])
    sizes = matrix_sizes(width, kv_width, feed_forward, rows, tied=c["weight_tying"])
    norms = NORMS if c.get("layer_norm_with_affine", True) else set()
    biased = {"q", "k", "v"} if c.get("include_qkv_bias") else set()
    biased |= sizes.keys() - {"embed"} if c.get("include_bias") else set()
    biased |= norms if c.get("bias_for_layer_norm", c.get("include_bias")) else set()
    weights = random_weights(LLADA_NAMES, sizes, norms, biased, c["n_layers"])
    write(tmp_path, c, weights)
    ids = np.random.default_rng(1).integers(rows, size=(2, 13))

    logits = load_model(tmp_path)(torch.from_numpy(ids)).double().numpy()

    eps = c.get("rms_norm_eps", 1e-5)
    expected = forward(weights, LLADA_NAMES, ids, c["n_heads"], c["n_layers"], eps, c["rope_theta"])
    expected *= width**-0.5 if c.get("scale_logits") else 1.0
    assert logits.shape == (2, 13, rows)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_dream_matches_a_float64_forward(tied: bool, tmp_path: Path) -> None:
    """Grouped-query attention, biases on q, k and v only, and a tied or a separate head."""
    c: dict[str, Any] = {**DREAM, "tie_word_embeddings": tied}
    sizes = matrix_sizes(c["hidden_size"], c["hidden_size"] // 2, c["intermediate_size"], c["vocab_size"], tied)
    weights = random_weights(DREAM_NAMES, sizes, NORMS, {"q", "k", "v"}, c["num_hidden_layers"])
    write(tmp_path, c, weights)
    ids = np.random.default_rng(1).integers(c["vocab_size"], size=(2, 13))

    logits = load_model(tmp_path)(torch.from_numpy(ids)).double().numpy()

    expected = forward(weights, DREAM_NAMES, ids, 4, 2, 1e-6, 500.0)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_default_positions_count_from_zero(name: str) -> None:
    ids = load_file(GOLDEN / name / "logits.safetensors")["input_ids"]
    model = load_model(GOLDEN / name)
    assert torch.equal(model(ids), model(ids, torch.arange(ids.shape[1]).expand_as(ids)))


def test_only_differences_of_positions_matter(name: str) -> None:
    """Rotary positions are relative: moving a whole row, by another distance for each row, moves no logit."""
    golden = load_file(GOLDEN / name / "logits.safetensors")
    positions = torch.arange(golden["input_ids"].shape[1]) + torch.tensor([[7], [150]])
    logits = load_model(GOLDEN / name)(golden["input_ids"], positions)
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


def test_the_order_of_tokens_is_told_by_positions_alone(name: str) -> None:
    """Tokens stored in any order, each with its own position, get the same logits: there is no mask."""
    golden = load_file(GOLDEN / name / "logits.safetensors")
    order = torch.from_numpy(np.random.default_rng(2).permutation(golden["input_ids"].shape[1]))
    logits = load_model(GOLDEN / name)(golden["input_ids"][:, order], order.expand(2, -1))
    torch.testing.assert_close(logits, golden["logits"][:, order], atol=1e-4, rtol=0)
