"""Section "decode": tokens a second and latencies, dllmc beside the decoders of `benchmarks/baselines.py`.

All decode the same prompts with the same weights, at the same pace, to the same number of tokens. Before it is timed,
each decodes one block of sequences of the same length, so that everything it meets it has met. Contenders that are
eager come first, then dllmc, then what `torch.compile` makes of the eager ones, so that compiling takes no time from
the others; one of them whose model is not in memory is no burden to those that are measured.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import dllmc
from benchmarks import baselines
from benchmarks.gpu import device as devices
from benchmarks.gpu import models
from benchmarks.gpu.record import Record, Section, print_rows, reason
from benchmarks.gpu.setting import POLICIES, WARM_UPS, Point, Setting
from dllmc.runtime.engine import Engine

Tokens = list[list[int]]
BASELINES = {"dense": baselines.dense, "dual cache": baselines.dual_cache}
# Whose tokens are the same but for rounding.
ALIKE = {"dllmc dense": "eager dense", "dllmc cached": "eager dual cache"}
COMPILE_CAP_S = 90.0
LIKELY_FLOPS_PER_S = 3e14  # to tell beforehand what cannot end in time

Found = dict[tuple[Point, str], Tokens]
# (prompts, new tokens) -> completions, passes, seconds until each request was done, seconds of each step
Decode = Callable[[Tokens, int], tuple[Tokens, int, list[float], list[float]]]


class TimedOut(BaseException):
    """Not an `Exception`, which a compiler might take for its own failure."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimedOut` in this, the main thread, after so many seconds."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def baseline(model: baselines.Model, name: str, parts: baselines.Parts, s: Setting) -> Decode:
    """A decoder in plain torch: a batch, whose requests are done together."""

    def decode(prompts: Tokens, new: int) -> tuple[Tokens, int, list[float], list[float]]:
        pace = baselines.Pace(new, s.block, new // s.block * s.steps)
        start = time.perf_counter()
        given = torch.tensor(prompts, device=s.device)
        decoded = BASELINES[name](model, given, s.model.spec.mask_id, pace, parts=parts)
        tokens = decoded.tokens.tolist()
        seconds = time.perf_counter() - start
        return tokens, decoded.forward_passes, [seconds] * len(prompts), []

    return decode


def served(engine: Engine, policy: dllmc.CachePolicy, s: Setting) -> Decode:
    """An engine, whose requests are submitted together."""

    def decode(prompts: Tokens, new: int) -> tuple[Tokens, int, list[float], list[float]]:
        start = time.perf_counter()
        requests = [engine.submit(prompt, s.params(new), policy) for prompt in prompts]
        open_, done, steps = dict(enumerate(requests)), {}, []
        while open_:
            began = time.perf_counter()
            engine.step()
            now = time.perf_counter()
            steps.append(now - began)
            for index in [index for index, request in open_.items() if request.done]:
                done[index] = now - start
                del open_[index]
        tokens = [request.result().token_ids for request in requests]
        return tokens, len(steps), [done[index] for index in range(len(requests))], steps

    return decode


def measure(
    decode: Decode,
    name: str,
    point: Point,
    s: Setting,
    section: Section,
    found: Found,
    cap_s: float | None = None,
    warm_ups: int = 1,
) -> Record:
    """One record. cap_s: what compiling may take. warm_ups: blocks that are decoded before."""
    prompts = s.prompts(point)
    first: dict[str, float] = {}
    devices.release(s.device)
    longer = s.prompts(point, longer=s.new - s.block)
    start = time.perf_counter()
    if cap_s is not None:
        cap_s = min(cap_s, max(section.left_s, 1.0))
        try:
            with at_most(cap_s):
                decode(longer, s.block)
        except TimedOut:
            return {"not_measured": f"did not compile within {cap_s:.0f} s"}
        first["compile_and_first_block_seconds"] = time.perf_counter() - start
    for _ in range(warm_ups):
        start = time.perf_counter()
        decode(longer, s.block)
        devices.synchronize(s.device)
        of_block = time.perf_counter() - start
    if (expected := of_block * s.blocks) > section.left_s:
        return {**first, "not_measured": f"{expected:.0f} s expected, {max(section.left_s, 0):.0f} s left"}
    start = time.perf_counter()
    tokens, passes, done, steps = decode(prompts, s.new)
    seconds = time.perf_counter() - start
    found[point, name] = tokens
    ordered, stepped = sorted(done), sorted(steps)
    record: Record = {
        "seconds": seconds,
        "tokens_per_s": point.requests * s.new / seconds,
        "passes": passes,
        "step_seconds": stepped[len(stepped) // 2] if stepped else seconds / passes,
        "request_seconds": {"median": ordered[len(ordered) // 2], "longest": ordered[-1]},
        "first_block_seconds": of_block,
        "peak_bytes": devices.peak_bytes(s.device),
        **first,
    }
    if (reference := found.get((point, ALIKE.get(name, "")))) is not None:
        same = torch.tensor(tokens) == torch.tensor(reference)
        record["same_tokens"] = same.double().mean().item()
    return record


def expected_s(s: Setting, point: Point, name: str, parameters: int) -> float:
    """What a decode takes at a likely speed, its first block included: products of all positions, or of blocks."""
    whole = point.requests * (point.prompt + s.new)
    computed = whole * s.steps if "dense" in name else whole + point.requests * s.block * s.steps
    flops_per_s = LIKELY_FLOPS_PER_S if s.device.type == "cuda" else 1e11
    return (s.blocks + 1) * 2 * parameters * computed / flops_per_s


def run(section: Section, s: Setting, folder: Path, with_compiled: bool = True) -> None:
    """All contenders at all points."""
    device, found = s.device, Found()
    section.put(
        model=s.model.name,
        layers=s.layers,
        dtype=str(s.dtype),
        new_tokens=s.new,
        block=s.block,
        steps_a_block=s.steps,
        max_tokens_per_step=s.limits.tokens,
    )
    tensors = models.random_tensors(s.model, s.layers, s.dtype, device)
    parameters = sum(t.numel() for t in tensors.values())

    def attempt(decode: Decode, name: str, point: Point, cap_s: float | None = None, warm_ups: int = 1) -> None:
        facts = {"contender": name, "prompt": point.prompt, "requests": point.requests}
        needed = expected_s(s, point, name, parameters)
        section.attempt(facts, partial(measure, decode, name, point, s, section, found, cap_s, warm_ups), needed)
        devices.release(device)

    module: baselines.Model | None = models.module_of(s.model, s.layers, tensors)
    for point in s.grid:
        for name in BASELINES:
            attempt(baseline(module, name, baselines.EAGER, s), f"eager {name}", point)
    module = None
    devices.release(device)

    engines: list[Engine] = []

    def load() -> Record:
        made = s.compiled(folder)
        weights = made.joined(tensors, device)
        tensors.clear()
        devices.release(device)
        start = time.perf_counter()
        engine = models.engine_of(made, weights, device, s.pages)
        record = {"load_seconds": time.perf_counter() - start, "memory": dict(engine.artifact.memory)}
        engines.append(engine)
        return record

    loaded = section.attempt({"contender": "dllmc", "stage": "load"}, load)
    section.results.remove(loaded)
    section.put(load=loaded)
    for engine in engines:
        for point in s.grid:
            for name, policy in POLICIES.items():
                attempt(served(engine, policy, s), name, point, warm_ups=WARM_UPS)
        engine.close()
    engines.clear()
    tensors.clear()
    devices.release(device)

    if not with_compiled:
        return
    module = models.module_of(s.model, s.layers, models.random_tensors(s.model, s.layers, s.dtype, device))
    for point in s.grid:
        for name in BASELINES:
            torch.compiler.reset()  # each shape has kernels of its own
            attempt(baseline(module, name, baselines.compiled(), s), f"compiled {name}", point, COMPILE_CAP_S)


def show(content: dict[str, Any]) -> None:
    """A table of all points, each contender beside eager dense and eager dual cache."""
    results = content["results"]
    speed = {(r["prompt"], r["requests"], r["contender"]): r["tokens_per_s"] for r in results if not reason(r)}
    rows = []
    for r in sorted(results, key=lambda r: (r["prompt"], r["requests"])):
        at = r["prompt"], r["requests"]
        row: dict[str, object] = {"prompt": at[0], "requests": at[1], "contender": r["contender"]}
        if not reason(r):
            row |= {
                "tokens/s": f"{r['tokens_per_s']:.1f}",
                "step ms": f"{1e3 * r['step_seconds']:.1f}",
                "request s": f"{r['request_seconds']['median']:.2f}",
                "passes": r["passes"],
                "peak GiB": "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f}",
            }
            for name in ("eager dense", "eager dual cache"):
                if (*at, name) in speed:
                    row[f"of {name}"] = f"{r['tokens_per_s'] / speed[(*at, name)]:.2f}x"
            if "same_tokens" in r:
                row["same tokens"] = f"{r['same_tokens']:.1%}"
        rows.append(row | ({"": reason(r)} if reason(r) else {}))
    notes = [
        f"{content['model']}, {content['layers']} layers, random weights, {content['dtype']}: "
        f"{content['new_tokens']} new tokens, blocks of {content['block']}, {content['steps_a_block']} steps a block",
        "same tokens: as the eager decoder that computes the same; random weights leave most choices to rounding",
    ]
    if why := reason(content.get("load", {})):
        notes.append(f"dllmc was not loaded: {why}")
    print_rows("Decoding", rows, notes)
