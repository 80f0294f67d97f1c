"""The fused head on the CPU against the matrix product inside it, which no head can do without.

`dllmc::decode_head` chooses a token and its probability for every row; the bare GEMM only computes the logits: in one
go into a [rows, vocab] tensor that exists already, and in the head's own tiles. They take turns; figures are medians.

python -m benchmarks.head_cpu
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import report
from dllmc.ops.decode_head import Tiling, decode_head_out, workspace_bytes
from dllmc.spec import MAX_SUPPRESS_TOKENS

SEED = 0
WEIGHT_STD = 0.02


def contenders(hidden: Tensor, weight: Tensor, logits: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is compared, over memory allocated here: greedy head [R] tokens, and two ways to logits [R, V]."""
    rows, vocab = logits.shape
    tiling = Tiling.of(rows, vocab, hidden.shape[1], hidden.dtype)
    workspace = torch.empty(workspace_bytes(rows, vocab, hidden.shape[1], hidden.dtype), dtype=torch.uint8)
    tile = workspace.view(torch.float32)
    token, confidence, logprob = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    segment, position = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    zero = torch.zeros(1, dtype=torch.int64)
    suppressed = torch.full((1, MAX_SUPPRESS_TOKENS), -1)
    tables = (torch.zeros(1), zero, torch.ones(1), zero, zero, zero, suppressed)  # one greedy request

    def head() -> Tensor:
        outs = {"token": token, "confidence": confidence, "logprob": logprob}
        decode_head_out(hidden, weight, None, 1.0, segment, position, *tables, **outs, workspace=workspace)
        return token

    def whole() -> Tensor:
        return torch.mm(hidden, weight.T, out=logits)

    def tiled() -> Tensor:
        for first in range(0, rows, tiling.rows):
            part = hidden[first : first + tiling.rows]
            for start in range(0, vocab, tiling.columns):
                columns = weight[start : start + tiling.columns]
                out = tile[: len(part) * len(columns)].view(len(part), len(columns))
                torch.mm(part, columns.T, out=out)
        return tile

    return {"head": head, "whole": whole, "tiled": tiled}


def measure(rows: int, weight: Tensor, repeats: int) -> dict[str, Any]:
    """One record: median milliseconds of each contender, and what the head's are of either GEMM's."""
    hidden = torch.randn(rows, weight.shape[1])
    logits = torch.empty(rows, weight.shape[0])
    calls = contenders(hidden, weight, logits)
    calls["whole"]()
    if not torch.equal(calls["head"](), logits.argmax(1)):
        raise click.ClickException(f"{rows} rows: the head chose other tokens than the argmax of the logits")
    calls["tiled"]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "head_ms": ms["head"],
        "gemm_ms": ms["whole"],
        "tiled_gemm_ms": ms["tiled"],
        "of_gemm": ms["head"] / ms["whole"],
        "of_tiled_gemm": ms["head"] / ms["tiled"],
        "runs_ms": times,
    }


@click.command()
@click.option("--vocab", default=126464, show_default=True, help="Width of the head; the default is LLaDA-8B's.")
@click.option("--hidden", default=1024, show_default=True)
@click.option("--rows", "row_counts", multiple=True, type=click.IntRange(1), default=(1, 8, 16, 32, 64, 128))
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "head_cpu.json", help="The JSON file.")
@torch.inference_mode()
def main(vocab: int, hidden: int, row_counts: tuple[int, ...], repeats: int, out: Path) -> None:
    """Measure the fused head on the CPU in float32; the defaults take about a minute on 2 cores."""
    facts = report.environment()
    torch.manual_seed(SEED)
    weight = torch.empty(vocab, hidden).normal_(0, WEIGHT_STD)
    records = [measure(rows, weight, repeats) for rows in row_counts]
    rows = [
        {
            "rows": r["rows"],
            "decode_head ms": f"{r['head_ms']:.2f}",
            "GEMM ms": f"{r['gemm_ms']:.2f}",
            "tiled GEMM ms": f"{r['tiled_gemm_ms']:.2f}",
            "of GEMM": f"{r['of_gemm']:.2f}x",
            "of tiled GEMM": f"{r['of_tiled_gemm']:.2f}x",
        }
        for r in records
    ]
    title = f"Fused head, vocabulary {vocab}, hidden {hidden}, float32, medians of {repeats}"
    report.print_table(title, rows, [report.summary(facts)])
    setting = {"vocab": vocab, "hidden": hidden, "dtype": "float32", "repeats": repeats}
    report.write_json(out, {"environment": facts, "setting": setting, "results": records})


if __name__ == "__main__":
    main()
