"""What cached decoding costs in quality: policies against dense decoding, on the same examples.

code: gaps of 32 tokens in 768 of held-out Python source, teacher-forced, one token a step, so that nearly all steps are
Reuse; nats a token. sudoku, add: share of answers that are right. Differences to dense are paired, so their intervals
are of the difference alone. Policies take a delay of one step, as dLLM-Serve's and Sparse-dLLM's do.

python -m benchmarks.cache_quality
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click

import dllmc
from benchmarks import report
from dllmc.evaluate import GAP, WINDOW, normal
from dllmc.runtime.engine import Engine
from dllmc.tasks import addition, python_source, sudoku

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = {"sudoku": sudoku.TASK, "add": addition.TASK}
CHECKPOINTS = {"code": "tiny-llada-code", "sudoku": "tiny-llada", "add": "tiny-llada"}
RETENTIONS = {"per_head": (1.0, 0.5, 0.25, 0.1), "shared": (0.5, 0.25, 0.1)}
AT_ONCE = 32  # examples that are decoded together


@dataclass(frozen=True)
class Measured:
    """A policy's scores, one an example, and what they took."""

    scores: list[float]
    forward_passes: int
    seconds: float


def policies() -> Iterator[tuple[str, float, dllmc.CachePolicy]]:
    """Selection, retention and policy; dense first."""
    yield "dense", 1.0, dllmc.CachePolicy(mode="none")
    for selection, retentions in RETENTIONS.items():
        for retention in retentions:
            yield selection, retention, dllmc.CachePolicy(retention=retention, selection=selection, delay=1)


def measure(engine: Engine, task: str, count: int, seed: int, policy: dllmc.CachePolicy) -> Measured:
    """Decode `count` examples of a task under a policy."""
    if task == "code":
        prompts, params = _gaps(engine, count, seed)
    else:
        examples = TEXTS[task].examples(count, seed)
        length = TEXTS[task].gen_length
        assert length is not None
        prompts = [dllmc.Prompt(e.input) for e in examples]
        params = [dllmc.SamplingParams(gen_length=length, block_length=length)] * count
    began = time.perf_counter()
    results = []
    for at in range(0, count, AT_ONCE):
        part = slice(at, at + AT_ONCE)
        results += engine.generate(prompts[part], params[part], policy)
        click.echo(f"\r{task}  {policy}: {len(results)} of {count}", nl=False, err=True)
    seconds = time.perf_counter() - began
    click.echo(err=True)
    if task == "code":
        scores = [-fmean((result.logprobs or [])[:GAP]) for result in results]
    else:
        scores = [float(TEXTS[task].is_right(e, str(r.text))) for e, r in zip(examples, results, strict=True)]
    return Measured(scores, sum(result.forward_passes for result in results), seconds)


def _gaps(engine: Engine, count: int, seed: int) -> tuple[list[dllmc.Prompt], list[dllmc.SamplingParams]]:
    assert engine.tokenizer is not None
    end = engine.spec.end_ids[0]
    prompts, params = [], []
    for gap in python_source.gaps(engine.tokenizer.encode, end, count, seed, WINDOW, GAP):
        known = {at - gap.start: gap.window[at] for at in range(gap.start + gap.length, len(gap.window))}
        prompts.append(dllmc.Prompt(gap.window[: gap.start], known, gap.window[gap.start :]))
        length = len(gap.window) - gap.start
        params.append(dllmc.SamplingParams(gen_length=length, block_length=GAP, ignore_eos=True, logprobs=True))
    return prompts, params


def record(selection: str, retention: float, measured: Measured, dense: Measured) -> dict[str, Any]:
    """Mean score and its difference to dense decoding, each with a 95 % interval."""
    differences = [score - base for score, base in zip(measured.scores, dense.scores, strict=True)]
    return {
        "selection": selection,
        "retention": retention,
        "score": fmean(measured.scores),
        "interval": normal(measured.scores),
        "difference": fmean(differences),
        "difference_interval": normal(differences),
        "forward_passes": measured.forward_passes,
        "seconds": measured.seconds,
    }


def print_records(task: str, count: int, records: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """The table of a task."""
    rows = [
        {
            "selection": r["selection"],
            "retention": r["retention"],
            "nats a token" if task == "code" else "right": f"{r['score']:.4f}",
            "95 %": "{:.4f} to {:.4f}".format(*r["interval"]),
            "to dense": f"{r['difference']:+.4f}",
            "its 95 %": "{:+.4f} to {:+.4f}".format(*r["difference_interval"]),
            "passes": r["forward_passes"],
            "seconds": f"{r['seconds']:.1f}",
        }
        for r in records
    ]
    report.print_table(f"{task}: {count} examples", rows, notes)


@click.command()
@click.option("--code", default=1000, show_default=True, help="Gaps of the task code.")
@click.option("--answers", default=500, show_default=True, help="Examples of sudoku, and of add.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "cache_quality.json")
def main(code: int, answers: int, seed: int, out: Path) -> None:
    """Measure the policies; the defaults take about an hour and a half on 2 cores."""
    facts = report.environment()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in sorted(set(CHECKPOINTS.values())):
            dllmc.compile(EXAMPLES / checkpoint, Path(folder) / checkpoint)
        for task, count in (("code", code), ("sudoku", answers), ("add", answers)):
            if not count:
                continue
            engine = dllmc.load(Path(folder) / CHECKPOINTS[task])
            measured = [(s, r, measure(engine, task, count, seed, policy)) for s, r, policy in policies()]
            dense = measured[0][2]
            records = [record(selection, retention, one, dense) for selection, retention, one in measured]
            print_records(task, count, records, (report.summary(facts),))
            results[task] = {"examples": count, "results": records}
    policy = asdict(next(policy for name, _, policy in policies() if name != "dense"))
    setting = {name: policy[name] for name in ("mode", "pool", "delay", "refresh_interval")}
    report.write_json(out, {"environment": facts, "seed": seed, "setting": setting, "tasks": results})


if __name__ == "__main__":
    main()
