"""Section "where": what a Refresh and a Reuse step spend their time on, over the roofline of what they must do.

An engine decodes while its own parts are under the host's clock. Then the program of one of its steps, with that
step's inputs, is run call by call: the device is kept busy until all calls are in its queue, so that what is between
two events is a call's own time, and none of it the host's. And once more as one graph, which is the step without the
host.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import bound, models
from benchmarks.gpu import device as devices
from benchmarks.gpu.bound import BoundCall
from benchmarks.gpu.device import Ceilings
from benchmarks.gpu.record import Record, Section, print_rows, reason
from benchmarks.gpu.setting import POLICIES, WARM_UPS, Point, Setting
from benchmarks.gpu.work import Work
from dllmc.ir.program import Sizes
from dllmc.runtime import batch
from dllmc.runtime.batch import Array, Batch, Commits
from dllmc.runtime.engine import Engine
from dllmc.runtime.launch import launch

PHASES = ("refresh", "reuse")
POLICY = "dllmc cached, half"  # it scores, selects and packs
REPEATS = 5
SLEEP_CYCLES = 100_000_000  # about 50 ms, in which the host puts a step's calls into the queue


@dataclass
class Watched:
    """Of each step its phase and seconds, whole and of the host's parts; and every step, by phase, with its inputs.

    Parts of the next step are among these where the host makes them while one runs on the GPU. watching: seconds that
    only the watching took.
    """

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    steps: dict[str, list[tuple[Sizes, Mapping[str, Array]]]] = field(default_factory=lambda: defaultdict(list))
    now: dict[str, float] = field(default_factory=dict)
    watching: float = 0.0
    phase: str = ""


@contextmanager
def watching() -> Iterator[Watched]:
    """Put the parts of all engines' steps under the clock."""
    seen = Watched()

    def under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seen.now[name] = seen.now.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    commit = under("commit", Batch.commit)

    def committed(step: Batch, commits: Commits) -> Any:
        start = time.perf_counter()
        seen.phase = step.phase
        seen.steps[step.phase].append((step.sizes, step.inputs))
        seen.watching += time.perf_counter() - start
        return commit(step, commits)

    with (
        patch.object(batch, "compose", under("compose", batch.compose)),
        patch("dllmc.runtime.engine.launch", under("launch", launch)),
        patch.object(Batch, "commit", committed),
    ):
        yield seen


def decode(engine: Engine, s: Setting, point: Point, new: int, seen: Watched) -> None:
    """Decode the point's requests, all in the same phase at any time, and watch each step."""
    requests = [engine.submit(prompt, s.params(new), POLICIES[POLICY]) for prompt in s.prompts(point)]
    while not all(request.done for request in requests):
        seen.now, seen.watching = {}, 0.0
        start = time.perf_counter()
        engine.step()
        seen.now["step"] = time.perf_counter() - start - seen.watching
        for name, seconds in seen.now.items():
            seen.seconds[seen.phase][name].append(seconds)
    for request in requests:
        request.result()  # raises what a step raised


