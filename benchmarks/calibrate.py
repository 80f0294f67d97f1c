"""The cost model of `benchmarks.simulate` fitted to this machine: what steps of a real engine take, and its error.

Random requests, dense and cached, are decoded by a compiled model in LLaDA's layout; each step's seconds are those of
its program alone. The speeds that explain two thirds of the steps best (squares of the logarithm of predicted over
measured) are tried on the other third.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import dllmc
from benchmarks import report
from benchmarks.cost_model import Device, Shape, Work, work_of
from dllmc.models.llada import LLaDAConfig, LLaDAModel
from dllmc.runtime import batch, scheduler
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.table import Table

SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=4, ffn=768, vocab=32768, dtype_bytes=4)
LIMITS = {"tokens": 2048, "rows": 512, "guided": 0, "segments": 16, "active": 528}
REPEATS = 3
"""Runs of each step, of which the fastest counts: others wait for whatever else the machine does."""


STARTS = np.log([1e11, 1e11, 1e11, 1e10, 1e-5])
"""Where the search for speeds begins, in the order of `Device`'s fields."""


def compiled(folder: Path) -> dllmc.Engine:
    """A model of that shape, with random weights."""
    config = LLaDAConfig.from_dict(
        {
            "d_model": SHAPE.hidden,
            "n_layers": SHAPE.layers,
            "n_heads": SHAPE.heads,
            "mlp_hidden_size": SHAPE.ffn,
            "vocab_size": SHAPE.vocab,
            "max_sequence_length": LIMITS["tokens"],
            "rope": True,
            "weight_tying": False,
        }
    )
    torch.manual_seed(0)
    options = dllmc.CompileOptions(
        max_tokens_per_step=LIMITS["tokens"], max_requests=LIMITS["segments"], max_logit_rows=LIMITS["rows"]
    )
    spec = dllmc.ModelSpec(SHAPE.vocab, SHAPE.vocab - 1, (), max_positions=LIMITS["tokens"])
    return dllmc.load(dllmc.compile(LLaDAModel(config), folder / "artifact", options, spec).path)


def measured(engine: dllmc.Engine, steps: int, seed: int) -> tuple[Work, np.ndarray[Any, np.dtype[np.float64]]]:
    """Steps of random requests that come and go: their work, and their seconds."""
    random = np.random.default_rng(seed)
    pool = KVPool(engine.pool.pages, engine.pool.page_tokens) if engine.pool is not None else None
    width = engine._program.inputs["page_table"].shape[1].constant
    roster = Roster(Table(LIMITS["segments"], LIMITS["tokens"], width), LIMITS, pool, scheduler.POLICIES["multiplexed"])
    works, seconds = [], []
    while len(works) < steps:
        if random.random() < 0.1 or not len(roster):
            roster.add(Entry(random_request(engine, random)))
        rows = roster.next(0.0)
        work = work_of(SHAPE, roster.table, rows)
        step = batch.compose(roster.table, rows, LIMITS["rows"], engine.spec.mask_id, has_cache=True)
        executor = engine._executors.get(step.phase) or engine._executors[engine._program.name]
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            predicted = executor.run(step.sizes, step.inputs)
            times.append(time.perf_counter() - start)
        works.append([getattr(work, name) for name in Work.__dataclass_fields__])
        seconds.append(min(times))
        for entry in roster.at(step.finish(**predicted)):
            entry.state.leave_full_blocks()
            if entry.state.finished:
                roster.remove(entry)
    return Work(*np.array(works, np.float64).T), np.array(seconds)


def random_request(engine: dllmc.Engine, random: np.random.Generator) -> RequestState:
    """Of up to 600 tokens; one in four is dense."""
    prompt = random.integers(0, 1000, int(random.integers(16, 500))).tolist()
    gen = 32 * int(random.integers(1, 4))
    params = dllmc.SamplingParams(gen_length=gen, block_length=32, steps=gen // 4, ignore_eos=True)
    dense = random.random() < 0.25
    cache = dllmc.CachePolicy(mode="none" if dense else "block", retention=float(random.choice((1.0, 0.5))))
    return RequestState(prompt, params, engine.spec, cache=cache)


def fit(work: Work, seconds: np.ndarray[Any, np.dtype[np.float64]]) -> Device:
    """The speeds that explain steps best: each in turn faster or slower, by less and less."""

    def error(logs: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        return float(np.square(np.log(Device(*np.exp(logs)).seconds(work) / seconds)).mean())

    found, least, move = STARTS, error(STARTS), 2.0
    while move > 1e-3:
        tries = [found + sign * move * axis for axis in np.eye(len(STARTS)) for sign in (1, -1)]
        errors = [error(each) for each in tries]
        if min(errors) < least:
            found, least = tries[int(np.argmin(errors))], min(errors)
        else:
            move /= 2
    return Device(*(float(value) for value in np.exp(found)))


def part(work: Work, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Work:
    """Some of the steps."""
    return Work(*(getattr(work, name)[chosen] for name in Work.__dataclass_fields__))


def run(out: Path, steps: int = 240) -> None:
    """Measure, fit, print, write the JSON."""
    facts = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        engine = compiled(Path(folder))
        measured(engine, 20, seed=1)
        work, seconds = measured(engine, steps, seed=0)
    held_out = np.arange(steps) % 3 == 0
    device = fit(part(work, ~held_out), seconds[~held_out])
    errors = np.abs(device.seconds(part(work, held_out)) / seconds[held_out] - 1)
    result = {
        "steps": steps,
        "held_out": int(held_out.sum()),
        "mean_error": float(errors.mean()),
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "seconds_range": [float(seconds.min()), float(seconds.max())],
        "speeds": device.__dict__,
    }
    rows = [{key: f"{value:.3g}" for key, value in {**device.__dict__, "mean error": errors.mean()}.items()}]
    report.print_table("Speeds fitted to this machine, and their error on steps held out", rows)
    click.echo(report.summary(facts))
    report.write_json(out, {"benchmark": "calibrate", "environment": facts, "model": SHAPE.__dict__, "result": result})
