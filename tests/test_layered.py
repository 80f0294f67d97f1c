"""The float64 twins compute what the reference models do, and what the golden files say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tests.golden.cases import FOLDERS, ROOT, load_model
from tests.layered import Array, attention, layered
from tests.strategies import MAX_POSITIONS, TinyModel, build, models


def attend_to_all(layer: int, q: Array, k: Array, v: Array) -> Array:
    return attention(q, k, v)


@pytest.mark.parametrize("folder", FOLDERS)
def test_twins_give_the_golden_logits(folder: str) -> None:
    """As published implementations do: within 1e-4."""
    golden = load_file(ROOT / folder / "logits.safetensors")
    twin = layered(load_model(folder)[0])
    for ids, logits in zip(golden["input_ids"].tolist(), golden["logits"].numpy(), strict=True):
        np.testing.assert_allclose(twin(ids, range(len(ids)), attend_to_all), logits, atol=1e-4, rtol=0)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(models(), st.data())
def test_twins_give_the_modules_logits_at_any_positions(tiny: TinyModel, data: st.DataObject) -> None:
    """GQA, ties, biases, norms without weights, scaled logits; errors are those of the module's float32."""
    tokens = st.integers(0, tiny.spec.vocab_size - 1)
    ids = data.draw(st.lists(tokens, min_size=1, max_size=20))
    position = st.integers(0, MAX_POSITIONS - 1)
    positions = data.draw(st.lists(position, min_size=len(ids), max_size=len(ids), unique=True))
    model = build(tiny)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), torch.tensor([positions]))[0]
    np.testing.assert_allclose(layered(model)(ids, positions, attend_to_all), expected.numpy(), atol=2e-4, rtol=1e-4)


def test_a_module_of_another_family_has_no_twin() -> None:
    """It is named."""
    with pytest.raises(TypeError, match="found Linear"):
        layered(nn.Linear(2, 2))
