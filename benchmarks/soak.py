"""Many random requests on one engine, from several threads at once: each result must be what it is alone.

    python -m benchmarks.soak --requests 10000

Requests differ in length, sampling, caching and priority; some are cancelled at random times, some in line, some while
they run; the KV pool is so small that requests wait and lose their places to others. In the end no page is held, and
the process is as large as it was after the first fifth.
"""

import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import dllmc
from benchmarks import report
from dllmc.errors import CancelledError, QueueFullError
from dllmc.models.llada import LLaDAConfig, LLaDAModel

VOCAB = 512
THREADS = 4
IN_FLIGHT = 6
MAX_QUEUE = 12


@dataclass(frozen=True)
class Planned:
    """A request, and what becomes of it. cancel_after: updates that are read before it is cancelled; None: never."""

    prompt: list[int]
    params: dllmc.SamplingParams
    cache: dllmc.CachePolicy
    priority: int
    streamed: bool
    cancel_after: int | None


def planned(index: int, seed: int) -> Planned:
    """Request `index` of a seed's."""
    draw = random.Random(f"{seed}, {index}")
    block = draw.randint(2, 8)
    blocks = draw.randint(1, 3)
    pace: dict[str, Any] = draw.choice(({}, {"threshold": 0.02}, {"steps": blocks * draw.randint(1, block)}))
    params = dllmc.SamplingParams(
        gen_length=block * blocks,
        block_length=block,
        temperature=draw.choice((0.0, 0.0, 0.7, 1.3)),
        top_k=draw.choice((None, None, 20)),
        top_p=draw.choice((None, None, 0.8)),
        remasking=draw.choice(("low_confidence", "low_confidence", "topk_margin", "random")),
        cfg_scale=draw.choice((0.0, 0.0, 0.0, 1.0)),
        seed=draw.randint(0, 2**31),
        **pace,
    )
    cache = dllmc.CachePolicy(
        mode=draw.choice(("none", "block", "block")),
        retention=draw.choice((1.0, 0.5, 0.2)),
        selection=draw.choice(("per_head", "shared")),
        delay=draw.randint(0, 2),
        refresh_interval=draw.choice((None, None, 1, 2)),
    )
    return Planned(
        prompt=[draw.randrange(VOCAB - 2) for _ in range(draw.randint(1, 40))],
        params=params,
        cache=cache,
        priority=draw.choice((0, 0, 0, 0, 2, 4)),
        streamed=draw.random() < 0.5,
        cancel_after=draw.randint(0, 4) if draw.random() < 0.15 else None,
    )


class Soak:
    """Threads that share an engine: each keeps several requests going, and checks what it gets."""

    def __init__(self, engine: dllmc.Engine, alone: dllmc.Engine, requests: int, seed: int) -> None:
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self.wrong: list[int] = []
        self.resident: list[int] = []
        self._alone = alone
        self._requests, self._seed = requests, seed
        self._next = iter(range(requests))
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """All requests; raises what a thread failed with."""
        threads = [threading.Thread(target=self._work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        try:
            going: list[tuple[int, Planned, dllmc.Request]] = []
            while True:
                with self._lock:
                    index = next(self._next, None)
                    if index is not None and index % max(1, self._requests // 20) == 0:
                        self.resident.append(report.resident_bytes())
                if index is not None:
                    plan = planned(index, self._seed)
                    going.append((index, plan, self._submit(plan, going)))
                while going and (index is None or len(going) >= IN_FLIGHT):
                    self._end(*going.pop(0))
                if index is None:
                    return
        except BaseException as error:
            self._errors.append(error)

    def _submit(self, plan: Planned, going: list[tuple[int, Planned, dllmc.Request]]) -> dllmc.Request:
        while True:
            try:
                return self.engine.submit(plan.prompt, plan.params, plan.cache, priority=plan.priority)
            except QueueFullError:
                with self._lock:
                    self.counts["line full"] += 1
                if going:
                    self._end(*going.pop(0))
                else:
                    self.engine.step()

    def _end(self, index: int, plan: Planned, request: dllmc.Request) -> None:
        outcome = "finished"
        try:
            if plan.cancel_after is not None:
                for count, _ in enumerate(request.stream()):
                    if count == plan.cancel_after:
                        break
                request.cancel()
            result = request.result()
            if plan.streamed:
                tokens = {p: t for u in request.stream() for p, t in zip(u.positions, u.token_ids, strict=True)}
                assert [tokens[p] for p in range(len(result.token_ids))] == result.token_ids
            with self._lock:
                [expected] = self._alone.generate(plan.prompt, plan.params, plan.cache)
                if result != expected:
                    self.wrong.append(index)
        except CancelledError:
            outcome = "cancelled"
        with self._lock:
            self.counts[outcome] += 1


def artifact(folder: Path) -> Path:
    """A tiny model in LLaDA's layout, random weights, compiled with room for few requests and few pages."""
    config = LLaDAConfig.from_dict(
        {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 2,
            "mlp_hidden_size": 64,
            "vocab_size": VOCAB,
            "max_sequence_length": 128,
            "rope": True,
            "weight_tying": False,
        }
    )
    torch.manual_seed(0)
    model = LLaDAModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25 if parameter.ndim > 1 else 1.0)
    options = dllmc.CompileOptions(max_tokens_per_step=160, max_requests=6, max_logit_rows=24)
    spec = dllmc.ModelSpec(VOCAB, VOCAB - 1, (VOCAB - 2,), max_positions=128)
    return dllmc.compile(model, folder / "soak", options, spec).path


def soak(folder: Path, requests: int, seed: int) -> dict[str, Any]:
    """The record of a run: what became of requests, and what is left."""
    path = artifact(folder)
    memory = dllmc.load(path).artifact.memory
    budget = memory["total"] - memory["kv_pool"] // 2
    with dllmc.load(path, memory_budget=budget, max_queue=MAX_QUEUE) as engine:
        run = Soak(engine, dllmc.load(path), requests, seed)
        start = time.perf_counter()
        run.run()
        seconds = time.perf_counter() - start
        stats = engine.stats()
    settled = run.resident[len(run.resident) // 5 :]
    return {
        "requests": requests,
        "threads": THREADS,
        "seconds": seconds,
        **{name.replace(" ", "_"): count for name, count in sorted(run.counts.items())},
        "preemptions": stats.preemptions,
        "steps": stats.steps,
        "wrong": sorted(run.wrong),
        "pages_held_in_the_end": stats.pages_in_use,
        "requests_left_in_the_end": stats.waiting + stats.running,
        "resident_growth_bytes": max(settled) - settled[0],
    }


@click.command()
@click.option("--requests", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "soak.json")
def main(requests: int, seed: int, out: Path) -> None:
    """Run, print, write the JSON."""
    facts = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        record = soak(Path(folder), requests, seed)
    report.print_table("Soak", [record], notes=[report.summary(facts)])
    report.write_json(out, {"benchmark": "soak", "environment": facts, "seed": seed, "result": record})


if __name__ == "__main__":
    main()
