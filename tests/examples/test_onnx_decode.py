"""`examples/onnx_decode.py`: an export is decoded without torch and without dllmc, as the engine decodes it."""

import subprocess
import sys
from pathlib import Path

import pytest

import dllmc
from dllmc import artifact
from dllmc.export.onnx import export

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_decode.py"
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "dllmc", "onnx", "transformers")))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(tiny_llada: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(artifact.read(tiny_llada), tmp_path_factory.mktemp("onnx") / "out").path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("prompt", "gen_length", "block_length", "steps"),
    [("sudoku:\n1040\n3401\n0004\n4012\n", 20, 20, 20), ("add:12+29=", 8, 4, 4), ("add:7+5=", 12, 6, 4)],
)
def test_it_prints_what_the_engine_says(
    prompt: str, gen_length: int, block_length: int, steps: int, cached: bool, exported: Path, tiny_llada: Path
) -> None:
    params = dllmc.SamplingParams(gen_length=gen_length, block_length=block_length, steps=steps, ignore_eos=True)
    [wanted] = dllmc.load(tiny_llada).generate(prompt, params, dllmc.CachePolicy() if cached else None)
    options = ["--gen-length", str(gen_length), "--block-length", str(block_length), "--steps", str(steps)]
    command = [sys.executable, "-c", WITHOUT, str(EXAMPLE), str(exported), prompt, *options, *["--cached"] * cached]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    end = min((wanted.token_ids.index(0) for _ in [0] if 0 in wanted.token_ids), default=len(wanted.token_ids))
    engine = dllmc.load(tiny_llada)
    assert engine.tokenizer is not None
    assert done.stdout == engine.tokenizer.decode(wanted.token_ids[:end]) + "\n"
