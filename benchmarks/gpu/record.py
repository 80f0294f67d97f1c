"""Where figures go as soon as they exist: one JSON a device, a part of it a section, rewritten at every record.

And a section's budget of time: what it has left, and a record of what it did not measure for want of it.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import report

Record = dict[str, Any]


def reason(record: Record) -> str:
    """Why a record has no figures; empty if it has."""
    return next((str(record[key]) for key in ("out_of_memory", "failed", "not_measured") if key in record), "")


def print_rows(title: str, rows: Sequence[Mapping[str, object]], notes: Sequence[str] = ()) -> None:
    """A table of rows that need not have the same columns; nothing where there are no rows."""
    columns = {name: None for row in rows for name in row}
    if rows:
        report.print_table(title, [{name: row.get(name, "-") for name in columns} for row in rows], notes)


class Section:
    """A section's part of the file. `deadline`: when its budget is used up, on `time.monotonic`'s clock."""

    def __init__(self, path: Path, name: str, shared: Mapping[str, Any], budget_s: float) -> None:
        self.path, self.name, self.shared = path, name, shared
        self.started = time.monotonic()
        self.deadline = self.started + budget_s
        self.content: dict[str, Any] = {"complete": False, "budget_s": budget_s, "results": []}

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def results(self) -> list[Record]:
        """The records so far."""
        found: list[Record] = self.content["results"]
        return found

    def put(self, **values: Any) -> None:
        """Facts of the section as a whole."""
        self.content.update(values)
        self._write()

    def add(self, record: Record) -> None:
        """A record more."""
        self.results.append(record)
        self._write()

    def attempt(self, facts: Record, measure: Callable[[], Record], expected_s: float = 0.0) -> Record:
        """Add the record of a measurement, or why there is none: it failed, or would take longer than is left."""
        if self.left_s < expected_s or self.left_s <= 0:
            record = {**facts, "not_measured": f"{expected_s:.0f} s expected, {max(self.left_s, 0):.0f} s left"}
        else:
            try:
                record = {**facts, **measure()}
            except Exception as error:  # whatever it is, the others go on, and the record says what it was
                key = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
                record = {**facts, key: f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.400}"}
        self.add(record)
        if why := reason(record):
            click.echo(f"{self.name}: {facts}: {why}", err=True)
        return record

    def close(self) -> None:
        """The section has run to its end."""
        self.put(complete=True, seconds=time.monotonic() - self.started)

    def _write(self) -> None:
        """Into the file, beside what other sections left there; the file is whole at any moment."""
        try:
            whole = json.loads(self.path.read_text())
        except FileNotFoundError:
            whole = {}
        sections = whole.get("sections", {}) | {self.name: {**self.shared, **self.content}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        building = self.path.with_suffix(".part")
        building.write_text(json.dumps({"benchmark": "gpu", "sections": sections}, indent=1) + "\n")
        os.replace(building, self.path)
