"""A from-scratch denoiser with modulated norms compiles as it is."""

from pathlib import Path

import pytest
import torch

import dllmc
from tests.breadth.check import check_decoding, check_logits
from tests.breadth.dit import DiT
from tests.published import drawn

VOCAB, MAX_POSITIONS = 41, 60
SPEC = dllmc.ModelSpec(VOCAB, 0, (), max_positions=MAX_POSITIONS)


@pytest.mark.parametrize("level", [None, 0.3], ids=("learned condition", "constant noise level"))
def test_a_modulated_denoiser(level: float | None, tmp_path: Path) -> None:
    """Eager logits, tokens and log-probabilities, at lengths never traced."""
    model = drawn(DiT(VOCAB, MAX_POSITIONS, level))
    step = check_logits(model, SPEC)
    assert not list(step.calls(torch.ops.aten.cos.default)), "what the constant level makes is a constant"
    check_decoding(model, SPEC, tmp_path)
