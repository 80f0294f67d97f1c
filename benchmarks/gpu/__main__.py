"""The command: sections one after the other, each in a process of its own, so that what ends one leaves the others."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report
from benchmarks.gpu import decode, kernels, memory, where
from benchmarks.gpu import device as devices
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.record import Section
from benchmarks.gpu.setting import setting_of

SECTIONS = ("prepare", "kernels", "memory", "where", "decode")
# Seconds of a section's own measurements; a process takes about 15 more to start.
BUDGETS = {
    "default": {"kernels": 100.0, "memory": 35.0, "where": 50.0, "decode": 210.0},
    "quick": {"kernels": 15.0, "memory": 8.0, "where": 10.0, "decode": 20.0},
    "small": dict.fromkeys(SECTIONS, 600.0),
    "full": {"kernels": 180.0, "memory": 60.0, "where": 120.0, "decode": 3600.0},
}
PREPARE_S = 240.0
GRACE_S = 60.0
"""How long after its budget a section is stopped: what it is at when the budget ends may take so long."""

SHOW: dict[str, Callable[[dict[str, Any]], None]] = {
    "kernels": kernels.show,
    "memory": memory.show,
    "where": where.show,
    "decode": decode.show,
}


@click.command()
@click.option("--only", "sections", multiple=True, type=click.Choice(SECTIONS), help="[default: all]")
@click.option("--quick", "size", flag_value="quick", help="A first look of about 90 s: few shapes, 4 layers.")
@click.option("--small", "size", flag_value="small", help="A tiny model, to try the benchmark itself; also on a CPU.")
@click.option("--grid", "grid", type=click.Choice(("default", "full")), default="default", show_default=True)
@click.option("--model", type=click.Choice(("llada-8b", "dream-7b")), default="llada-8b", show_default=True)
@click.option("--prompt", "prompts", multiple=True, type=int, help="Of the grid, only points with such prompts.")
@click.option("--new-tokens", "new", type=int, help="A multiple of 32.  [default: 64; full: 256]")
@click.option("--steps-per-block", "steps", type=int, help="Forward passes a block.  [default: 8]")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="The baselines under torch.compile.")
@click.option("--programs", type=click.Path(path_type=Path), help="A folder that keeps compiled programs.")
@click.option("--device", "device_name", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The JSON file.  [default: <gpu>.json of the results]")
@click.option("--alone", is_flag=True, hidden=True, help="Run the sections in this process.")
def main(
    sections: tuple[str, ...],
    size: str | None,
    grid: str,
    model: str,
    prompts: tuple[int, ...],
    new: int | None,
    steps: int | None,
    compiled: bool,
    programs: Path | None,
    device_name: str,
    out: Path | None,
    alone: bool,
) -> None:
    """Measure operators, memory, decoding and steps on a GPU: about 8 minutes by default, on an H200."""
    device, size, sections = torch.device(device_name), size or grid, sections or SECTIONS
    if sections == ("prepare",):  # for a GPU that need not be here
        if programs is None:
            raise click.UsageError("prepare: give --programs, the folder to keep them in")
        setting_of(model, device, size, prompts, new, steps).compiled(programs)
        return
    out = out or report.RESULTS / f"{devices.slug(device)}{'' if size == 'default' else '_' + size}.json"
    if not alone:
        _one_by_one(sections, size, programs, out)
        return
    assert programs is not None
    shared = {"environment": report.environment(), "device": devices.facts(device), "size": size}
    setting = setting_of(model, device, size, prompts, new, steps)
    for name in sections:
        section = Section(out, name, shared, BUDGETS[size][name])
        section.put()
        if name == "kernels":
            chosen = ["tiny"] if size == "small" else ["llada-8b"] if size == "quick" else ["llada-8b", "dream-7b"]
            kernels.run(section, [MODELS[each] for each in chosen], device, size == "small", size == "quick")
        elif name == "decode":
            decode.run(section, setting, programs, compiled)
        else:
            (memory.run if name == "memory" else where.run)(section, setting, programs)
        section.close()
        SHOW[name](section.content)


def _one_by_one(sections: tuple[str, ...], size: str, programs: Path | None, out: Path) -> None:
    """Each section in a process, with this one's options; programs are compiled beside the first, which needs none."""
    with tempfile.TemporaryDirectory() as name:
        options = [*sys.argv[1:], "--alone", "--programs", str(programs or name), "--out", str(out)]
        options = _without_sections(options)

        def started(section: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *options, "--only", section])

        preparing = started("prepare") if {"memory", "where", "decode"} & set(sections) else None
        failed = []
        for section in (each for each in sections if each != "prepare"):
            if section != "kernels" and preparing is not None:
                _wait(preparing, PREPARE_S)
            began = time.monotonic()
            if _wait(started(section), BUDGETS[size][section] + GRACE_S) != 0:
                failed.append(section)
            click.echo(f"{section}: {time.monotonic() - began:.0f} s in all", err=True)
        if preparing is not None and _wait(preparing, PREPARE_S) != 0:
            failed.append("prepare")
    if failed:
        raise click.ClickException(f"these did not run to their end: {', '.join(failed)}; {out.name} has what they had")


def _without_sections(options: list[str]) -> list[str]:
    """The command's options without those that choose sections."""
    kept: list[str] = []
    for option in options:
        if kept and kept[-1] == "--only":
            kept.pop()
        elif not option.startswith("--only="):
            kept.append(option)
    return kept


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Its exit status; it is ended if it takes longer."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 1


if __name__ == "__main__":
    main()
