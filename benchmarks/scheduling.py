"""What the host does for a step: choose who runs, compose it, pick its rows, commit; give places. No step runs.

    python -m benchmarks.scheduling

Requests come as fast as places are free, so that all places are taken; what a step would predict is drawn at random.
On a GPU, where the GPU picks rows and commits, all but the commit is done while another step runs, if that ends no
block; and the commit too, where no request has a threshold.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

import dllmc
from benchmarks import report
from dllmc.runtime import batch
from dllmc.runtime.batch import Array
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.scheduler import POLICIES
from dllmc.runtime.table import Table

SPEC = dllmc.ModelSpec(vocab_size=126464, mask_id=126336, end_ids=(126081,), max_positions=4096)
PAGE_TOKENS = 16
WARM_UP = 50


PARTS = ("schedule", "compose", "rows", "commit")


def drive(roster: Roster, steps: int, limits: dict[str, int], seed: int, device: str) -> dict[str, list[float]]:
    """Run the host's part of so many steps, all places taken: seconds of each part, and requests, an entry a step."""
    random = np.random.default_rng(seed)
    times: dict[str, list[float]] = {name: [] for name in (*PARTS, "requests")}
    params = dllmc.SamplingParams(gen_length=256, block_length=32, ignore_eos=True)
    for _ in range(steps):
        while len(roster) < limits["segments"]:
            prompt = random.integers(0, 1000, int(random.integers(64, 1024))).tolist()
            roster.add(Entry(RequestState(prompt, params, SPEC, cache=dllmc.CachePolicy())))
        moments = [time.perf_counter()]
        rows = roster.next(0.0)
        moments.append(time.perf_counter())
        step = batch.compose(roster.table, rows, limits["rows"], SPEC.mask_id, has_cache=True)
        moments.append(time.perf_counter())
        if device == "cpu":
            step.picked()
        else:
            step.places()
        moments.append(time.perf_counter())
        predicted = drawn(step, random, device)
        moments.append(time.perf_counter())
        commits = step.choose(*predicted) if device == "cpu" else step.chosen(*predicted)
        for entry in roster.at(step.commit(commits)):
            entry.state.leave_full_blocks()
            if entry.state.finished:
                roster.remove(entry)
        moments.append(time.perf_counter())
        seconds = [b - a for a, b in pairwise(moments)]
        del seconds[3]  # of drawing
        for name, value in zip(times, (*seconds, rows.size), strict=True):
            times[name].append(value)
    return times


def drawn(step: batch.Batch, random: np.random.Generator, device: str) -> tuple[Array, ...]:
    """What a step returns: predictions; or, of a GPU, what is committed, the first candidates of each request."""
    real = int(step.table.left[step.committing].sum())
    token, logprob = random.integers(0, 1000, real), np.zeros(real, np.float32)
    if device == "cpu":
        return token, random.random(real, np.float32), logprob
    first = np.cumsum(step.table.left[step.committing]) - step.table.left[step.committing]
    rank = np.arange(real) - np.repeat(first, step.table.left[step.committing])
    chosen = rank < np.repeat(step.counts, step.table.left[step.committing])
    return (np.stack((np.where(chosen, token, -1).astype(np.int32), logprob.view(np.int32))),)


def measure(requests: int, steps: int, device: str) -> dict[str, Any]:
    """The record of a number of requests: medians, in microseconds."""
    limits = {"tokens": 64 * 1280, "rows": 32 * requests, "guided": 1, "segments": requests, "active": 32 * requests}
    roster = Roster(Table(requests, 4096, 256), limits, KVPool(80 * requests, PAGE_TOKENS), POLICIES["multiplexed"])
    times = drive(roster, WARM_UP + steps, limits, 0, device)
    parts = {name: times[name][WARM_UP:] for name in PARTS}
    whole = [sum(each) for each in zip(*parts.values(), strict=True)]
    return {
        "device": device,
        "requests": requests,
        "requests_a_step": statistics.mean(times["requests"][WARM_UP:]),
        **{f"{name}_us": 1e6 * statistics.median(values) for name, values in parts.items()},
        "median_us": 1e6 * statistics.median(whole),
        "mean_us": 1e6 * statistics.mean(whole),
    }


@click.command()
@click.option("--requests", "counts", multiple=True, type=int, default=(1, 8, 64), show_default=True)
@click.option("--steps", default=1000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "scheduling.json")
def main(counts: tuple[int, ...], steps: int, out: Path) -> None:
    """Measure each number of requests, print the table, write the JSON."""
    facts = report.environment()
    records = [measure(count, steps, device) for device in ("cpu", "gpu") for count in counts]
    rows = [{name: v if isinstance(v, str) else f"{v:.0f}" for name, v in record.items()} for record in records]
    report.print_table("The host's work in a step, microseconds (medians)", rows, notes=[report.summary(facts)])
    report.write_json(out, {"benchmark": "scheduling", "environment": facts, "steps": steps, "records": records})


if __name__ == "__main__":
    main()
