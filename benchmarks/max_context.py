"""The longest sequence that one dense step takes within a budget of activations: dllmc against eager decoders.

At LLaDA-8B's and Dream-7B's shapes from the plan of the compiled step, and from what an eager decoder cannot do without
(`context_planned.py`); for a small model as the resident memory of a process grows (`context_measured.py`).

python -m benchmarks.max_context
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import context_measured, context_planned, report
from benchmarks.context_measured import ROWS, Setting

PLANNED_NOTES = (
    "dllmc: the planned arena of a step of one request in bfloat16; its inputs are 16 bytes a token besides",
    "eager: logits and probabilities [tokens, V] in bfloat16 and nothing else; logits in bfloat16 with their copy and",
    "  their probabilities in float64 and nothing else; with the head in chunks, which are not counted, what layers of",
    "  the module hold at their widest, counted by running it on tensors without memory",
    "longer than models were trained for: angles come from positions, so it is a matter of sense and not of memory",
)
MEASURED_NOTES = (
    "each length in a process of its own, in float32 on the CPU: peak of resident memory, less what it was before the",
    "  model was opened, and less the weights; dllmc's arena and state, all that its loading and Python take, count",
    "eager: LLaDA's published decoder with its softmax in float32 and in float64, and with the head alone in chunks",
)


def print_planned(records: list[dict[str, Any]], budget: int) -> None:
    """The table of what follows from plans and shapes."""
    table = [
        {
            "model": r["model"],
            "decoder": r["decoder"],
            "tokens": r["tokens"],
            "KiB a token": f"{r['bytes_a_token'] / 1024:.2f}",
            "of the bound": f"{r['of_bound']:.3f}",
            "dllmc has": f"{r['dllmc_has_times']:.1f}x",
        }
        for r in records
    ]
    title = f"Longest sequence of a dense step in {budget / 2**30:g} GiB, of which {ROWS} rows are predicted"
    report.print_table(title, table, PLANNED_NOTES)


def print_measured(records: list[dict[str, Any]], setting: Setting, budget: int, facts: dict[str, Any]) -> None:
    """The table of what was measured."""
    longest = records[-1]["tokens"]
    table = [
        {
            "decoder": r["decoder"],
            "tokens": r["tokens"],
            "grown MiB": f"{r['grown_bytes'] / 2**20:.1f}",
            "planned MiB": f"{r['planned_bytes'] / 2**20:.1f}" if r["planned_bytes"] else "-",
            "dllmc has": f"{longest / r['tokens']:.1f}x",
        }
        for r in records
    ]
    s = setting
    title = f"Longest sequence of a dense step by which a process grows by {budget / 2**20:g} MiB, measured"
    model = f"model: vocabulary {s.vocab}, hidden {s.hidden}, {s.layers} layers, {s.heads} heads, MLP {s.mlp}"
    report.print_table(title, table, [*MEASURED_NOTES, model, report.summary(facts)])


@click.command()
@click.option("--budget-gib", default=8.0, show_default=True, help="Of activations, at the published shapes.")
@click.option("--depth", type=click.IntRange(2), help="Layers of the published shapes.  [default: all]")
@click.option("--budget-mib", default=128.0, show_default=True, help="That a measured process may grow by.")
@click.option("--vocab", default=32768, show_default=True, help="Of the model that is measured, as all below.")
@click.option("--hidden", default=512, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--mlp", default=1536, show_default=True, help="Width of the feed-forward layers.")
@click.option("--chunk", default=256, show_default=True, help="Tokens that dllmc's loops take at a time, in both.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "max_context.json")
def main(budget_gib: float, depth: int | None, budget_mib: float, out: Path, **sizes: int) -> None:
    """Plan and measure; the defaults take about fifteen minutes on 2 cores."""
    facts, setting = report.environment(), Setting(**sizes)
    planned_budget, measured_budget = int(budget_gib * 2**30), int(budget_mib * 2**20)
    planned = [
        record
        for shape in context_planned.SHAPES
        for record in context_planned.measure(shape, depth or shape.layers, planned_budget, ROWS, setting.chunk)
    ]
    print_planned(planned, planned_budget)
    measured = [context_measured.longest(d, setting, measured_budget) for d in setting.bytes_a_token()]
    print_measured(measured, setting, measured_budget, facts)
    parts = {
        "planned": {"budget_bytes": planned_budget, "rows": ROWS, "chunk": setting.chunk, "results": planned},
        "measured": {"budget_bytes": measured_budget, "setting": asdict(setting), "results": measured},
    }
    report.write_json(out, {"environment": facts, **parts})


if __name__ == "__main__":
    main()
