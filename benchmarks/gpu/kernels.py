"""Section "kernels": each operator at serving shapes, over the roofline of the ceilings measured first."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import Case, Maker, Sample
from benchmarks.gpu.device import Call, Ceilings
from benchmarks.gpu.models import Model
from benchmarks.gpu.record import Record, Section, print_rows, reason
from benchmarks.gpu.work import held_bytes, work_of
from dllmc.ops.registry import operator

BLOCK = 32


def bound(op: str, sample: Sample, device: torch.device) -> tuple[Call, int]:
    """A call as the executor binds it, and the bytes of its workspace."""
    tensors = [arg for arg in sample.args if isinstance(arg, Tensor)]
    size = operator(op).workspace_bytes(tensors, device.type)
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    return operator(op).bind(sample.args, list(sample.outs), workspace), size


def cases(maker: Maker, small: bool, quick: bool) -> Iterator[Case]:
    """What matters most comes first: the budget may end before the list."""
    if small:
        yield from maker.head(5, "greedy")
        yield from maker.refresh(2, 48)
        yield from maker.reuse(3, 40, 8)
        yield from maker.keep(2, 48, 8, 0.5)
        yield from maker.keep(2, 48, 8, 1.0)
        yield from maker.rows_of(16)
        return
    for rows in (32, 256, 2048) if quick else (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        yield from maker.head(rows, "greedy")
    for count in (16,) if quick else (1, 16, 64):
        yield from maker.reuse(count, 512, BLOCK)
        yield from maker.reuse(count, 2048, BLOCK)
    for count, length in ((16, 512),) if quick else ((1, 512), (16, 512), (1, 2048), (16, 2048)):
        yield from maker.refresh(count, length)
    for count, length in ((16, 512),) if quick else ((1, 512), (16, 512), (64, 512), (16, 2048)):
        yield from maker.keep(count, length, BLOCK, 0.5)
        yield from maker.keep(count, length, BLOCK, 1.0)
    for tokens in (32, 2048) if quick else (32, 512, 2048, 16384):
        yield from maker.rows_of(tokens)
    for rows in () if quick else (32, 1024):
        for kind in ("sampled", "filtered"):
            yield from maker.head(rows, kind)


def error_of(sample: Sample, call: Call, device: torch.device) -> float:
    """Run a call on outputs that were poisoned; the largest relative error of what is checked."""
    for out in sample.outs:
        out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-1)
    call()
    devices.synchronize(device)
    errors = [devices.error_of(found, expected) for found, expected in sample.check()]
    return next((error for error in errors if error != error), max(errors, default=0.0))


def samples_of(case: Case, sample: Sample) -> list[Sample]:
    """A sample and as many more as it takes that their memory is not in a cache when its turn comes."""
    held = sum(held_bytes(x) for x in (*sample.args, *sample.outs) if isinstance(x, Tensor))
    return [sample, *(case.make() for _ in range(devices.sets_for(held) - 1))]


def measure(case: Case, ceilings: Ceilings, device: torch.device) -> Record:
    """One record: the error first, on outputs that were poisoned, then times."""
    sample = case.make()
    call, workspace = bound(case.op, sample, device)
    error = error_of(sample, call, device)
    if not error <= case.inside:  # not a number fails too
        return {"failed": f"relative error {error:.3g}, expected {case.inside:.3g} or less", "error": error}
    work = work_of(case.op, sample.args, sample.outs)
    samples = samples_of(case, sample)
    own = devices.timed([bound(case.op, each, device)[0] for each in samples], device)
    floor = work.seconds(*ceilings)
    record: dict[str, Any] = {
        "seconds": own.seconds,
        "spread": own.spread,
        "by": own.by,
        "error": error,
        "workspace_bytes": workspace,
        **asdict(work),
        "roofline_seconds": floor,
        "of_roofline": floor / own.seconds,
        "rivals": {},
    }
    for name in sample.rivals:
        record["rivals"][name] = _rival([each.rivals[name] for each in samples], own.seconds, device)
    return record


def _rival(calls: list[Call], own_seconds: float, device: torch.device) -> Record:
    """How long torch takes, or why that is not known: it may not have the memory."""
    try:
        rival = devices.timed(calls, device)
    except RuntimeError as error:
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"}
    return {"seconds": rival.seconds, "by": rival.by, "speedup": rival.seconds / own_seconds}


def run(section: Section, models: list[Model], device: torch.device, small: bool, quick: bool) -> None:
    """Measure the ceilings, then every case of every model."""
    ceilings = devices.ceilings(device, small)
    section.put(ceilings=ceilings._asdict())
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for model in models:
        torch.manual_seed(0)
        for case in cases(Maker(model, device, dtype), small, quick):
            facts = {"model": model.name, "op": case.op, "dtype": str(dtype), **case.facts}
            section.attempt(facts, partial(measure, case, ceilings, device))
            devices.release(device)


def show(content: dict[str, Any]) -> None:
    """The table."""
    top = content["ceilings"]
    rows = []
    for r in content["results"]:
        shape = {k: v for k, v in r.items() if k in ("rows", "kind", "phase", "requests", "cached", "tokens", "width")}
        shape |= {k: r[k] for k in ("columns", "retention") if k in r}
        row = {"model": r["model"], "operator": r["op"].split(".")[1], "shape": _shape(shape)}
        if "seconds" in r:
            row |= {
                "us": f"{1e6 * r['seconds']:.1f}",
                "of roofline": f"{r['of_roofline']:.0%}",
                "GFLOP": f"{r['flops'] / 1e9:.2f}",
                "MB": f"{r['bytes'] / 1e6:.1f}",
                "error": f"{r['error']:.1e}",
            }
        rivals = r.get("rivals", {}).items()
        beside = ", ".join(f"{n} {v['speedup']:.2f}x" if "speedup" in v else f"{n} failed" for n, v in rivals)
        row["torch takes"] = reason(r) or beside
        rows.append(row)
    notes = [
        f"ceilings: {top['flops_per_s'] / 1e12:.0f} TFLOP/s of a large bf16 product, "
        f"{top['bytes_per_s'] / 1e12:.2f} TB/s of a large copy; roofline: the longer of what either allows",
        "torch takes: its time over dllmc's, above 1 where dllmc is faster",
    ]
    print_rows("Operators", rows, notes)


def _shape(shape: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
