"""A small model for exports: two layers, random weights, compiled with caches."""

from pathlib import Path

import torch

import dllmc
from dllmc.artifact import Artifact
from dllmc.models.llada import LLaDAConfig, LLaDAModel

VOCAB = 300


def compiled(out: Path, **options: int) -> Artifact:
    """LLaDA's layout, 40 wide, with steps of up to 96 tokens, 3 segments and 16 rows."""
    torch.manual_seed(0)
    widths = {"d_model": 40, "mlp_hidden_size": 72, "vocab_size": VOCAB, "max_sequence_length": 64}
    config = LLaDAConfig.from_dict({**widths, "n_heads": 2, "n_layers": 2, "rope": True, "weight_tying": False})
    limits = {"max_tokens_per_step": 96, "max_requests": 3, "max_logit_rows": 16, **options}
    spec = dllmc.ModelSpec(VOCAB, mask_id=0, end_ids=(1,), max_positions=64)
    return dllmc.compile(LLaDAModel(config), out, dllmc.CompileOptions(**limits), spec)
