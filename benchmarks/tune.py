"""Finds how kernels are launched best on this GPU, for the shapes that serving has, and stores it as data.

Every candidate is tried at every shape, checked against the same reference as `benchmarks.gpu` checks, and timed as
there; what is right and clearly faster than the kernel's default goes into `dllmc/ops/kernels/tuned.json`, by compute
capability, kernel, dtype and bucket of sizes (`dllmc/ops/kernels/configs.py`). What is not better is not stored.

python -m benchmarks.tune
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks import report
from benchmarks.gpu import device as devices
from benchmarks.gpu.cases import Case, Maker, Sample
from benchmarks.gpu.kernels import BLOCK, bound, error_of, samples_of
from benchmarks.gpu.models import MODELS
from dllmc.ops.kernels import configs

Fields = Mapping[str, Any]
Key = tuple[str, str, str, str]  # kernel, compute capability, dtype, bucket
# Key -> candidate -> its seconds over the default's, of each shape in the bucket
Ratios = dict[Key, dict[int, list[float]]]

BETTER = 0.97
"""What of the default's time a candidate may take to be stored: below what two runs of the same differ by."""


@dataclass(frozen=True)
class Tunable:
    """A kernel by the name under which it asks for its configuration. `cases`: shapes; `candidates`: fields to try."""

    kernel: str
    cases: Callable[[Maker], Iterator[Case]]
    candidates: Sequence[Fields]


def _launches(tiles: Sequence[int], warps: Sequence[int]) -> list[Fields]:
    """Of `configs.Launch`. A program has no fewer elements than threads."""
    return [{"tile": t, "warps": w} for t, w in product(tiles, warps) if t >= 32 * w]


def _tiles() -> list[Fields]:
    """Of `attention.Tile`."""
    shapes = product((16, 32, 64, 128), (32, 64, 128), (4, 8), ((3, 2), (4, 3), (5, 3)))
    programs = {4: 2, 8: 1}
    return [
        {"rows": rows, "keys": keys, "warps": warps, "programs": programs[warps], "stages": stages}
        for rows, keys, warps, stages in shapes
        if rows <= 16 * warps  # a warp has 16 rows of a product at least, and no more than its registers hold
    ]


def _rows(name: str) -> Callable[[Maker], Iterator[Case]]:
    def cases(maker: Maker) -> Iterator[Case]:
        for tokens in (32, 512, 2048, 16384):
            yield from (case for case in maker.rows_of(tokens) if case.op == name)

    return cases


def _refresh(maker: Maker) -> Iterator[Case]:
    for count, length in ((1, 512), (16, 512), (64, 512), (1, 2048), (16, 2048)):
        yield from maker.refresh(count, length)


def _reuse(maker: Maker) -> Iterator[Case]:
    for count, cached in product((1, 4, 16, 64), (512, 2048)):
        yield from maker.reuse(count, cached, BLOCK)


def _keep(maker: Maker) -> Iterator[Case]:
    for count, length in ((1, 512), (16, 512), (64, 512), (1, 2048), (16, 2048)):
        yield from maker.keep(count, length, BLOCK, 0.5)


def _head(maker: Maker) -> Iterator[Case]:
    for rows in (8, 16, 32, 64, 512, 2048):
        yield from maker.head(rows, "greedy")


def _head_tiles() -> list[Fields]:
    """Of `decode_head.Tile`, whose rows are those of the call. Beyond `head_tiles.FUSED_ROWS` its warps alone count."""
    return [{"width": w, "warps": n, "stages": s} for w, n, s in product((32, 64, 128), (4, 8), (2, 3, 4, 5))]


TUNABLES = (
    Tunable("decode_head", _head, _head_tiles()),
    Tunable("attention_cached", _reuse, _tiles()),
    Tunable("attention", _refresh, _tiles()),
    Tunable("keep", _keep, _launches((2048, 4096, 8192, 16384), (4, 8))),
    Tunable("select", _keep, _launches((512, 1024, 2048, 4096), (4, 8, 16))),
    Tunable("norm", _rows("dllmc.add_rms_norm.default"), _launches((1024, 2048, 4096), (4, 8, 16))),
    Tunable("rope", _rows("dllmc.rope.default"), _launches((512, 1024, 2048, 4096), (1, 2, 4, 8))),
    Tunable("glu", _rows("dllmc.glu.default"), _launches((512, 1024, 2048, 4096), (2, 4, 8))),
)
"""Every kernel that asks `configs.configured`; another one is an entry here."""


