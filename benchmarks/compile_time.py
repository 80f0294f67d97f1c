"""How long compiling takes, and in how much memory: a module of LLaDA-8B's shape on the meta device, without weights.

Capture and all passes run, at several depths, each in a process of its own; the growth with depth is given as seconds
a layer between neighbouring depths, which is constant where the time is linear in layers. The plans, of a step on all
rows at once and of one in chunks, are compared with their lower bound.

python -m benchmarks.compile_time
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from dllmc.capture import capture
from dllmc.compiler import CompileOptions
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.passes import pipeline
from dllmc.spec import ModelSpec

# https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct/blob/main/config.json
LLADA_8B = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "weight_tying": False,
}


def measure(layers: int) -> dict[str, Any]:
    """One record, of this process: seconds of capture and of each pass, and the peak of its memory in bytes."""
    with torch.device("meta"):
        model = LLaDAModel(LLaDAConfig.from_dict({**LLADA_8B, "n_layers": layers})).to(torch.bfloat16)
    spec = ModelSpec(vocab_size=126464, mask_id=126336, end_ids=(126081,), max_positions=4096)
    options = CompileOptions(dtype="bfloat16")
    with report.PeakMemory() as memory:
        began = time.perf_counter()
        step = capture(model, spec, options.maxima)
        captured = time.perf_counter()
        log = pipeline.run(step, options.pipeline)
        ended = time.perf_counter()
    assert step.program is not None
    chunked = capture(model, spec, options.maxima)
    passes = options.passes.replace("chunk-activations", "chunk-activations{chunk=256}")
    chunk_log = pipeline.run(chunked, pipeline.parse(passes))
    assert chunked.program is not None
    return {
        "layers": layers,
        "seconds": ended - began,
        "capture_seconds": captured - began,
        "passes": [asdict(entry) for entry in log],
        "peak_bytes": memory.peak,
        "instructions": len(list(step.program.calls())),
        "arena_bytes": step.program.arena_bytes,
        "lower_bound_bytes": step.program.lower_bound_bytes,
        "plan_seconds": log[-1].seconds,
        "chunked": {
            "instructions": len(list(chunked.program.calls())),
            "arena_bytes": chunked.program.arena_bytes,
            "lower_bound_bytes": chunked.program.lower_bound_bytes,
            "plan_seconds": chunk_log[-1].seconds,
        },
    }


@click.command()
@click.option("--layers", "depths", multiple=True, type=int, default=(1, 8, 16, 32, 64, 80), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "compile_time.json")
@click.option("--alone", is_flag=True, help="Measure one depth in this process, and print the record as JSON.")
def main(depths: tuple[int, ...], out: Path, alone: bool) -> None:
    """Measure each depth, print the table, write the JSON."""
    if alone:
        click.echo(json.dumps(measure(depths[0])))
        return
    facts = report.environment()
    records = []
    for layers in sorted(depths):
        command = [sys.executable, "-m", "benchmarks.compile_time", "--alone", "--layers", str(layers)]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        records.append(json.loads(finished.stdout.splitlines()[-1]))
    slopes = [None, *((b["seconds"] - a["seconds"]) / (b["layers"] - a["layers"]) for a, b in pairwise(records))]
    for record, slope in zip(records, slopes, strict=True):
        record["seconds_a_layer"] = slope
    rows = [
        {
            "layers": r["layers"],
            "seconds": f"{r['seconds']:.1f}",
            "capture": f"{r['capture_seconds']:.1f}",
            "passes": f"{r['seconds'] - r['capture_seconds']:.1f}",
            "s a layer": "" if r["seconds_a_layer"] is None else f"{r['seconds_a_layer']:.2f}",
            "peak GiB": f"{r['peak_bytes'] / 2**30:.2f}",
            "instructions": r["instructions"],
            "planning s": f"{r['plan_seconds']:.2f}, {r['chunked']['plan_seconds']:.2f}",
            "of bound": ", ".join(f"{p['arena_bytes'] / p['lower_bound_bytes']:.3f}" for p in (r, r["chunked"])),
        }
        for r in records
    ]
    report.print_table("Capture and all passes, LLaDA-8B's shape without weights", rows, notes=[report.summary(facts)])
    report.write_json(out, {"benchmark": "compile_time", "environment": facts, "config": LLADA_8B, "records": records})


if __name__ == "__main__":
    main()
