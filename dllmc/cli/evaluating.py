"""`dllmc eval`: the report of a policy in a few lines, or a table and a plot of several against dense decoding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllmc.cli import prompts, terminal
from dllmc.cli.group import Command, option
from dllmc.cli.options import (
    api_option,
    artifact_argument,
    device_option,
    json_option,
    plot_option,
    swept_cache_options,
    threads_option,
)
from dllmc.cli.report import counted, table

if TYPE_CHECKING:
    from dllmc.evaluate import Difference, Report
    from dllmc.runtime.params import CachePolicy


@click.command(
    "eval",
    cls=Command,
    epilog="\b\nExamples:\n"
    "  dllmc eval tiny.dllmc --task sudoku\n"
    "  dllmc eval code.dllmc --task code --steps 8 --examples 50 --json\n"
    "  dllmc eval code.dllmc --task code --delay 1 --retention 1,0.5,0.25 --plot code.png\n"
    "  dllmc eval llada.dllmc --task mine.jsonl --gen-length 64 --threshold 0.9",
)
@artifact_argument
@option("Task", "--task", required=True, metavar="TASK", help="sudoku, add, code, or a FILE.jsonl of one's own.")
@option("Task", "--examples", type=int, default=200, show_default=True, metavar="N", help="How many, at most.")
@option("Task", "--seed", type=int, default=0, show_default=True, metavar="N", help="Which examples are drawn.")
@option("Decoding", "--gen-length", type=int, metavar="N", help="Tokens to generate; default: the task's.")
@option("Decoding", "--block-length", type=int, metavar="N", help="Tokens denoised together; default: the task's.")
@api_option("Decoding", "steps", int, "Forward passes of an example; default: one token a pass.")
@api_option("Decoding", "threshold", float, "Commit every token at least this confident, and the best one.")
@swept_cache_options
@device_option
@threads_option
@json_option(
    "Print a JSON object a line and policy: `task`, `examples`, `accuracy`, `interval` (95 %), `forward_passes`, "
    "`tokens`, `seconds`, `tokens_per_second`, `policy`, and for code `nll` and `nll_interval` (nats a token), else "
    "null; `difference` has the same four scores minus dense decoding's, null where there is one policy."
)
@plot_option
def eval_command(
    artifact: Path,
    task: str,
    examples: int,
    seed: int,
    device: str | None,
    threads: int | str,
    as_json: bool,
    plot: Path | None,
    caches: Sequence[Mapping[str, Any]],
    **sampling: Any,
) -> None:
    """Measure how well and how fast an ARTIFACT does a task.

    sudoku and add are examples that the bundled checkpoints never saw; code are gaps of 32 tokens in modules of the
    standard library that they never saw, filled in freely for the share of right tokens, and once more with the
    truth revealed step by step for its NLL. A FILE.jsonl has an object a line with the texts `input` and `output`.

    Several values of --retention or --selection, with commas, compare policies: each retention with each selection,
    and dense decoding, over the same examples. Differences to dense have paired intervals.
    """
    if plot is not None and len(caches) == 1:
        raise click.UsageError("--plot draws scores over retention; give several, as in --retention 1,0.5,0.25")
    with terminal.progress(f"load {artifact}") as show:
        import dllmc
        from dllmc.evaluate import evaluate

        policies = [dllmc.CachePolicy(**cache) for cache in caches]
        engine = dllmc.load(artifact, device, threads=threads)
        given = {name: value for name, value in sampling.items() if value is not None}
        reports = []
        for done, policy in enumerate(policies):
            show(f"evaluate {task}, {name_of(policy)}", done, len(policies) if len(policies) > 1 else None)
            reports.append(evaluate(engine, task, examples, seed, given, cache=policy))
    if plot is not None:
        from dllmc.cli import sweep_plot

        with prompts.replacing_bytes(plot) as image:
            image.write(sweep_plot.image(policies, reports, plot.suffix.lower()))
    for line in _documents(policies, reports) if as_json else lines(policies, reports):
        click.echo(line)


def name_of(policy: "CachePolicy") -> str:
    """How a policy is told from the others of a sweep."""
    if policy.mode == "none":
        return "dense"
    return f"{policy.selection} {policy.retention:g}" if policy.retention < 1 else "all cached"


def lines(policies: "Sequence[CachePolicy]", reports: "Sequence[Report]") -> Iterator[str]:
    """What was measured, in shares, nats and tokens a second; several policies as a table, dense first."""
    if len(reports) == 1:
        yield from _of_one(reports[0])
        return
    from dllmc.evaluate import Difference

    dense = reports[0]
    yield f"{dense.task}, {counted(dense.examples, 'example')}; in brackets 95% intervals, those of differences paired"
    yield from table(
        [
            {
                "cache": name_of(policy),
                **_scores(report, None if report is dense else Difference.of(report, dense)),
                "passes": f"{report.forward_passes / report.examples:.1f}",
                "tokens/s": f"{report.tokens_per_second:.0f}",
            }
            for policy, report in zip(policies, reports, strict=True)
        ]
    )


def _scores(report: "Report", difference: "Difference | None") -> dict[str, str]:
    accuracy = "{:.1%} [{:.1%}, {:.1%}]".format(report.accuracy, *report.interval)
    less = "" if difference is None else "{:+.1%} [{:+.1%}, {:+.1%}]".format(difference.accuracy, *difference.interval)
    scores = {"accuracy": accuracy, "to dense": less}
    if report.nll is not None and report.nll_interval is not None:
        scores["NLL"] = "{:.3f} [{:.3f}, {:.3f}]".format(report.nll, *report.nll_interval)
        scores["NLL to dense"] = ""
        if difference is not None and difference.nll is not None and difference.nll_interval is not None:
            scores["NLL to dense"] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(difference.nll, *difference.nll_interval)
    return scores


def _of_one(measured: "Report") -> Iterator[str]:
    low, high = measured.interval
    unit = "missing tokens" if measured.nll is not None else "answers"
    yield f"task      {measured.task}, {counted(measured.examples, 'example')}"
    yield f"accuracy  {measured.accuracy:.1%} of {unit} right (95% interval {low:.1%} to {high:.1%})"
    if measured.nll is not None and measured.nll_interval is not None:
        low, high = measured.nll_interval
        interval = f"(95% interval {low:.3f} to {high:.3f})"
        yield f"NLL       {measured.nll:.3f} nats a missing token, teacher-forced {interval}"
    each = measured.forward_passes / measured.examples
    yield f"passes    {counted(measured.forward_passes, 'forward pass')}, {each:.1f} an example"
    yield f"speed     {measured.tokens_per_second:.0f} tokens/s ({measured.tokens} in {measured.seconds:.2f} s)"


def _documents(policies: "Sequence[CachePolicy]", reports: "Sequence[Report]") -> Iterator[str]:
    """The same as a document a line, for tools."""
    from dllmc.evaluate import Difference

    for policy, report in zip(policies, reports, strict=True):
        scores = {name: value for name, value in asdict(report).items() if name not in ("scores", "nlls")}
        difference = None if len(reports) == 1 else asdict(Difference.of(report, reports[0]))
        document = {**scores, "tokens_per_second": report.tokens_per_second, "policy": asdict(policy)}
        yield prompts.json_line({**document, "difference": difference})
