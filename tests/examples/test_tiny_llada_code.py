"""The bundled language model of Python source predicts modules that it never saw, as its figures say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dllmc
from dllmc.evaluate import evaluate
from dllmc.runtime.tokenizer import load_tokenizer
from dllmc.tasks.python_source import gaps

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-llada-code"
FIGURES = json.loads((FOLDER / "training.json").read_text())
N_GRAM = FIGURES["kneser_ney_5_gram_nll"]


def test_fits_and_beats_the_n_gram_model() -> None:
    """At most 8 MB, and a nat below a 5-gram model of the same modules."""
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert FIGURES["masked_nll"] <= N_GRAM - 1.0
    assert FIGURES["window"] >= 768


def test_masked_tokens_of_held_out_modules() -> None:
    """15 % of other positions than those of the figures, in windows of 768 tokens, by the eager model."""
    tokenizer, model, spec = load_tokenizer(FOLDER), dllmc.load_model(FOLDER), dllmc.load_spec(FOLDER)
    assert tokenizer is not None
    windows = [gap.window for gap in gaps(tokenizer.encode, spec.end_ids[0], count=16, seed=77, window=768, length=32)]
    clean = torch.tensor(windows)
    masked = torch.from_numpy(np.random.default_rng(77).random(clean.shape) < 0.15)
    with torch.inference_mode():
        logits = model(torch.where(masked, spec.mask_id, clean))[masked]
    assert F.cross_entropy(logits, clean[masked]).item() <= FIGURES["masked_nll"] + 0.35 <= N_GRAM


def test_digits_are_tokens_of_their_own() -> None:
    """As numbers must not be words, and nothing is lost on the way to tokens and back."""
    tokenizer = load_tokenizer(FOLDER)
    assert tokenizer is not None
    text = "def f(x1):\n    return x1 * 4096 + 17  # ü\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("409617")) == 6


@pytest.mark.parametrize("count", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_infills_through_its_artifact(count: int, tiny_llada_code: Path) -> None:
    """A sample of gaps of 32 tokens: fewer nats a token than the n-gram model needs, which knows all tokens before."""
    report = evaluate(dllmc.load(tiny_llada_code), "code", count=count, seed=11)
    assert report.forward_passes == count * 32
    assert report.accuracy > 0
    assert report.nll is not None
    assert report.nll <= N_GRAM
