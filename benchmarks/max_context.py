"""The longest sequence that one dense step takes within a budget of activations: dllmc against eager decoders.

At LLaDA-8B's and Dream-7B's shapes from the plan of the compiled step, and from what an eager decoder cannot do without
(`context_planned.py`); for a small model as the resident memory of a process grows (`context_measured.py`).

python -m benchmarks.max_context
"""

from pathlib import Path
from typing import Any

import click

from benchmarks import context_planned, report

PLANNED_NOTES = (
    "dllmc: the planned arena of a step of one request in bfloat16; its inputs are 16 bytes a token besides",
    "eager: logits and probabilities [tokens, V] in bfloat16 and nothing else; logits in bfloat16 with their copy and",
    "  their probabilities in float64 and nothing else; with the head in chunks, which are not counted, what layers of",
    "  the module hold at their widest, counted by running it on tensors without memory",
    "longer than models were trained for: angles come from positions, so it is a matter of sense and not of memory",
)


def print_planned(records: list[dict[str, Any]], budget: int, rows: int, chunk: int) -> None:
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
    title = (
        f"Longest sequence of a dense step in {budget / 2**30:g} GiB, {rows} rows predicted, chunks of {chunk} tokens"
    )
    report.print_table(title, table, PLANNED_NOTES)


@click.command()
@click.option("--budget-gib", default=8.0, show_default=True, help="Of activations, at the published shapes.")
@click.option("--layers", type=click.IntRange(1), help="At the published shapes.  [default: all]")
@click.option("--rows", default=32, show_default=True, help="Masked positions that a step predicts.")
@click.option("--chunk", default=256, show_default=True, help="Tokens that dllmc's loops take at a time.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "max_context.json")
def main(budget_gib: float, layers: int | None, rows: int, chunk: int, out: Path) -> None:
    """Plan and measure; the defaults take about fifteen minutes on 2 cores."""
    facts = report.environment()
    budget = int(budget_gib * 2**30)
    planned = [
        record
        for shape in context_planned.SHAPES
        for record in context_planned.measure(shape, layers or shape.layers, budget, rows, chunk)
    ]
    print_planned(planned, budget, rows, chunk)
    setting = {"budget_bytes": budget, "rows": rows, "chunk": chunk}
    report.write_json(out, {"environment": facts, "planned": {"setting": setting, "results": planned}})


if __name__ == "__main__":
    main()
