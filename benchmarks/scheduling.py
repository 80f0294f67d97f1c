"""What the host does between two steps: choose, compose, commit, give and take places. No step runs.

    python -m benchmarks.scheduling

Requests come as fast as places are free, so that all places are taken; what a step would predict is drawn at random.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import dllmc
from benchmarks import report
from dllmc.runtime import batch
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.scheduler import POLICIES
from dllmc.runtime.table import Table

SPEC = dllmc.ModelSpec(vocab_size=126464, mask_id=126336, end_ids=(126081,), max_positions=4096)
PAGE_TOKENS = 16
WARM_UP = 50


@dataclass
class Times:
    """Seconds of each part of the host's work, an entry a step."""

    schedule: list[float]
    compose: list[float]
    commit: list[float]
    requests: list[int]


def drive(roster: Roster, steps: int, limits: dict[str, int], seed: int) -> Times:
    """Run the host's part of so many steps, all places taken."""
    random = np.random.default_rng(seed)
    times = Times([], [], [], [])
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
        real = step.segment.size
        drawn = random.integers(0, 1000, real), random.random(real, np.float32), np.zeros(real, np.float32)
        moments.append(time.perf_counter())
        for entry in roster.at(step.commit(*drawn)):
            entry.state.leave_full_blocks()
            if entry.state.finished:
                roster.remove(entry)
        moments.append(time.perf_counter())
        times.schedule.append(moments[1] - moments[0])
        times.compose.append(moments[2] - moments[1])
        times.commit.append(moments[4] - moments[3])
        times.requests.append(rows.size)
    return times


def measure(requests: int, steps: int) -> dict[str, Any]:
    """The record of a number of requests: medians, in microseconds."""
    limits = {"tokens": 64 * 1280, "rows": 32 * requests, "guided": 1, "segments": requests, "active": 32 * requests}
    roster = Roster(Table(requests, 4096, 256), limits, KVPool(80 * requests, PAGE_TOKENS), POLICIES["multiplexed"])
    times = drive(roster, WARM_UP + steps, limits, seed=0)
    parts = {name: getattr(times, name)[WARM_UP:] for name in ("schedule", "compose", "commit")}
    whole = [sum(each) for each in zip(*parts.values(), strict=True)]
    return {
        "requests": requests,
        "requests_a_step": statistics.mean(times.requests[WARM_UP:]),
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
    records = [measure(count, steps) for count in counts]
    rows = [{name: f"{value:.0f}" for name, value in record.items()} for record in records]
    report.print_table("The host's work in a step, microseconds (medians)", rows, notes=[report.summary(facts)])
    report.write_json(out, {"benchmark": "scheduling", "environment": facts, "steps": steps, "records": records})


if __name__ == "__main__":
    main()