@contextmanager
def trying(kernel: str, fields: Fields) -> Iterator[set[Key]]:
    """Launch a kernel with these fields, whatever is stored; yields the keys that it asks for."""
    asked: set[Key] = set()
    stored = configs.stored

    def found(name: str, capability: str, dtype: str, key: str) -> Fields:
        if name != kernel:
            return stored(name, capability, dtype, key)
        asked.add((name, capability, dtype, key))
        return fields

    with patch.object(configs, "stored", found):
        yield asked


def tune(tunable: Tunable, maker: Maker, deadline: float, ratios: Ratios) -> None:
    """Time a kernel's candidates at its shapes, until the deadline on `time.monotonic`'s clock."""
    for case in tunable.cases(maker):
        samples = samples_of(case, case.make())
        with trying(tunable.kernel, {}) as asked:
            default = seconds_of(case, samples, maker.device)
        for number, fields in enumerate(tunable.candidates):
            if time.monotonic() > deadline:
                return
            with trying(tunable.kernel, fields):
                ratio = seconds_of(case, samples, maker.device) / default
            for key in asked:
                ratios.setdefault(key, {}).setdefault(number, []).append(ratio)
        del samples
        devices.release(maker.device)


def seconds_of(case: Case, samples: Sequence[Sample], device: torch.device) -> float:
    """Of a call; infinite where it is wrong, or the GPU has not the resources for it."""
    try:
        calls = [bound(case.op, sample, device)[0] for sample in samples]
        if not error_of(samples[0], calls[0], device) <= case.inside:
            return math.inf
        return devices.timed(calls, device).seconds
    except Exception as error:  # Triton has a class of its own for each resource
        click.echo(f"{case.op} {dict(case.facts)}: {type(error).__name__}", err=True)
        return math.inf


def best(ratios: Mapping[int, Sequence[float]]) -> tuple[int, float] | None:
    """The candidate with the least mean ratio over a bucket's shapes, and that ratio; None if none is clearly better.

    Only candidates that were tried at all of these shapes count.
    """
    shapes = max(map(len, ratios.values()), default=0)
    means = {number: statistics.fmean(found) for number, found in ratios.items() if len(found) == shapes}
    number = min(means, key=means.__getitem__, default=None)
    return None if number is None or means[number] > BETTER else (number, means[number])


def merged(stored: Mapping[str, Any], found: Mapping[Key, Fields]) -> dict[str, Any]:
    """The file's content with what was found, keys in order."""
    whole: dict[str, Any] = json.loads(json.dumps(stored))
    for (kernel, capability, dtype, key), fields in found.items():
        whole.setdefault(capability, {}).setdefault(kernel, {}).setdefault(dtype, {})[key] = dict(fields)
    ordered: dict[str, Any] = json.loads(json.dumps(whole, sort_keys=True))
    return ordered


@click.command()
@click.option("--kernel", "kernels", multiple=True, type=click.Choice([t.kernel for t in TUNABLES]))
@click.option("--model", "models", multiple=True, type=click.Choice(("llada-8b", "dream-7b")), default=("llada-8b",))
@click.option("--seconds", default=240.0, show_default=True, help="Of all kernels together.")
@click.option("--out", type=click.Path(path_type=Path), default=configs.FILE, help="The JSON file, which is added to.")
def main(kernels: tuple[str, ...], models: tuple[str, ...], seconds: float, out: Path) -> None:
    """Try, print what is better than the default, and store it."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; nothing can be measured, and nothing is written")
    device, chosen = torch.device("cuda"), [t for t in TUNABLES if not kernels or t.kernel in kernels]
    rows = []
    for number, tunable in enumerate(chosen):
        ratios: Ratios = {}
        deadline = time.monotonic() + seconds / len(chosen)
        for model in models:
            tune(tunable, Maker(MODELS[model], device, torch.bfloat16), deadline, ratios)
        better = {key: found for key, of_key in ratios.items() if (found := best(of_key)) is not None}
        fields = {key: tunable.candidates[candidate] for key, (candidate, _) in better.items()}
        stored = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(merged(stored, fields), indent=1) + "\n")  # after each: what is found is not lost
        for key in ratios:
            shown = f"{better[key][1]:.2f}x of its time: {dict(fields[key])}" if key in better else "stays"
            rows.append({"kernel": key[0], "bucket": key[3], "default": shown})
        click.echo(f"{number + 1} of {len(chosen)}: {tunable.kernel}", err=True)
    if rows:
        report.print_table("Launches that are better than the kernels' own", rows)


if __name__ == "__main__":
    main()
