"""Decoding beside other busy processes: how much longer it takes with a fixed number of threads, and with `auto`.

    python -m benchmarks.busy_cpu

The bundled model of Python source decodes one request with a cache, in a fresh process for every measurement, while so
many other processes count in a loop. Settings take turns; figures are the best of several decodes, as a multiple of
the best on the idle machine.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import dllmc
from benchmarks import report

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-llada-code"
SETTINGS: tuple[int | str | None, ...] = (None, 1, "auto")
PARAMS = dllmc.SamplingParams(gen_length=128, block_length=32, steps=64, ignore_eos=True)
PROMPT_TOKENS = 200


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run so many processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def decode(artifact: str, threads: int | str | None, repeats: int) -> float:
    """Seconds of the best of several decodes, after one that is not timed."""
    engine = dllmc.load(artifact, threads=threads)
    prompt = [100 + index for index in range(PROMPT_TOKENS)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.generate([prompt], PARAMS, dllmc.CachePolicy())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def in_fresh_process(artifact: Path, threads: int | str | None, repeats: int) -> float:
    """The same, measured in a process of its own."""
    given = json.dumps([str(artifact), threads, repeats])
    call = f"import json; from benchmarks.busy_cpu import decode; print(decode(*json.loads({given!r})))"
    done = subprocess.run([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def measure(artifact: Path, loads: Sequence[int], turns: int, repeats: int) -> list[dict[str, Any]]:
    """The best time of each setting beside each number of busy processes."""
    best: dict[tuple[int, int | str | None], float] = {}
    for _ in range(turns):
        for processes in loads:
            with busy(processes):
                for threads in SETTINGS:
                    seconds = in_fresh_process(artifact, threads, repeats)
                    key = processes, threads
                    best[key] = min(seconds, best.get(key, seconds))
    idle = best[0, None]
    return [
        {"busy_processes": processes, "threads": threads, "seconds": seconds, "of_idle": seconds / idle}
        for (processes, threads), seconds in best.items()
    ]


@click.command()
@click.option("--turns", default=3, show_default=True, help="Times that every setting is measured.")
@click.option("--repeats", default=5, show_default=True, help="Decodes of a measurement.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "busy_cpu.json")
def main(turns: int, repeats: int, out: Path) -> None:
    """Measure decoding beside 0, 1 and 2 busy processes; takes about three minutes."""
    facts = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        artifact = dllmc.compile(CHECKPOINT, Path(folder) / "artifact").path
        records = measure(artifact, (0, 1, 2), turns, repeats)
    rows = [
        {
            "busy processes": r["busy_processes"],
            "threads": "torch's" if r["threads"] is None else r["threads"],
            "seconds": f"{r['seconds']:.3f}",
            "of idle": f"{r['of_idle']:.2f}x",
        }
        for r in records
    ]
    report.print_table("Decoding beside other busy processes", rows, notes=[report.summary(facts)])
    setting = {"turns": turns, "repeats": repeats, "prompt_tokens": PROMPT_TOKENS}
    report.write_json(out, {"benchmark": "busy_cpu", "environment": facts, "setting": setting, "results": records})


if __name__ == "__main__":
    main()
