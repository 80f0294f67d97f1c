"""The fused head on the CPU against the matrix product inside it, which no head can do without.

`dllmc::decode_head` chooses a token and its probability for every row; the bare GEMM only computes the logits, into a
[rows, vocab] tensor that exists already: in the weights' dtype, as torch runs it on this CPU, and in float32, which is
the fair measure of a dtype that the CPU has no instructions for. They take turns; figures are medians.

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
from dllmc.ops.decode_head import decode_head_out, workspace_bytes
from dllmc.ops.linear import has_native_gemm
from dllmc.spec import MAX_SUPPRESS_TOKENS

DTYPES = ("float32", "bfloat16", "float16")
SEED = 0
WEIGHT_STD = 0.02


def greedy_head(hidden: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The head over memory allocated here, every row of one greedy request: tokens [R]."""
    rows, vocab = len(hidden), len(weight)
    workspace = torch.empty(workspace_bytes(rows, vocab, hidden.shape[1], hidden.dtype), dtype=torch.uint8)
    token = torch.empty(rows, dtype=torch.int64)
    outs = {"token": token, "confidence": torch.empty(rows), "logprob": torch.empty(rows), "workspace": workspace}
    of_rows = (torch.zeros(rows, dtype=torch.int64), torch.arange(rows), torch.full((rows,), -1))
    zero = torch.zeros(1, dtype=torch.int64)
    tables = (torch.zeros(1), zero, torch.ones(1), zero, zero, zero, torch.full((1, MAX_SUPPRESS_TOKENS), -1))

    def head() -> Tensor:
        decode_head_out(hidden, weight, None, 1.0, *of_rows, *tables, **outs)
        return token

    return head


def bare_gemm(hidden: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Logits [R, V] in the dtype of the operands."""
    logits = hidden.new_empty(len(hidden), len(weight))
    return lambda: torch.mm(hidden, weight.T, out=logits)


def measure(rows: int, weight: Tensor, weight32: Tensor, repeats: int) -> dict[str, Any]:
    """One record: median milliseconds of each contender, and what the head's are of either GEMM's."""
    hidden = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    calls = {"head": greedy_head(hidden, weight), "whole": bare_gemm(hidden, weight)}
    float32 = bare_gemm(hidden.float(), weight32)
    token, logits = calls["head"](), float32()
    rounding = torch.finfo(weight.dtype).eps if has_native_gemm(weight.dtype) else 0.0
    best, chosen = logits.amax(1), logits.gather(1, token[:, None])[:, 0]
    if not torch.all(chosen >= best - rounding * best.abs()):
        raise click.ClickException(f"{rows} rows: the head chose other tokens than the argmax of the logits")
    if weight is not weight32:
        calls["float32"] = float32
    calls["whole"]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(values) for name, values in times.items()}
    float32_ms = ms.get("float32", ms["whole"])
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "native": has_native_gemm(weight.dtype),
        "rows": rows,
        "head_ms": ms["head"],
        "gemm_ms": ms["whole"],
        "float32_gemm_ms": float32_ms,
        "of_gemm": ms["head"] / ms["whole"],
        "of_float32_gemm": ms["head"] / float32_ms,
        "runs_ms": times,
    }


@click.command()
@click.option("--vocab", default=126464, show_default=True, help="Width of the head; the default is LLaDA-8B's.")
@click.option("--hidden", default=1024, show_default=True)
@click.option("--rows", "row_counts", multiple=True, type=click.IntRange(1), default=(1, 8, 16, 32, 64, 128))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES, show_default=True)
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "head_cpu.json", help="The JSON file.")
@torch.inference_mode()
def main(
    vocab: int, hidden: int, row_counts: tuple[int, ...], dtypes: tuple[str, ...], repeats: int, out: Path
) -> None:
    """Measure the fused head on the CPU; the defaults take about five minutes on 2 cores."""
    facts = report.environment()
    torch.manual_seed(SEED)
    weight = torch.empty(vocab, hidden).normal_(0, WEIGHT_STD)
    records = []
    for name in dtypes:
        rounded = weight.to(getattr(torch, name))
        weight32 = rounded.float()
        records += [measure(rows, rounded, weight32, repeats) for rows in row_counts]
    rows = [
        {
            "dtype": r["dtype"],
            "rows": r["rows"],
            "decode_head ms": f"{r['head_ms']:.2f}",
            "GEMM ms": f"{r['gemm_ms']:.2f}",
            "float32 GEMM ms": f"{r['float32_gemm_ms']:.2f}",
            "of GEMM": f"{r['of_gemm']:.2f}x",
            "of float32 GEMM": f"{r['of_float32_gemm']:.2f}x",
        }
        for r in records
    ]
    emulated = [name for name in dtypes if not has_native_gemm(getattr(torch, name))]
    notes = [f"no instructions of this CPU multiply matrices of {' or '.join(emulated)}"] if emulated else []
    title = f"Fused head, vocabulary {vocab}, hidden {hidden}, medians of {repeats}"
    report.print_table(title, rows, [*notes, report.summary(facts)])
    setting = {"vocab": vocab, "hidden": hidden, "repeats": repeats}
    report.write_json(out, {"environment": facts, "setting": setting, "results": records})


if __name__ == "__main__":
    main()
