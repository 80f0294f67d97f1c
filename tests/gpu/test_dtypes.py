"""Half precision: what a Refresh and a Reuse predict, against float32 with the same, rounded weights."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import dllmc
from tests.golden.cases import FOLDERS, ROOT, load_model
from tests.gpu.engines import DEVICES, SMALL, engine_on
from tests.test_dtypes import TOLERANCES

GEN = 16


def logprobs_of(engine: dllmc.Engine, policy: dllmc.CachePolicy) -> np.ndarray:
    """Of the same tokens in the same order in every dtype, so that no rounding leads to another context."""
    truth = [(29 * i + 3) % 480 for i in range(GEN)]
    params = dllmc.SamplingParams(
        gen_length=GEN, block_length=GEN, steps=2, remasking="random", ignore_eos=True, logprobs=True
    )
    prompts = [dllmc.Prompt([(37 * i + n) % 480 for i in range(5 + 9 * n)], reference=truth) for n in range(6)]
    return np.array([result.logprobs for result in engine.generate(prompts, params, policy)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_predictions_are_those_of_float32(folder: str, dtype: str, device: str, tmp_path: Path) -> None:
    """Up to a few roundings of activations, dense and from what is cached; and sampled decoding comes to an end."""
    model, spec = load_model(folder)
    rounded = copy.deepcopy(model).to(getattr(torch, dtype)).float()
    engine = engine_on(device, ROOT / folder, tmp_path / "half", **SMALL, dtype=dtype)
    exact = engine_on(device, rounded, tmp_path / "float32", **SMALL, spec=spec)
    for policy in (dllmc.CachePolicy(mode="none"), dllmc.CachePolicy()):
        found, expected = (logprobs_of(each, policy) for each in (engine, exact))
        np.testing.assert_allclose(found, expected, atol=32 * TOLERANCES[dtype], rtol=4 * TOLERANCES[dtype])
    for policy in (dllmc.CachePolicy(mode="none"), dllmc.CachePolicy(retention=0.5, delay=1)):
        params = dllmc.SamplingParams(gen_length=12, block_length=6, temperature=0.7, ignore_eos=True)
        results = engine.generate([[1, 2, 3], [4, 5]], params, policy)
        assert [len(result.token_ids) for result in results] == [12, 12]
