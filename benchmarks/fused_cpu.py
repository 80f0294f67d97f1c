"""The fused operators on the CPU against the calls that a program makes without them.

Each stands for arithmetic that models spell out: RMS norm and rotary embedding as in `dllmc/models/layers.py`, a
residual sum and its norm, silu and product. What is replaced is what a program without them would run: an operator a
call, over memory that exists already. They take turns; times are medians, and so are the ratios of turns.

python -m benchmarks.fused_cpu
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import report
from dllmc.ops.registry import operator

Call = Callable[[], object]

DTYPES = ("float32", "bfloat16")
SEED = 0
EPS = 1e-6
MAX_POSITIONS = 4096
# A turn repeats a call until it takes about as long.
TURN_S = 3e-4


class Sequence:
    """Calls of a program's operators, and where they leave their results."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, name: str, args: list[Any], *outs: Tensor) -> Tensor:
        """One call, and the workspace it declares; its first result."""
        op = operator(name)
        size = op.workspace_bytes([a for a in args if isinstance(a, Tensor)], "cpu")
        self.calls.append(op.bind(args, list(outs), torch.empty(size, dtype=torch.uint8) if size else None))
        return outs[0]

    def __call__(self) -> None:
        for call in self.calls:
            call()


Case = tuple[dict[str, Any], Sequence, Tensor, Sequence, Tensor]
"""What is measured; the fused call, its result; the replaced calls, theirs."""


