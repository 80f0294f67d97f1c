"""The promise on a GPU: what is allocated is what was planned, all of it at load, and nothing in any step after."""

from pathlib import Path

import pytest
import torch

import dllmc
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from tests.golden.cases import FOLDERS, ROOT
from tests.gpu.engines import SMALL, engine_on, requests

pytestmark = pytest.mark.gpu


def test_no_step_allocates(tmp_path: Path) -> None:
    """Of 200 mixed steps that have all come before, each makes no allocation of torch's at all."""
    engine = engine_on("cuda", ROOT / FOLDERS[0], tmp_path / "out", **SMALL)
    prompts, params, policies = requests(48)
    for _ in range(3):
        engine.generate(prompts, params, policies)
    counts = []
    engine_steps = engine.steps
    while engine.steps < engine_steps + 200:
        engine.generate(
            prompts,
            params,
            policies,
            on_step=lambda _: counts.append(torch.cuda.memory_stats()["allocation.all.allocated"]),
        )
    assert len(set(counts)) == 1


def large_model() -> tuple[LLaDAModel, dllmc.ModelSpec]:
    """Four layers 2048 wide, in bfloat16, with random weights."""
    torch.manual_seed(0)
    fields = {"d_model": 2048, "n_heads": 16, "n_layers": 4, "mlp_hidden_size": 8192, "max_sequence_length": 4096}
    config = LLaDAConfig.from_dict({**fields, "vocab_size": 32768, "weight_tying": True, "rope": True})
    with torch.no_grad():
        model = LLaDAModel(config).bfloat16()
    return model, dllmc.ModelSpec(32768, 0, (1,), max_positions=4096)


def test_what_is_allocated_is_what_was_planned(tmp_path: Path) -> None:
    """At most 2 % more than the total, at the peak of loading and of decoding, in steps as large as may be."""
    model, spec = large_model()
    options = dllmc.CompileOptions(max_tokens_per_step=65536, max_requests=32, device="cuda")
    path = dllmc.compile(model, tmp_path / "out", options, spec).path
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = dllmc.load(path)
    total = engine.artifact.memory["total"]
    assert total > 3 << 30
    assert total <= torch.cuda.max_memory_allocated() - before <= 1.02 * total
    params = dllmc.SamplingParams(gen_length=64, block_length=32, steps=4, ignore_eos=True)
    prompts = [[10 + (7 * i + j) % 30000 for j in range(3000)] for i in range(32)]
    for policy in (dllmc.CachePolicy(mode="none"), dllmc.CachePolicy(retention=0.5)):
        for _ in range(3):
            engine.generate(prompts, params, policy)
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * total


def test_loading_holds_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Parts of a checkpoint's tensors are joined on their way to the GPU."""
    options = dllmc.CompileOptions(**SMALL, device="cuda", dtype="bfloat16", link_weights=True)
    loaded = dllmc.compile(ROOT / FOLDERS[0], tmp_path / "out", options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = loaded.load_weights("cuda")
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before == held
    assert held <= sum(weight.nbytes for weight in weights.values()) + 512 * len(weights)
