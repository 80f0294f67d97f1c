"""Section "memory": what an engine plans beside what it allocates; what a step allocates; what logits take.

Memory is torch's own count of its tensors' bytes, from before the weights are made. What is beside the plan (libraries'
workspaces, a sampler's transients) shows in the difference.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

import dllmc
from benchmarks.gpu import device as devices
from benchmarks.gpu import models
from benchmarks.gpu.cases import Maker, product
from benchmarks.gpu.kernels import bound
from benchmarks.gpu.record import Record, Section, print_rows, reason
from benchmarks.gpu.setting import POLICIES, WARM_UPS, Setting
from dllmc.runtime.engine import Engine

HEAD_ROWS = (64, 512, 2048)


def allocations(device: torch.device) -> int | None:
    """Tensors' memory allocated so far, a count; None on a CPU."""
    if device.type != "cuda":
        return None
    counted: int = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    return counted


def decode(engine: Engine, s: Setting) -> int:
    """Requests of every kind at once, the most that any point has; the number of steps."""
    point = max(s.grid, key=lambda p: p.requests)
    policies = [list(POLICIES.values())[i % len(POLICIES)] for i in range(point.requests)]
    sampled = dllmc.SamplingParams(
        gen_length=s.block, block_length=s.block, steps=s.steps, ignore_eos=True, temperature=0.7, top_p=0.9
    )
    params = [sampled if i % 3 == 2 else s.params(s.block) for i in range(point.requests)]
    before = engine.steps
    engine.generate(list(s.prompts(point)), params, policies)
    return engine.steps - before


def of_engine(s: Setting, folder: Path) -> Record:
    """Plan and measurement of an engine that decodes requests of all kinds."""
    device = s.device
    made = s.compiled(folder)
    devices.release(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    tensors = models.random_tensors(s.model, s.layers, s.dtype, device)
    weights = made.joined(tensors, device)
    del tensors
    devices.release(device)
    engine = models.engine_of(made, weights, device, s.pages)
    for _ in range(WARM_UPS):
        decode(engine, s)
    counted = allocations(device)
    steps = decode(engine, s)
    counted_then = allocations(device)
    peak = devices.peak_bytes(device)
    planned = dict(engine.artifact.memory)
    record: Record = {"planned_bytes": planned, "steps": steps, "measured_bytes": None, "allocations_a_step": None}
    if peak is not None and counted is not None and counted_then is not None:
        record["measured_bytes"] = peak - before
        record["of_plan"] = (peak - before) / planned["total"]
        record["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        record["allocations_a_step"] = (counted_then - counted) / steps
    return record


def of_head(rows: int, s: Setting) -> Record:
    """The fused head's workspace and transients beside logits as a whole. Needs a GPU, whose allocator counts."""
    [case] = Maker(s.model, s.device, s.dtype).head(rows, "greedy")
    sample = case.make()
    call, workspace = bound(case.op, sample, s.device)
    hidden, weight = sample.args[:2]
    ways = {
        "head": call,
        "float32 logits, softmax": lambda: product(hidden, weight).softmax(-1).max(-1),
        "float64 softmax, as published": lambda: (hidden @ weight.T).softmax(-1, dtype=torch.float64).max(-1),
    }
    grown = {}
    for name, way in ways.items():
        way()
        devices.release(s.device)
        before = devices.peak_bytes(s.device)
        way()
        after = devices.peak_bytes(s.device)
        grown[name] = None if before is None or after is None else after - before
    vocab = s.model.spec.vocab_size
    if grown["head"] is not None:
        grown["head"] += workspace  # it is there before
    return {"workspace_bytes": workspace, "logits_bytes": 4 * rows * vocab, "grown_bytes": grown}


def run(section: Section, s: Setting, folder: Path) -> None:
    """The head alone, then an engine."""
    section.put(model=s.model.name, layers=s.layers)
    for rows in (5,) if s.model.name == "tiny" else HEAD_ROWS:
        section.attempt({"what": "head", "rows": rows}, partial(of_head, rows, s))
        devices.release(s.device)
    section.attempt({"what": "engine"}, partial(of_engine, s, folder))


def show(content: dict[str, Any]) -> None:
    """Two tables."""
    engines, heads = [], []
    for r in content["results"]:
        if why := reason(r):
            (heads if r["what"] == "head" else engines).append({"": why})
        elif r["what"] == "engine":
            parts = {f"{name} GiB": _gib(size) for name, size in r["planned_bytes"].items()}
            engines.append(
                {
                    **parts,
                    "measured GiB": _gib(r["measured_bytes"]),
                    "of plan": f"{r['of_plan']:.3f}" if "of_plan" in r else "-",
                    "steps": r["steps"],
                    "allocations a step": "-" if r["allocations_a_step"] is None else f"{r['allocations_a_step']:.2f}",
                }
            )
        else:
            grown = {f"{name} MiB": _mib(size) for name, size in r["grown_bytes"].items()}
            heads.append({"rows": r["rows"], "logits MiB": _mib(r["logits_bytes"]), **grown})
    print_rows("What an engine planned, and what was allocated", engines)
    print_rows("What the head takes, and what logits would", heads)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.3f}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
