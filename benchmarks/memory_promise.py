"""Whether an engine keeps to its plan: the resident memory of a process that decodes many different requests.

A small model is compiled for steps so large that its arena is a gigabyte and more. In a process of its own it is loaded
and decodes requests of many lengths, schedules, confidences and ways to sample. Promised is that all the memory which
the process gains, at its peak, over what it had before loading is weights + arena + state, 3 % of arena + state, and
64 MiB. Nothing is warmed up: libraries' code and tables that come on first use count too.

python -m benchmarks.memory_promise
"""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

import dllmc
from benchmarks import report
from benchmarks.decode_cpu import in_fresh_process
from dllmc.models.llada import LLaDAConfig, LLaDAModel

SEED = 0
SHARE = 0.03
"""Of arena + state."""
FIXED_BYTES = 64 << 20

# One of them a request, in turn: every path through the head, and every schedule.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 1e-4},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 1024, "top_p": 0.95, "logprobs": True},
    {"cfg_scale": 1.5},
    {"cfg_scale": 0.5, "temperature": 0.5, "top_p": 0.8},
    {"remasking": "topk_margin", "suppress_tokens": (1, 2, 3)},
    {"remasking": "entropy", "temperature": 0.4},
    {"remasking": "random", "defer_tokens": (5,)},
    {"schedule": "timestep", "remasking": "entropy"},
)


@dataclass(frozen=True)
class Setting:
    """The model, in LLaDA's layout with random weights, the largest step, and the requests. `longest`: in tokens."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    longest: int
    tokens: int
    rows: int
    segments: int
    requests: int


def mixed(setting: Setting) -> Iterator[tuple[list[int], dllmc.SamplingParams]]:
    """Prompts and how to continue them, the same at every call."""
    draw = random.Random(SEED)
    for number in range(setting.requests):
        kind = KINDS[number % len(KINDS)]
        block = draw.choice((8, 16, 32, 64))
        gen = min(block * draw.randint(1, 2), setting.longest // 2)
        prompt = draw.randint(1, setting.longest - gen)
        blocks = -(-gen // block)
        steps = None if "threshold" in kind else blocks * draw.randint(1, 4)
        params = dllmc.SamplingParams(
            gen_length=gen, block_length=block, steps=steps, seed=number, ignore_eos=True, **kind
        )
        yield [draw.randrange(10, setting.vocab) for _ in range(prompt)], params


def prepare(setting: Setting, folder: Path) -> None:
    """Write the artifact."""
    s = setting
    torch.manual_seed(SEED)
    widths = {"d_model": s.hidden, "mlp_hidden_size": s.mlp, "vocab_size": s.vocab, "max_sequence_length": s.longest}
    fields = {"n_heads": s.heads, "n_layers": s.layers, "rope": True, "weight_tying": True}
    options = dllmc.CompileOptions(max_tokens_per_step=s.tokens, max_requests=s.segments, max_logit_rows=s.rows)
    spec = dllmc.ModelSpec(s.vocab, mask_id=0, end_ids=(1,), max_positions=s.longest)
    dllmc.compile(LLaDAModel(LLaDAConfig.from_dict({**fields, **widths})), folder, options, spec)


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Load and decode, in this process, which is to have done nothing before."""
    prompts, params = zip(*mixed(setting), strict=True)
    with report.PeakMemory() as loading:
        engine = dllmc.load(folder)
        for weight in engine.memory.weights.values():  # mapped from files: read every page
            weight.flatten()[:: 4096 // weight.element_size()].sum()
    with report.PeakMemory() as decoding:
        engine.generate(list(prompts), list(params))
    memory = engine.artifact.memory
    planned = memory["arena"] + memory["state"]
    return {
        "memory": memory,
        "grown_bytes": max(loading.peak, decoding.peak) - loading.start - memory["weights"],
        "promised_bytes": int((1 + SHARE) * planned) + FIXED_BYTES,
        "planned_bytes": planned,
        "grown_after_load_bytes": decoding.peak - decoding.start,
        "peak_by": decoding.by,
        "steps": engine.steps,
        "shapes": sum(len(executor._bindings) for executor in engine._executors.values()),
    }


@click.command()
@click.option("--vocab", default=32768, show_default=True)
@click.option("--hidden", default=64, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--mlp", default=8192, show_default=True, help="So wide that activations are large and work is little.")
@click.option("--longest", default=2048, show_default=True, help="Tokens of the longest request.")
@click.option("--tokens", default=16384, show_default=True, help="Of the largest step.")
@click.option("--rows", default=1024, show_default=True, help="Of the largest step.")
@click.option("--segments", default=64, show_default=True, help="Of the largest step.")
@click.option("--requests", default=200, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "memory_promise.json")
def main(out: Path, **sizes: int) -> None:
    """Measure, print, and fail where the promise is broken; the defaults take some minutes on 2 cores."""
    facts, setting = report.environment(), Setting(**sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "artifact"
        in_fresh_process("compiling", prepare, setting, folder)
        record = in_fresh_process("decoding", measure, setting, folder)
    mib = {key: f"{value / 2**20:.1f}" for key, value in record.items() if key.endswith("_bytes")}
    row = {
        "requests": setting.requests,
        "steps": record["steps"],
        "arena + state MiB": mib["planned_bytes"],
        "promised MiB": mib["promised_bytes"],
        "grown MiB": mib["grown_bytes"],
        "of which after load": mib["grown_after_load_bytes"],
    }
    notes = [
        "grown: peak of resident memory, less that before loading and less the weights; "
        f"promised: arena + state, {SHARE:.0%} and {FIXED_BYTES >> 20} MiB",
        report.summary(facts),
    ]
    report.print_table("Resident memory of decoding many different requests, float32 on CPU", [row], notes)
    if record["grown_bytes"] > record["promised_bytes"]:
        raise click.ClickException("the process grew by more than is promised; nothing written")
    report.write_json(out, {"environment": facts, "setting": asdict(setting), "result": record})


if __name__ == "__main__":
    main()
