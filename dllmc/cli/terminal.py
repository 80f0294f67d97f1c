"""Progress on the terminal: a bar on standard error, for what takes longer than a moment.

rich is imported only where a bar may be drawn: standard output never sees one, and neither does a file or a pipe.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

DELAY_S = 0.5
"""Seconds after which a bar appears; what is done sooner shows none."""

Show = Callable[[str, int, int | None], None]
"""Called with (what is being done, how much of it is done, of how much or None if nobody knows)."""


def is_live() -> bool:
    """Whether standard error is a terminal that can redraw lines and show more than ASCII."""
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and "utf" in sys.stderr.encoding.lower()
    return sys.stderr.isatty() and able


def takes_colour(stream: TextIO) -> bool:
    """Whether it is a terminal whose user has not set NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[Show]:
    """A bar for as long as the context lasts, gone with it, or none if `quiet`. Yields what to call to change it."""
    if quiet or not is_live():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # The label last: its length changes, and the bar is to stay where it is.
    columns = SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    # Results may be printed to a standard output that is a file while the bar is up: they must not become part of it.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    task = bar.add_task(label, total=None)
    # A thread, because what takes long, an import or a capture, may report nothing for seconds.
    starter = threading.Timer(DELAY_S, bar.start)
    starter.start()

    def show(label: str, done: int, total: int | None) -> None:
        described = label if total is None else f"{label} ({done} of {total})"
        bar.update(task, description=described, completed=done, total=total)

    try:
        yield show
    finally:
        starter.cancel()
        starter.join()
        bar.stop()
