"""Half precision: the compiled step against the eager module of the same dtype, and against float64."""

import math
from pathlib import Path

import pytest
import torch

import dllmc
from dllmc.errors import ConfigError
from tests.golden.cases import ROOT

MASK = 500
# Rounding of one activation, relative: 8 and 11 bits of significand. Logits here are of the order of 1.
TOLERANCES = {"bfloat16": 2**-8, "float16": 2**-11}


@pytest.mark.parametrize("folder", ["llada-mha", "dream-gqa"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_predictions_of_one_step(dtype: str, folder: str, tmp_path: Path) -> None:
    """Log-probabilities are as close to float64's as eager ones, up to a few roundings; weights take half the bytes."""
    artifact = dllmc.compile(ROOT / folder, tmp_path / "out", dllmc.CompileOptions(512, dtype=dtype))
    prompt = [(37 * i) % 499 for i in range(20)]
    params = dllmc.SamplingParams(gen_length=16, block_length=16, steps=1, ignore_eos=True, logprobs=True)
    [result] = dllmc.load(artifact.path).generate(prompt, params)

    model = dllmc.load_model(ROOT / folder).double()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + [MASK] * 16]))[0]
    rows = logits[19:35] if folder == "dream-gqa" else logits[20:36]
    exact = rows.log_softmax(-1).gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    assert (exact - torch.tensor(result.logprobs)).abs().max() < 32 * TOLERANCES[dtype]
    best = rows.log_softmax(-1).max(-1).values
    assert (best - exact).max() < 32 * TOLERANCES[dtype]  # what was chosen is, up to rounding, the best

    weights = sum(p.numel() for p in model.parameters())
    assert 2 * weights <= artifact.memory["weights"] < 2.1 * weights


@pytest.mark.parametrize("dtype", ["float32", *TOLERANCES])
def test_linears_have_a_workspace(dtype: str, tmp_path: Path) -> None:
    """Enough for the largest step on a CPU that has to widen them; in float32 what the product of few rows needs."""
    dllmc.compile(ROOT / "llada-mha", tmp_path / "out", dllmc.CompileOptions(512, dtype=dtype))
    program = dllmc.load(tmp_path / "out").artifact.programs["dense"]
    linears = [instruction for instruction in program.instructions if instruction.op == "aten.linear.default"]
    assert linears
    for instruction in linears:
        rows = min(1024, math.prod(dim.at(program.maxima) for dim in instruction.outputs[0].shape[:-1]))
        columns, width = (dim.at(program.maxima) for dim in list(instruction.reads())[1].shape)
        if dtype == "float32":
            assert program.buffers[instruction.workspace].size_bytes(program.maxima) == 4 * min(rows, 32) * columns
        else:
            assert program.buffers[instruction.workspace].size_bytes(program.maxima) >= 4 * (rows + columns) * width


def test_unknown_dtype() -> None:
    """The error lists the choices."""
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        dllmc.CompileOptions(dtype="int8")
