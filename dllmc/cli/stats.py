"""What an engine does, in a line on standard error: live while it decodes, and what it came to."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dllmc.cli import terminal

if TYPE_CHECKING:
    from dllmc.cli.watch import OnStep
    from dllmc.runtime.engine import Engine
    from dllmc.runtime.metrics import Stats
    from dllmc.runtime.snapshot import Snapshot

REFRESH_S = 0.25
"""Seconds between two live lines."""


@contextmanager
def stats_line(engine: "Engine", other: "OnStep | None" = None) -> Iterator["OnStep"]:
    """Yields a callback that keeps the line up to date, unless another view is given to be called; prints the last."""
    start = engine.stats()
    shown = 0.0
    live = terminal.is_live() and other is None

    def on_step(snapshots: Sequence["Snapshot"]) -> None:
        nonlocal shown
        if other is not None:
            other(snapshots)
        if live and time.monotonic() - shown > REFRESH_S:
            shown = time.monotonic()
            click.echo(f"\r\x1b[K{line(engine.stats().since(start))}", err=True, nl=False)

    try:
        yield on_step
    finally:
        if live:
            click.echo("\r\x1b[K", err=True, nl=False)
    click.echo(f"[{line(engine.stats().since(start))}]", err=True)


def line(stats: "Stats") -> str:
    """What is in the engine, how fast it goes, and milliseconds a step of each phase."""
    phases = ", ".join(
        f"{name} {1e3 * phase.seconds / phase.steps:.1f} ms x {phase.steps}"
        for name, phase in sorted(stats.phases.items())
        if phase.steps
    )
    parts = [
        f"{stats.waiting} waiting, {stats.running} running, {stats.finished} finished",
        f"{stats.tokens_per_s:.0f} tokens/s",
        phases or "no steps",
        f"{stats.pages_in_use} of {stats.pages} pages",
    ]
    rare = ((stats.preemptions, "preempted"), (stats.cancelled, "cancelled"), (stats.failed, "failed"))
    parts += [f"{count} {what}" for count, what in rare if count]
    return "; ".join(parts)
