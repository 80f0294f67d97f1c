"""The scheduler under a virtual clock: thousands of requests, on processors that need not be there.

    python -m benchmarks.simulate                 every device, workload, load and policy: a table, a JSON, a plot
    python -m benchmarks.simulate --calibrate     the cost model fitted to this machine, and its error

Who runs when is decided by the engine's own code (`dllmc.runtime.roster`); a step takes as long as a cost model says
(`benchmarks/cost_model.py`), and commits what its requests' schedules say. Loads are fractions of the rate at which
"fcfs" serves requests that all come at once. Latency is from arrival to the last token.
"""

import copy
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

import dllmc
from benchmarks import calibrate, report, workloads
from benchmarks.cost_model import Device, Shape, work_of
from dllmc.runtime import scheduler
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.request import RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.scheduler import POLICIES
from dllmc.runtime.table import IntArray, Table

PAGE_TOKENS = 16
GIB = 2**30
LOADED = workloads.load()


@dataclass(frozen=True)
class Setting:
    """What is simulated: a model on a device, and limits of a step as `CompileOptions` has them."""

    device: str
    tokens: int
    requests: int
    retention: float

    @property
    def shape(self) -> Shape:
        model = {name: value for name, value in LOADED.model.items() if name != "name"}
        return Shape(**model)

    @property
    def speeds(self) -> Device:
        facts = LOADED.devices[self.device]
        return Device.of(facts["bf16_TFLOPs"] * 1e12, facts["bandwidth_GBs"] * 1e9, facts["launch_us"] * 1e-6)

    @property
    def limits(self) -> dict[str, int]:
        rows = LOADED.block_length * self.requests
        return {"tokens": self.tokens, "rows": rows, "guided": 0, "segments": self.requests, "active": rows}

    @property
    def fixed_bytes(self) -> int:
        """Weights, and the arena of a step."""
        return self.shape.weight_bytes + self.tokens * self.shape.token_arena_bytes

    @property
    def pages(self) -> int:
        """Of the KV pool: what a device's memory has left, a tenth of it kept free."""
        memory = 0.9 * LOADED.devices[self.device]["memory_GiB"] * GIB
        return int((memory - self.fixed_bytes) // (PAGE_TOKENS * self.shape.token_kv_bytes))


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a trace. latencies: seconds, a request each. memory: mean bytes in use."""

    seconds: float
    tokens: int
    steps: int
    preemptions: int
    memory: float
    latencies: list[float]


@cache
def _states(workload: str, requests: int, seed: int, retention: float) -> list[RequestState]:
    spec = dllmc.ModelSpec(LOADED.model["vocab"], 0, (), max_positions=8192)
    policy = dllmc.CachePolicy(retention=retention)
    states = []
    for one in LOADED.trace(workload, requests, 1.0, seed):
        params = dllmc.SamplingParams(gen_length=one.gen_length, block_length=LOADED.block_length, steps=one.steps)
        states.append(RequestState([1] * one.prompt_length, params, spec, cache=policy))
    return states


def run(setting: Setting, workload: str, requests: int, rate: float, seed: int, policy: str) -> Outcome:
    """Serve a trace."""
    shape, device, limits = setting.shape, setting.speeds, setting.limits
    pool = KVPool(setting.pages, PAGE_TOKENS)
    table = Table(setting.requests, 8192, -(-setting.tokens // PAGE_TOKENS))
    roster = Roster(table, limits, pool, POLICIES[policy])
    arrivals = [one.seconds for one in LOADED.trace(workload, requests, rate, seed)]
    entries: dict[Entry, float] = {}
    for state, arrival in zip(_states(workload, requests, seed, setting.retention), arrivals, strict=True):
        fresh = copy.copy(state)
        fresh.move(Table(1, state.length), 0)
        entries[Entry(fresh, scheduler.due(arrival, 0, None))] = arrival
    line = list(entries)
    now, come, steps, tokens, held = 0.0, 0, 0, 0, 0.0
    latencies = []
    while come < requests or len(roster):
        while come < requests and arrivals[come] <= now:
            roster.add(line[come])
            come += 1
        if not len(roster):
            now = arrivals[come]
            continue
        rows = roster.next(now)
        took = float(device.seconds(work_of(shape, table, rows)))
        now, steps = now + took, steps + 1
        held += took * (pool.pages - pool.free)
        committed, full = commit(table, rows)
        tokens += committed
        for entry in roster.at(full):
            table.masked[entry.row, entry.state.start : entry.state.end] = False
            entry.state.leave_full_blocks()
            if entry.state.finished:
                latencies.append(now - entries[entry])
                roster.remove(entry)
    memory = setting.fixed_bytes + held / now * PAGE_TOKENS * shape.token_kv_bytes
    return Outcome(now, tokens, steps, roster.preemptions, memory, latencies)


def commit(table: Table, rows: IntArray) -> tuple[int, IntArray]:
    """What `Batch.commit` does to the schedule of rows, whatever the tokens: how many are committed, rows now full."""
    going = rows[~table.lost[rows]]
    counts = np.minimum(table.commit_counts(going), table.left[going])
    table.advance(rows, going, counts)
    return int(counts.sum()), going[table.left[going] == 0]


def saturation(setting: Setting, workload: str, requests: int, policy: str) -> dict[str, Any]:
    """The record of a trace whose requests all come at once: how many a policy serves a second."""
    outcome = run(setting, workload, requests, np.inf, LOADED.seeds[0], policy)
    return {
        "device": setting.device,
        "workload": workload,
        "policy": policy,
        "requests_per_s": requests / outcome.seconds,
        "tokens_per_s": outcome.tokens / outcome.seconds,
        "steps": outcome.steps,
        "memory_gib": outcome.memory / GIB,
    }


def under_load(setting: Setting, workload: str, requests: int, load: float, rate: float, policy: str) -> dict[str, Any]:
    """The record of traces at a load, all seeds' requests together."""
    outcomes = [run(setting, workload, requests, load * rate, seed, policy) for seed in LOADED.seeds]
    latencies = np.concatenate([outcome.latencies for outcome in outcomes])
    seconds = sum(outcome.seconds for outcome in outcomes)
    return {
        "device": setting.device,
        "workload": workload,
        "policy": policy,
        "load": load,
        "tokens_per_s": sum(outcome.tokens for outcome in outcomes) / seconds,
        "mean_s": float(latencies.mean()),
        "p50_s": float(np.quantile(latencies, 0.5)),
        "p99_s": float(np.quantile(latencies, 0.99)),
        "preemptions": sum(outcome.preemptions for outcome in outcomes),
        "memory_gib": sum(outcome.memory * outcome.seconds for outcome in outcomes) / seconds / GIB,
    }


def alone(setting: Setting, workload: str, requests: int) -> dict[str, Any]:
    """The record of requests that come so seldom that each has the device to itself: what no policy can be below."""
    outcome = run(setting, workload, requests, 1e-6, LOADED.seeds[0], "multiplexed")
    quantiles = {f"p{share}_s": float(np.quantile(outcome.latencies, share / 100)) for share in (50, 99)}
    return {"device": setting.device, "workload": workload, **quantiles}


Records = list[dict[str, Any]]


def simulated(setting: Setting, workload: str, requests: int) -> tuple[Records, Records, Records]:
    """Records of a device and a workload: of saturation for each policy, of each load but for static batches, alone.

    Static batches serve less than most of these loads bring: their line would grow as long as the trace.
    """
    saturated = {policy: saturation(setting, workload, requests, policy) for policy in POLICIES}
    rate = saturated["fcfs"]["requests_per_s"]
    loaded = [
        under_load(setting, workload, requests, load, rate, policy)
        for load in LOADED.loads
        for policy in POLICIES
        if policy != "static"
    ]
    return list(saturated.values()), loaded, [alone(setting, workload, requests)]


def ratios(saturated: Records, loaded: Records, lone: Records) -> Records:
    """For each device and workload: saturation over static batches, and what FCFS's p99 is of this one's, by load.

    And what it could be of any policy's at most: of requests that run alone.
    """
    found = []
    for device, workload in dict.fromkeys((r["device"], r["workload"]) for r in saturated):
        case = {"device": device, "workload": workload}.items()
        rates = {r["policy"]: r["requests_per_s"] for r in saturated if case <= r.items()}
        p99 = {(r["policy"], r["load"]): r["p99_s"] for r in loaded if case <= r.items()}
        [least] = [r["p99_s"] for r in lone if case <= r.items()]
        found.append(
            {
                "device": device,
                "workload": workload,
                "saturation_of_static": rates["multiplexed"] / rates["static"],
                "saturation_of_fcfs": rates["multiplexed"] / rates["fcfs"],
                "fcfs_p99_of_multiplexed": {
                    str(load): p99["fcfs", load] / p99["multiplexed", load] for load in LOADED.loads
                },
                "fcfs_p99_of_alone": {str(load): p99["fcfs", load] / least for load in LOADED.loads},
            }
        )
    return found


def draw(loaded: Records, file: Path) -> None:
    """Latency over load: a row a device, a column a workload; p99 solid, median dashed, a colour a policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    devices, names = (list(dict.fromkeys(r[key] for r in loaded)) for key in ("device", "workload"))
    figure, grid = plt.subplots(
        len(devices),
        len(names),
        figsize=(max(6, 2.6 * len(names)), 2.1 * len(devices) + 0.4),
        sharex=True,
        squeeze=False,
    )
    for (row, device), (column, name) in product(enumerate(devices), enumerate(names)):
        axes = grid[row, column]
        # Where both are the same, fcfs is the rim of the line.
        for policy, colour, width in (("fcfs", "#f0a868", 5), ("multiplexed", "#0072b2", 1.5)):
            case = {"device": device, "workload": name, "policy": policy}.items()
            shown = [r for r in loaded if case <= r.items()]
            look = {"color": colour, "lw": width, "marker": "o", "ms": width + 2}
            for key, what, style in (("p99_s", "p99", "-"), ("p50_s", "median", "--")):
                values = [r["load"] for r in shown], [r[key] for r in shown]
                axes.plot(*values, ls=style, label=f"{policy}, {what}", **look)
        axes.set_ylim(bottom=0)
        axes.set_xticks(LOADED.loads)
        axes.grid(alpha=0.3)
        if row == 0:
            axes.set_title(name, fontsize=10)
        if column == 0:
            axes.set_ylabel(f"{device}\nlatency, s", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("load", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=130)


@click.command()
@click.option("--device", "devices", multiple=True, type=click.Choice(tuple(LOADED.devices)), help="[default: all]")
@click.option("--workload", "names", multiple=True, type=click.Choice(tuple(LOADED.mixes)), help="[default: all]")
@click.option("--requests", default=1000, show_default=True, help="Of a trace; there is one for each of three seeds.")
@click.option("--tokens", default=4096, show_default=True, help="Of the largest step.")
@click.option("--places", default=128, show_default=True, help="Requests that may share a step.")
@click.option("--retention", default=0.5, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--calibrate", "fit", is_flag=True, help="Fit the cost model to this machine instead.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="[default: simulate.json or calibrate.json of the results]"
)
def main(
    devices: tuple[str, ...],
    names: tuple[str, ...],
    requests: int,
    tokens: int,
    places: int,
    retention: float,
    processes: int,
    fit: bool,
    out: Path | None,
) -> None:
    """Simulate, print the tables, write the JSON and the plot beside it."""
    if fit:
        calibrate.run(out or report.RESULTS / "calibrate.json")
        return
    settings = [Setting(device, tokens, places, retention) for device in devices or LOADED.devices]
    tasks = [(setting, name, requests) for setting in settings for name in names or LOADED.mixes]
    found: tuple[Records, Records, Records] = ([], [], [])
    with ProcessPoolExecutor(processes) as pool:
        for task, records in zip(tasks, pool.map(simulated, *zip(*tasks, strict=True)), strict=True):
            click.echo(f"{task[0].device}, {task[1]}", err=True)
            for every, new in zip(found, records, strict=True):
                every.extend(new)
    saturated, loaded, lone = found
    print_tables(saturated, loaded, lone)
    out = out or report.RESULTS / "simulate.json"
    shared = {key: value for key, value in asdict(settings[0]).items() if key != "device"}
    report.write_json(
        out,
        {
            "benchmark": "simulate",
            "setting": {"model": LOADED.model["name"], "requests": requests, "seeds": LOADED.seeds, **shared},
            "ratios": ratios(saturated, loaded, lone),
            "saturation": saturated,
            "loads": loaded,
            "alone": lone,
        },
    )
    draw(loaded, out.with_suffix(".png"))


def print_tables(saturated: Records, loaded: Records, lone: Records) -> None:
    """All tables."""
    digits = {"load": "g", "tokens_per_s": ".0f", "requests_per_s": ".3f", "preemptions": "d", "steps": "d"}

    def cell(key: str, value: Any) -> str:
        return value if isinstance(value, str) else format(value, digits.get(key, ".2f"))

    def shown(records: Records) -> list[dict[str, str]]:
        return [{key: cell(key, value) for key, value in record.items()} for record in records]

    report.print_table("Requests that all come at once", shown(saturated))
    report.print_table("Latency under load (fractions of what fcfs serves at once)", shown(loaded))
    report.print_table("Latency of requests that have the device to themselves", shown(lone))


if __name__ == "__main__":
    main()