def norm_case(op: str, tokens: int, width: int, dtype: torch.dtype) -> Case:
    """x, residual [1, tokens, width]. Intermediate results share memory as a plan would have them do."""
    x, residual = torch.randn(2, 1, tokens, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    out, total, expected, normed = (torch.empty_like(x) for _ in range(4))
    fused, replaced = Sequence(), Sequence()
    if op == "rms_norm":
        fused.add("dllmc.rms_norm.default", [x, weight, None, EPS], out)
        spelled_rms_norm(replaced, x, weight, expected)
        return {"op": op, "shape": str(width)}, fused, out, replaced, expected
    affine = [weight, None] if op == "add_rms_norm" else [weight, bias]
    fused.add(f"dllmc.{op}.default", [x, residual, *affine, EPS], out, total)
    replaced.add("aten.add.Tensor", [x, residual], normed)
    if op == "add_rms_norm":
        spelled_rms_norm(replaced, normed, weight, expected)
    else:
        replaced.add("aten.layer_norm.default", [normed, [width], weight, bias, EPS], expected)
    return {"op": op, "shape": str(width)}, fused, out, replaced, expected


def spelled_rms_norm(calls: Sequence, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`RMSNorm.forward`; in float32 it converts nothing."""
    wide, scratch = x, torch.empty(x.shape)
    if x.dtype != torch.float32:
        wide = calls.add("copy", [x], torch.empty(x.shape))
    statistic, other = torch.empty(2, *x.shape[:-1], 1)
    calls.add("aten.pow.Tensor_Scalar", [wide, 2], scratch)
    calls.add("aten.mean.dim", [scratch, [-1], True], statistic)
    calls.add("aten.add.Tensor", [statistic, EPS], other)
    calls.add("aten.rsqrt.default", [other], statistic)
    y = calls.add("aten.mul.Tensor", [wide, statistic], scratch)
    if x.dtype != torch.float32:
        y = calls.add("copy", [y], torch.empty_like(x))
    calls.add("aten.mul.Tensor", [weight, y], out)


def rope_case(tokens: int, heads: int, head_dim: int, gathered: bool, dtype: torch.dtype) -> Case:
    """Queries: columns of one projection of queries, keys and values. gathered: cos and sin are rows of tables."""
    x = torch.randn(tokens, 3 * heads, head_dim).to(dtype)[:, :heads]
    angles = torch.randn(MAX_POSITIONS if gathered else tokens, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(len(angles), (tokens,)) if gathered else None
    fused, out = Sequence(), torch.empty(x.shape, dtype=dtype)
    fused.add("dllmc.rope.default", [x, cos, sin, positions], out)
    replaced, spelled = Sequence(), x.transpose(0, 1)[None]
    if gathered:
        cos, sin = (
            replaced.add("aten.index_select.default", [t, 0, positions], torch.empty(tokens, head_dim))
            for t in (cos, sin)
        )
    wide, first, second = spelled, torch.empty_like(spelled, dtype=torch.float32), torch.empty_like(spelled).float()
    if dtype != torch.float32:
        wide = replaced.add("copy", [spelled], torch.empty_like(spelled, dtype=torch.float32))
    left, right = wide.chunk(2, dim=-1)
    negated = replaced.add("aten.neg.default", [right], torch.empty_like(right))
    swapped = replaced.add("aten.cat.default", [[negated, left], -1], first)
    of_sin = replaced.add("aten.mul.Tensor", [swapped, sin], second)
    of_cos = replaced.add("aten.mul.Tensor", [wide, cos], first)
    expected = replaced.add("aten.add.Tensor", [of_cos, of_sin], torch.empty_like(first))
    if dtype != torch.float32:
        expected = replaced.add("copy", [expected], torch.empty_like(spelled))
    facts = {"op": "rope, gathered" if gathered else "rope", "shape": f"{heads} x {head_dim}"}
    return facts, fused, out, replaced, expected[0].transpose(0, 1)


def glu_case(tokens: int, width: int, dtype: torch.dtype) -> Case:
    """Gate and up: halves of one projection."""
    gate, up = torch.randn(tokens, 2 * width).to(dtype).chunk(2, dim=-1)
    out, active, expected = (torch.empty(tokens, width, dtype=dtype) for _ in range(3))
    fused, replaced = Sequence(), Sequence()
    fused.add("dllmc.glu.default", [gate, up, "silu"], out)
    replaced.add("aten.silu.default", [gate], active)
    replaced.add("aten.mul.Tensor", [active, up], expected)
    return {"op": "glu", "shape": str(width)}, fused, out, replaced, expected


def cases(tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    for op in ("rms_norm", "add_rms_norm", "add_layer_norm"):
        yield from (norm_case(op, tokens, width, dtype) for width in (256, 1024, 4096))
    for gathered in (False, True):
        for heads in (8, 32):
            yield from (rope_case(tokens, heads, head_dim, gathered, dtype) for head_dim in (64, 128))
    yield from (glu_case(tokens, width, dtype) for width in (1024, 4096, 12288))


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One record: microseconds of the fused call and of what it replaces, median and least, and their ratio."""
    facts, fused, found, replaced, expected = case
    fused()
    replaced()
    if not torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02):
        raise click.ClickException(f"{facts}: the fused operator computes something else than what it replaces")
    times: dict[str, list[float]] = {"fused": [], "replaced": []}
    count = max(1, round(TURN_S / seconds(replaced, 3)))
    for _ in range(repeats):
        for name, call in (("fused", fused), ("replaced", replaced)):
            times[name].append(1e6 * seconds(call, count))
    return {
        **facts,
        "fused_us": statistics.median(times["fused"]),
        "replaced_us": statistics.median(times["replaced"]),
        "least_fused_us": min(times["fused"]),
        "least_replaced_us": min(times["replaced"]),
        "of_replaced": statistics.median(a / b for a, b in zip(times["fused"], times["replaced"], strict=True)),
    }


def seconds(call: Call, count: int) -> float:
    """Of one call, the mean of a few."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@click.command()
@click.option("--tokens", "token_counts", multiple=True, type=click.IntRange(1), default=(1, 16, 128, 512))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES, show_default=True)
@click.option("--repeats", default=41, show_default=True, type=click.IntRange(1))
@click.option(
    "--out", type=click.Path(path_type=Path), default=report.RESULTS / "fused_cpu.json", help="The JSON file."
)
@torch.inference_mode()
def main(token_counts: tuple[int, ...], dtypes: tuple[str, ...], repeats: int, out: Path) -> None:
    """Measure the fused operators on the CPU; the defaults take about a minute on 2 cores."""
    facts = report.environment()
    torch.manual_seed(SEED)
    records = []
    for dtype in dtypes:
        for tokens in token_counts:
            found = (measure(case, repeats) for case in cases(tokens, getattr(torch, dtype)))
            records += [{"dtype": dtype, "tokens": tokens, **record} for record in found]
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for r in records:
        row = rows.setdefault((r["op"], r["dtype"], r["shape"]), {k: r[k] for k in ("op", "dtype", "shape")})
        row[f"{r['tokens']} tokens"] = f"{r['fused_us']:.0f} us, {r['of_replaced']:.2f}x"
    title = f"Fused operators: microseconds, and the share of what they replace, medians of {repeats}"
    report.print_table(title, list(rows.values()), [report.summary(facts)])
    report.write_json(out, {"environment": facts, "setting": {"repeats": repeats}, "results": records})


if __name__ == "__main__":
    main()