def measure(
    engine: Engine, s: Setting, point: Point, phase: str, seen: Watched, ceilings: Ceilings, device: torch.device
) -> Record:
    """One record. The engine is idle: its memory is used."""
    if not seen.steps[phase]:
        raise RuntimeError(f"no step was a {phase} of all requests, only {sorted(seen.seconds)}")
    steps = sorted(seen.steps[phase], key=lambda one: one[0]["rows"])
    sizes, inputs = steps[len(steps) // 2]  # as its time is the median
    program = engine.artifact.programs[phase]
    with torch.inference_mode():
        bound.load(program, engine.memory, sizes, inputs)
        calls = bound.bind(program, engine.memory, sizes)
        works = [call.work() for call in calls]
        for call in calls:
            call.run()
        seconds = _of_each(calls, device)
        whole = devices.timed([lambda: [call.run() for call in calls]], device)
        graph = _as_graph(calls, device)
    parts = {}
    for name in bound.NAMES:
        mine = [i for i, call in enumerate(calls) if bound.group_of(call.op) == name]
        work = sum((works[i] for i in mine), Work())
        floor = sum(works[i].seconds(*ceilings) for i in mine)
        taken = sum(seconds[i] for i in mine)
        parts[name] = {"calls": len(mine), "seconds": taken, "roofline_seconds": floor, **asdict(work)}
    host = {name: statistics.median(values) for name, values in seen.seconds[phase].items()}
    total = sum(works, Work())
    of_calls = sum(part["roofline_seconds"] for part in parts.values())
    return {
        "sizes": dict(sizes),
        "calls": len(calls),
        "step_seconds": host.pop("step"),
        "host_seconds": host,
        "device_seconds": sum(seconds),
        "graph_seconds": graph,
        "launched_seconds": whole.seconds,
        "parts": parts,
        **asdict(total),
        "roofline_of_calls_seconds": of_calls,
        "roofline_of_step_seconds": total.seconds(*ceilings),
    }


def _of_each(calls: list[BoundCall], device: torch.device) -> list[float]:
    """Seconds of each call, the median of some steps."""
    steps = [_queued(calls) if device.type == "cuda" else _walls(calls) for _ in range(REPEATS)]
    return [statistics.median(of_one) for of_one in zip(*steps, strict=True)]


def _queued(calls: list[BoundCall]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call.run()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]


def _walls(calls: list[BoundCall]) -> list[float]:
    found = []
    for call in calls:
        start = time.perf_counter()
        call.run()
        found.append(time.perf_counter() - start)
    return found


def _as_graph(calls: list[BoundCall], device: torch.device) -> float | None:
    """Seconds of the whole step as a graph; None on a CPU."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call.run()
    return devices.timed([graph.replay], device, in_graph=False).seconds


def run(section: Section, s: Setting, folder: Path) -> None:
    """Measure both phases at every number of requests of the shortest prompt."""
    device = s.device
    ceilings = devices.ceilings(device, s.model.name == "tiny")
    section.put(ceilings=ceilings._asdict(), policy=POLICY, model=s.model.name, layers=s.layers)
    made = s.compiled(folder)
    weights = made.joined(models.random_tensors(s.model, s.layers, s.dtype, device), device)
    engine = models.engine_of(made, weights, device, s.pages, scheduling="fcfs")  # together, not spread over steps
    shortest = min(point.prompt for point in s.grid)
    for point in sorted((p for p in s.grid if p.prompt == shortest), key=lambda p: p.requests):
        with watching() as seen:
            for _ in range(WARM_UPS):
                decode(engine, s, point, s.block, Watched())
            decode(engine, s, point, s.new, seen)
        for phase in PHASES:
            facts = {"phase": phase, "requests": point.requests, "prompt": point.prompt}
            section.attempt(facts, partial(measure, engine, s, point, phase, seen, ceilings, device))


def show(content: dict[str, Any]) -> None:
    """Two tables: whole steps, and their parts."""
    steps, parts = [], []
    for r in content["results"]:
        case = {"phase": r["phase"], "requests": r["requests"], "prompt": r["prompt"]}
        if reason(r):
            steps.append({**case, "": reason(r)})
            continue
        best = r["graph_seconds"] or r["device_seconds"]
        steps.append(
            {
                **case,
                "step ms": f"{1e3 * r['step_seconds']:.2f}",
                "graph ms": "-" if r["graph_seconds"] is None else f"{1e3 * r['graph_seconds']:.2f}",
                "calls ms": f"{1e3 * r['device_seconds']:.2f}",
                "host ms": f"{1e3 * max(r['step_seconds'] - best, 0):.2f}",
                "compose": f"{1e3 * r['host_seconds'].get('compose', 0):.2f}",
                "launch": f"{1e3 * r['host_seconds'].get('launch', 0):.2f}",
                "commit": f"{1e3 * r['host_seconds'].get('commit', 0):.2f}",
                "TFLOP": f"{r['flops'] / 1e12:.2f}",
                "GB": f"{r['bytes'] / 1e9:.2f}",
                "roofline ms": f"{1e3 * r['roofline_of_calls_seconds']:.2f}",
                "step over it": f"{r['step_seconds'] / r['roofline_of_calls_seconds']:.2f}x",
                "over the step's": f"{r['step_seconds'] / r['roofline_of_step_seconds']:.2f}x",
            }
        )
        for name, part in r["parts"].items():
            floor = part["roofline_seconds"]
            parts.append(
                {
                    **case,
                    "part": name,
                    "calls": part["calls"],
                    "ms": f"{1e3 * part['seconds']:.3f}",
                    "of calls": f"{part['seconds'] / r['device_seconds']:.1%}",
                    "roofline ms": f"{1e3 * floor:.3f}",
                    "over it": f"{part['seconds'] / floor:.2f}x" if floor else "-",
                }
            )
    notes = [
        "step: by the host's clock, in the engine; graph: all calls as one graph; calls: the sum of each call's own",
        "roofline: of each call the longer of its operations and its bytes at the measured ceilings, summed; "
        "the step's: of all operations and all bytes at once",
    ]
    print_rows("Where the time of a step goes", steps, notes)
    print_rows("Its parts", parts)
