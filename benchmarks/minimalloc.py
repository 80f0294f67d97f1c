"""The planner on static memory allocation instances, MiniMalloc's (doi 10.1145/3623278.3624752) or any of their format.

A file has a line a buffer, `id,lower,upper,size`, alive in the half-open interval [lower, upper), and in its name the
capacity: `NAME.CAPACITY.csv`. Each is planned once, in a process that has planned nothing before.

python -m benchmarks.minimalloc tests/memory/minimalloc/*.csv
"""

import csv
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks import report
from dllmc.memory.planner import Buffer, plan


def read(file: Path) -> tuple[list[Buffer], int]:
    """The buffers and the capacity of an instance. Raises `click.ClickException` naming file and field."""
    *_, capacity, _ = file.name.split(".") if file.name.count(".") > 1 else ("", "", "")
    if not capacity.isdigit():
        raise click.ClickException(f"{file}: expected a name such as NAME.1048576.csv, which gives the capacity")
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return [Buffer(row["id"], *(int(row[key]) for key in ("lower", "upper", "size"))) for row in rows], int(
            capacity
        )
    except (KeyError, TypeError, ValueError) as error:
        raise click.ClickException(
            f"{file}: expected the integer columns lower, upper, size beside id: {error}"
        ) from None


def measure(file: Path, time_limit: float) -> dict[str, Any]:
    """One record. `optimal`: proven so; once within the capacity, nothing lower is looked for."""
    buffers, capacity = read(file)
    began = time.perf_counter()
    found = plan(buffers, capacity, time_limit)
    seconds = time.perf_counter() - began
    return {
        "instance": file.name,
        "buffers": len(buffers),
        "capacity": capacity,
        "height": found.height,
        "lower_bound": found.lower_bound,
        "solved": found.height <= capacity,
        "optimal": found.optimal,
        "nodes": found.nodes,
        "seconds": round(seconds, 2),
    }


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--time-limit", default=60.0, show_default=True, help="Seconds for each.")
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "minimalloc.json")
def main(files: tuple[Path, ...], time_limit: float, out: Path) -> None:
    """Plan the instances in FILES, the published ones in seconds."""
    facts = report.environment()
    records = []
    for file in files:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            records.append(fresh.submit(measure, file, time_limit).result())
    rows = [
        {
            "instance": record["instance"],
            "buffers": record["buffers"],
            "height/capacity": f"{record['height'] / record['capacity']:.4f}",
            "bound/capacity": f"{record['lower_bound'] / record['capacity']:.4f}",
            "seconds": f"{record['seconds']:.2f}",
            "solved": "yes" if record["solved"] else "no",
            "optimal": "proven" if record["optimal"] else "not asked" if record["solved"] else "not proven",
        }
        for record in records
    ]
    report.print_table("Static memory allocation", rows, [report.summary(facts)])
    report.write_json(out, {"environment": facts, "time_limit_s": time_limit, "results": records})


if __name__ == "__main__":
    main()
