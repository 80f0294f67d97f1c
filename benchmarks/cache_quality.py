"""What cached decoding costs in quality: policies against dense decoding, on the same examples.

code: gaps of 32 tokens in 768 of held-out Python source, teacher-forced, one token a step, so that nearly all steps are
Reuse; nats a token. sudoku, add: share of answers that are right. Differences to dense are paired, so their intervals
are of the difference alone. Policies take a delay of one step, as dLLM-Serve's and Sparse-dLLM's do.

python -m benchmarks.cache_quality
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import click

import dllmc
from benchmarks import report
from dllmc.evaluate import INFILLING, evaluate, infilling_nlls, normal, paired

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINTS = {"code": "tiny-llada-code", "sudoku": "tiny-llada", "add": "tiny-llada"}
RETENTIONS = {"per_head": (1.0, 0.5, 0.25, 0.1), "shared": (0.5, 0.25, 0.1)}


def policies() -> Iterator[tuple[str, float, dllmc.CachePolicy]]:
    """Selection, retention and policy; dense first."""
    yield "dense", 1.0, dllmc.CachePolicy(mode="none")
    for selection, retentions in RETENTIONS.items():
        for retention in retentions:
            yield selection, retention, dllmc.CachePolicy(retention=retention, selection=selection, delay=1)


def scores(engine: dllmc.Engine, task: str, count: int, seed: int, policy: dllmc.CachePolicy) -> Sequence[float]:
    """Of each of `count` examples: nats a token, or whether the answer is right."""
    if task == INFILLING:
        return infilling_nlls(engine, count, seed, cache=policy)
    return evaluate(engine, task, count, seed, cache=policy).scores


def record(selection: str, retention: float, measured: Sequence[float], dense: Sequence[float]) -> dict[str, Any]:
    """Mean score and its difference to dense decoding, each with a 95 % interval."""
    differences = paired(measured, dense)
    return {
        "selection": selection,
        "retention": retention,
        "score": fmean(measured),
        "interval": normal(measured),
        "difference": fmean(differences),
        "difference_interval": normal(differences),
    }


def print_records(task: str, count: int, records: Sequence[dict[str, Any]]) -> None:
    """The table of a task."""
    rows = [
        {
            "selection": r["selection"],
            "retention": r["retention"],
            "nats a token" if task == INFILLING else "right": f"{r['score']:.4f}",
            "95 %": "{:.4f} to {:.4f}".format(*r["interval"]),
            "to dense": f"{r['difference']:+.4f}",
            "its 95 %": "{:+.4f} to {:+.4f}".format(*r["difference_interval"]),
        }
        for r in records
    ]
    report.print_table(f"{task}: {count} examples", rows)


@click.command()
@click.option("--code", default=1000, show_default=True, help="Gaps of the task code.")
@click.option("--answers", default=500, show_default=True, help="Examples of sudoku, and of add.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "cache_quality.json")
def main(code: int, answers: int, seed: int, out: Path) -> None:
    """Measure the policies; the defaults take about two hours on 2 cores."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, count in (("sudoku", answers), ("add", answers), ("code", code)):
            if not count:
                continue
            artifact = Path(folder) / CHECKPOINTS[task]
            if not artifact.exists():
                dllmc.compile(EXAMPLES / artifact.name, artifact)
            engine = dllmc.load(artifact)
            measured = []
            for selection, retention, policy in policies():
                click.echo(f"{task}: {selection} {retention}", err=True)
                measured.append((selection, retention, scores(engine, task, count, seed, policy)))
            records = [record(*one, dense=measured[0][2]) for one in measured]
            print_records(task, count, records)
            results[task] = {"examples": count, "results": records}
    policy = asdict(next(policy for name, _, policy in policies() if name != "dense"))
    setting = {name: policy[name] for name in ("mode", "pool", "delay", "refresh_interval")}
    report.write_json(out, {"environment": report.environment(), "seed": seed, "setting": setting, "tasks": results})


if __name__ == "__main__":
    main()
