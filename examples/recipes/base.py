"""What a training run needs to know of its checkpoint."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

END, MASK = 0, 1


@dataclass(frozen=True)
class Batch:
    """inputs [B, T] int64; masked [B, T] bool, n of them; targets [n] int64; weights [n] float32 of their losses."""

    inputs: Tensor
    masked: Tensor
    targets: Tensor
    weights: Tensor


class Recipe(Protocol):
    config: dict[str, Any]
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    steps: int
    report_every: int

    def batches_at(self, seed: int, step: int, steps: int) -> list[Batch]:
        """The batches of one optimizer step; their losses are added."""

    def figures(self, model: nn.Module, final: bool) -> dict[str, Any]:
        """What the model achieves on held-out data: all of it at the end, a sample before."""


def config(vocab: int, layers: int, positions: int, tied: bool, dtype: str) -> dict[str, Any]:
    """LLaDA's config.json for a model of width 192 and six heads."""
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": 192,
        "n_heads": 6,
        "n_kv_heads": 6,
        "n_layers": layers,
        "mlp_hidden_size": 512,
        "activation_type": "silu",
        "block_type": "llama",
        "rope": True,
        "rope_theta": 10000.0,
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "weight_tying": tied,
        "include_bias": False,
        "max_sequence_length": positions,
        "vocab_size": vocab,
        "embedding_size": vocab,
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": END,
        "torch_dtype": dtype,
    }


def tokenizer_config(special: list[str]) -> dict[str, Any]:
    """tokenizer_config.json for tokens in the order end, mask[, unknown]."""
    names = dict(zip(("eos_token", "mask_token", "unk_token"), special, strict=False))
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}


def masked_batch(clean: Tensor, masked: Tensor, weights: Tensor) -> Batch:
    """From tokens [B, T], the positions to mask [B, T] bool, and a weight for each position [B, T]."""
    return Batch(torch.where(masked, MASK, clean), masked, clean[masked], weights[masked])
