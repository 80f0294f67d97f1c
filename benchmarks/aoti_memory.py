"""Whether an AOTInductor package keeps to the plan of the program that it is of: its peak memory, and its speed.

A small model is compiled and exported. One step, as large as it was planned for, then runs in several ways, each in a
process of its own: by the engine's executor, by the package, and in eager torch, call by call of the exported graph.
Counted is what resident memory grows by from before the step to its peak, after a first small step has loaded all code
and the weights; of the executor, whose arena is there before, the arena too.

python -m benchmarks.aoti_memory
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch

import dllmc
from benchmarks import report
from benchmarks.decode_cpu import in_fresh_process
from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.export import aoti
from dllmc.export.torch_step import TorchStep
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.runtime.arena import Memory
from dllmc.runtime.batch import Batch, compose
from dllmc.runtime.executor import Executor
from dllmc.runtime.request import RequestState
from dllmc.runtime.table import Table

SEED = 0
PHASES = ("dense", "refresh")
# By what a step is run, and what glibc is told: left alone, it keeps freed buffers of up to 32 MiB, in pieces.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
WAYS: Mapping[str, Mapping[str, str]] = {
    "executor": MAPPED,
    "package": MAPPED,
    "package, glibc left alone": {},
    "eager": MAPPED,
}
SMALL = 64
"""Tokens of each request of the first step."""
ALLOWED = 1.10
"""Of the plan's bytes, for the package."""

Run = Callable[[Batch], object]


@dataclass(frozen=True)
class Setting:
    """The model, in LLaDA's layout with random weights, and the step: requests of so many tokens each."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    requests: int
    tokens: int
    block: int
    repeats: int


def prepare(setting: Setting, folder: Path) -> None:
    """Write the artifact and its export."""
    s = setting
    torch.manual_seed(SEED)
    widths = {"d_model": s.hidden, "mlp_hidden_size": s.mlp, "vocab_size": s.vocab, "max_sequence_length": s.tokens}
    fields = {"n_heads": s.heads, "n_layers": s.layers, "rope": True, "weight_tying": True}
    options = dllmc.CompileOptions(
        max_tokens_per_step=s.requests * s.tokens, max_requests=s.requests, max_logit_rows=s.requests * s.block
    )
    spec = dllmc.ModelSpec(s.vocab, mask_id=0, end_ids=(1,), max_positions=s.tokens)
    written = dllmc.compile(LLaDAModel(LLaDAConfig.from_dict({**fields, **widths})), folder / "artifact", options, spec)
    aoti.export(written, folder / "export", programs=PHASES)


def step(loaded: Artifact, setting: Setting, phase: str, tokens: int) -> Batch:
    """The first step of as many requests of so many tokens, which end in a masked block."""
    program = loaded.program
    width = program.inputs["page_table"].shape[1].constant
    table = Table(setting.requests, tokens, width)
    policy = dllmc.CachePolicy(mode="none") if phase == "dense" else dllmc.CachePolicy(retention=0.5)
    params = dllmc.SamplingParams(gen_length=setting.block, block_length=setting.block)
    pages = -(-tokens // program.page_tokens)
    for row in range(setting.requests):
        prompt = [10 + (row + at) % 100 for at in range(tokens - setting.block)]
        RequestState(prompt, params, loaded.spec, cache=policy).move(table, row)
        table.page_table[row, 0, :pages] = np.arange(row * pages, (row + 1) * pages) % program.maxima["pages"]
    batch = compose(table, np.arange(setting.requests), program.maxima["rows"], loaded.spec.mask_id, has_cache=True)
    assert batch.phase == phase
    return batch


def runner(way: str, phase: str, folder: Path) -> tuple[Artifact, Run, int]:
    """How to run a step, and the bytes planned for it that are allocated already."""
    loaded = artifact.read(folder / "artifact")
    program = loaded.programs[phase]
    if way.startswith("package"):
        opened = aoti.load(folder / "export", trust=True)
        return loaded, lambda batch: opened.steps[phase].run(batch.sizes, batch.inputs), 0
    weights = loaded.load_weights()
    if way == "executor":
        executor = Executor(program, Memory([program], weights))
        return loaded, lambda batch: executor.run(batch.sizes, batch.inputs), program.arena_bytes or 0
    module = TorchStep(program, weights)
    caches = {
        name: torch.zeros([dim.at(program.maxima) for dim in spec.shape]) for name, spec in program.caches.items()
    }

    @torch.inference_mode()
    def eager(batch: Batch) -> object:
        inputs: Mapping[str, Any] = {name: torch.from_numpy(batch.inputs[name]) for name in program.inputs}
        return module(inputs, caches)

    return loaded, eager, 0


def measure(setting: Setting, folder: Path, way: str, phase: str) -> dict[str, float]:
    """Bytes that a largest step takes, and the seconds of the fastest; in this process, which is to be fresh."""
    loaded, run, before = runner(way, phase, folder)
    largest = step(loaded, setting, phase, setting.tokens)
    run(step(loaded, setting, phase, SMALL))
    with report.PeakMemory() as memory:
        seconds = []
        for _ in range(setting.repeats):
            start = time.perf_counter()
            run(largest)
            seconds.append(time.perf_counter() - start)
    return {"bytes": memory.peak - memory.start + before, "seconds": min(seconds)}


def told(environment: Mapping[str, str], *args: Any) -> dict[str, float]:
    """`measure` in a process with this environment."""
    with mock.patch.dict(os.environ, environment):
        return in_fresh_process("measuring", measure, *args)


@click.command()
@click.option("--vocab", default=32768, show_default=True)
@click.option("--hidden", default=512, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--mlp", default=1536, show_default=True)
@click.option("--requests", default=8, show_default=True)
@click.option("--tokens", default=1024, show_default=True, help="Of each request.")
@click.option("--block", default=32, show_default=True, help="Masked tokens of each request.")
@click.option("--repeats", default=3, show_default=True, help="Largest steps; the fastest counts.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "aoti_memory.json")
def main(out: Path, **sizes: int) -> None:
    """Measure, print, and fail where a package takes more than it may; some minutes on 2 cores."""
    facts, setting = report.environment(), Setting(**sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fresh_process("compiling and exporting", prepare, setting, folder)
        programs = artifact.read(folder / "artifact").programs
        result = {
            phase: {
                "plan_bytes": programs[phase].arena_bytes,
                **{way: told(environment, setting, folder, way, phase) for way, environment in WAYS.items()},
            }
            for phase in PHASES
        }
    rows = [
        {
            "step": phase,
            "run by": way,
            "plan MiB": f"{found['plan_bytes'] / 2**20:.1f}",
            "taken MiB": f"{found[way]['bytes'] / 2**20:.1f}",
            "of the plan": f"{found[way]['bytes'] / found['plan_bytes']:.2f}",
            "s": f"{found[way]['seconds']:.2f}",
        }
        for phase, found in result.items()
        for way in WAYS
    ]
    report.print_table("Peak memory of a step beside weights and caches, float32 on CPU", rows, [report.summary(facts)])
    over = [p for p, found in result.items() if found["package"]["bytes"] > ALLOWED * found["plan_bytes"]]
    if over:
        raise click.ClickException(f"the packages of {', '.join(over)} take more than the plan allows; nothing written")
    report.write_json(out, {"environment": facts, "setting": asdict(setting), "result": result})


if __name__ == "__main__":
    main()
