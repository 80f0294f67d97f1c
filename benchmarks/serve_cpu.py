"""The simulator's workloads, scaled down, on the real engine: what each policy serves, and how long requests take.

    python -m benchmarks.serve_cpu

The bundled model of Python source decodes random prompts whose lengths are the workloads' divided by `--scale`; every
request comes at its time of the trace. Saturation is the rate at which requests are served that all come at once.
Policies take turns, several times over; what is reported is the median.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

import dllmc
from benchmarks import report, workloads
from dllmc.runtime.scheduler import POLICIES

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-llada-code"
CACHE = dllmc.CachePolicy(retention=0.5)
LOADED = workloads.load()


def serve(engine: dllmc.Engine, arrivals: Sequence[workloads.Arrival]) -> tuple[float, list[float]]:
    """Seconds that a trace took, and each request's latency."""
    random = np.random.default_rng(0)
    params = [
        dllmc.SamplingParams(gen_length=one.gen_length, block_length=32, steps=one.steps, ignore_eos=True)
        for one in arrivals
    ]
    prompts = [random.integers(100, 2000, one.prompt_length).tolist() for one in arrivals]
    latencies: dict[int, float] = {}
    going: dict[int, dllmc.Request] = {}
    come, start = 0, time.perf_counter()
    while len(latencies) < len(arrivals):
        now = time.perf_counter() - start
        while come < len(arrivals) and arrivals[come].seconds <= now:
            going[come] = engine.submit(prompts[come], params[come], CACHE)
            come += 1
        if going:
            engine.step()
        else:
            time.sleep(max(0.0, arrivals[come].seconds - now))
        now = time.perf_counter() - start
        for index in [index for index, request in going.items() if request.done]:
            del going[index]
            latencies[index] = now - arrivals[index].seconds
    return time.perf_counter() - start, list(latencies.values())


@click.command()
@click.option("--workload", "names", multiple=True, type=click.Choice(tuple(LOADED.mixes)), default=("mixed", "burst"))
@click.option("--load", "loads", multiple=True, type=float, default=(0.5, 0.9), show_default=True)
@click.option("--requests", default=96, show_default=True, help="Of a trace.")
@click.option("--repeats", default=3, show_default=True, help="Times that each trace is served.")
@click.option("--scale", default=8, show_default=True, help="Lengths are divided by it.")
@click.option("--tokens", default=640, show_default=True, help="Of the largest step.")
@click.option("--places", default=16, show_default=True, help="Requests that may share a step.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "serve_cpu.json")
def main(
    names: tuple[str, ...],
    loads: tuple[float, ...],
    requests: int,
    repeats: int,
    scale: int,
    tokens: int,
    places: int,
    out: Path,
) -> None:
    """Serve each trace with each policy, print the tables, write the JSON."""
    facts = report.environment()
    saturated: list[dict[str, Any]] = []
    loaded: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = dllmc.CompileOptions(max_tokens_per_step=tokens, max_requests=places, max_logit_rows=32 * places)
        path = dllmc.compile(CHECKPOINT, Path(folder) / "artifact", options).path

        def in_turns(name: str, policies: Sequence[str], rate: float) -> dict[str, list[tuple[float, list[float]]]]:
            """What `serve` says of each policy, each time, on the same trace."""
            served: dict[str, list[tuple[float, list[float]]]] = {policy: [] for policy in policies}
            for _ in range(repeats):
                for policy in policies:
                    engine = dllmc.load(path, scheduler=policy, max_queue=requests)
                    serve(engine, LOADED.trace(name, 8, np.inf, seed=1, scale=scale))
                    served[policy].append(serve(engine, LOADED.trace(name, requests, rate, seed=0, scale=scale)))
            return served

        for name in names:
            rates = {
                policy: requests / float(np.median([seconds for seconds, _ in times]))
                for policy, times in in_turns(name, POLICIES, np.inf).items()
            }
            saturated += [{"workload": name, "policy": policy, "requests_per_s": rates[policy]} for policy in POLICIES]
            for load in loads:
                for policy, times in in_turns(name, ("fcfs", "multiplexed"), load * rates["fcfs"]).items():
                    quantiles = {"p50_s": 0.5, "p99_s": 0.99}
                    latency = {"mean_s": float(np.median([np.mean(latencies) for _, latencies in times]))} | {
                        key: float(np.median([np.quantile(latencies, q) for _, latencies in times]))
                        for key, q in quantiles.items()
                    }
                    loaded.append({"workload": name, "policy": policy, "load": load, **latency})
    for title, records in (("Requests that all come at once", saturated), ("Latency under load", loaded)):
        rows = [{k: v if isinstance(v, str) else f"{v:.2f}" for k, v in r.items()} for r in records]
        report.print_table(title, rows, notes=[report.summary(facts)])
    setting = {
        "requests": requests,
        "repeats": repeats,
        "scale": scale,
        "tokens": tokens,
        "places": places,
        "retention": CACHE.retention,
    }
    report.write_json(
        out,
        {"benchmark": "serve_cpu", "environment": facts, "setting": setting, "saturation": saturated, "loads": loaded},
    )


if __name__ == "__main__":
    main()
