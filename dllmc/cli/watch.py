"""Watching blocks unmask: a live view where standard error is a terminal, one line a step where it is not.

A view is a callback for `Engine.generate(on_step=...)`. Standard output stays free for the results.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from dllmc.cli import terminal
from dllmc.cli.report import counted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from dllmc.runtime.request import GenerationResult
    from dllmc.runtime.snapshot import Snapshot
    from dllmc.runtime.tokenizer import Tokenizer

FRAME_S = 0.06
"""A frame stays at least this long, so that an eye can follow a model that is faster than that."""

CONFIDENCE_COLOURS = ((0.5, "red"), (0.9, "yellow"), (math.inf, "green"))
"""(a probability, the colour of tokens that were committed at less than it)."""

OnStep = Callable[[Sequence["Snapshot"]], None]
Pieces = Callable[[Sequence[int]], Sequence[str]]
"""Token ids to the text that each adds."""


@dataclass(frozen=True)
class Glyphs:
    """What stands for a masked position of the current block, of a later one, and for a token that has no text."""

    masked: str
    later: str
    special: str


LIVE, PLAIN = Glyphs("▒", "·", "∎"), Glyphs("_", "_", "")


class Tally:
    """What is known of a call's prompts: latest snapshots, which positions are new, counts, and decoding time."""

    def __init__(self, prompts: int, gen_length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.prompts, self.gen_length = prompts, gen_length
        self.latest: dict[int, Snapshot] = {}
        self.fresh: dict[int, set[int]] = {}
        self.steps = 0
        self.seconds = 0.0
        self._clock = clock
        self._resumed = clock()

    def add(self, snapshots: Sequence["Snapshot"]) -> None:
        """Take in the snapshots of a step; it took the time since the last `resume`."""
        self.seconds += self._clock() - self._resumed
        self.steps += 1
        known = {s.index: committed(self.latest[s.index]) for s in snapshots if s.index in self.latest}
        self.fresh = {s.index: committed(s) - known.get(s.index, set()) for s in snapshots}
        self.latest.update({s.index: s for s in snapshots})

    def resume(self) -> None:
        """Decoding goes on: what the view took since `add` is no decoding time."""
        self._resumed = self._clock()

    @property
    def tokens(self) -> int:
        """Tokens committed so far; of finished prompts, those of the completion."""
        return sum(len(committed(s)) for s in self.latest.values())

    @property
    def done(self) -> int:
        """Of prompts * gen_length positions, those with nothing left to do: all of a finished prompt's."""
        return sum(self.gen_length if s.finished else len(committed(s)) for s in self.latest.values())

    def figures(self, total: int | None = None) -> str:
        """38 tokens in 12 steps, 0.31 s, 123 tokens/s; or 38 of 57 tokens."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        took = f"{self.seconds:.2f} s, {rate:.0f} tokens/s"
        tokens = counted(self.tokens, "token") if total is None else f"{self.tokens} of {counted(total, 'token')}"
        return f"{tokens} in {counted(self.steps, 'step')}, {took}"


def committed(snapshot: "Snapshot") -> set[int]:
    """Positions that are not masked."""
    return {position for position, masked in enumerate(snapshot.masked) if not masked}


@contextmanager
def bar(prompts: int, gen_length: int) -> Iterator[OnStep | None]:
    """Yields a callback that draws a progress bar of the tokens, or None where no bar can be seen."""
    if not terminal.is_live():
        yield None
        return
    tally = Tally(prompts, gen_length)
    with terminal.progress("decode") as show:

        def on_step(snapshots: Sequence["Snapshot"]) -> None:
            tally.add(snapshots)
            show(f"decode, step {tally.steps}", tally.done, prompts * gen_length)

        yield on_step


@contextmanager
def view(prompts: int, gen_length: int, tokenizer: "Tokenizer | None") -> Iterator[OnStep]:
    """Yields a callback that shows each step. In the end the live view goes, and a line of figures stays.

    The figures are of decoding alone: what the view took is not in them.
    """
    tally = Tally(prompts, gen_length)
    cached = lru_cache(maxsize=4096)(_pieces_of(tokenizer))

    def pieces(ids: Sequence[int]) -> Sequence[str]:
        return cached(tuple(ids))

    with _live(tally, pieces) if terminal.is_live() else _lines(tally, pieces) as on_step:
        yield on_step
    click.echo(f"[{tally.figures()}]", err=True)


@contextmanager
def _live(tally: Tally, pieces: Pieces) -> Iterator[OnStep]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    picture = frame(tally, pieces, console)
    with Live(picture, console=console, transient=True, auto_refresh=False, redirect_stdout=False) as live:

        def on_step(snapshots: Sequence["Snapshot"]) -> None:
            tally.add(snapshots)
            live.update(frame(tally, pieces, console), refresh=True)
            time.sleep(FRAME_S)
            tally.resume()

        live.refresh()
        yield on_step


@contextmanager
def _lines(tally: Tally, pieces: Pieces) -> Iterator[OnStep]:
    def on_step(snapshots: Sequence["Snapshot"]) -> None:
        tally.add(snapshots)
        for snapshot in snapshots:
            click.echo(plain_line(tally, snapshot, pieces), err=True)
        tally.resume()

    yield on_step


def frame(tally: Tally, pieces: Pieces, console: "Console") -> "RenderableType":
    """A picture of all prompts, no taller than the console: what is running first where not all of it has room."""
    from rich.console import Group

    room = console.height - 2
    shown: dict[int, list[Text]] = {}
    for snapshot in sorted(tally.latest.values(), key=lambda s: (s.finished, s.index)):
        lines = _panel(tally, snapshot, pieces, console.width)
        if not shown and len(lines) > room:  # the current block, and as much of what leads to it as can be seen
            lines = _panel(tally, snapshot, pieces, console.width, end=snapshot.block[1])[-room:]
        if len(lines) <= room:
            shown[snapshot.index] = lines
            room -= len(lines)
    panels = [line for index in sorted(shown) for line in shown[index]]
    return Group(*panels, *_status(tally, len(tally.latest) - len(shown), legend=not console.no_color))


def plain_line(tally: Tally, snapshot: "Snapshot", pieces: Pieces) -> str:
    r"""A step of one prompt in a line: counts, then its text with newlines as \n and masked positions as _."""
    text = "".join(text for text, _ in cells(snapshot, set(), pieces, PLAIN)).replace("\n", "\\n")
    done = f"{len(committed(snapshot))} of {counted(len(snapshot.masked), 'token')}"
    return f"step {tally.steps}, prompt {snapshot.index + 1}: {done}: {text}"


def cells(snapshot: "Snapshot", fresh: set[int], pieces: Pieces, glyphs: Glyphs) -> list[tuple[str, str]]:
    """The text of each position and its style, in the words of rich; `fresh` positions stand out."""
    texts = _texts(snapshot, pieces, glyphs)
    found: list[tuple[str, str]] = []
    for position, (text, masked) in enumerate(zip(texts, snapshot.masked, strict=True)):
        style = "dim" if masked else colour(snapshot.logprobs[position] if snapshot.logprobs else 0.0)
        if position in fresh:
            text, style = text.replace("\n", "↵\n"), f"bold reverse {style}"
        found.append((text, style))
    return found


def colour(logprob: float) -> str:
    """The colour of a token that was committed at the probability exp(logprob)."""
    return next(name for bound, name in CONFIDENCE_COLOURS if math.exp(logprob) < bound)


def coloured(result: "GenerationResult", tokenizer: "Tokenizer | None") -> str:
    """A result's text, with terminal codes that give each token the colour of its confidence."""
    pieces = _pieces_of(tokenizer)(result.token_ids)
    return "".join(
        click.style(piece, fg=colour(logprob)) if piece.strip() else piece
        for piece, logprob in zip(pieces, result.logprobs or [0.0] * len(pieces), strict=True)
    )


def _pieces_of(tokenizer: "Tokenizer | None") -> Pieces:
    """Without a tokenizer the text is the ids, as they are given: 12,7,300."""
    if tokenizer is not None:
        return tokenizer.pieces
    return lambda ids: [f",{token}" if i else str(token) for i, token in enumerate(ids)]


def _texts(snapshot: "Snapshot", pieces: Pieces, glyphs: Glyphs) -> list[str]:
    """The text of each position; a run of committed tokens is decoded as one, for a character may span tokens."""
    texts = [glyphs.masked if i < snapshot.block[1] else glyphs.later for i in range(len(snapshot.masked))]
    edges = [-1, *(i for i, masked in enumerate(snapshot.masked) if masked), len(texts)]
    for before, end in pairwise(edges):
        run = snapshot.token_ids[before + 1 : end]
        texts[before + 1 : end] = [
            # A token that is part of a character has text on its own, if a broken one; a special token has none.
            _printable(text) if text or pieces([token])[0] else glyphs.special
            for token, text in zip(run, pieces(run), strict=True)
        ]
    return texts


def _printable(text: str) -> str:
    """Control characters, which would move the cursor or worse, as their pictures (U+2400 and on)."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c != "\n" else c for c in text)


def _panel(tally: Tally, snapshot: "Snapshot", pieces: Pieces, width: int, end: int | None = None) -> "list[Text]":
    """A prompt's lines, broken at the width and not between words, so that a commit moves little of the rest."""
    from rich.cells import cell_len
    from rich.text import Text

    lines = [Text()]
    for text, style in cells(snapshot, tally.fresh.get(snapshot.index, set()), pieces, LIVE)[:end]:
        for character in text:
            if character == "\n" or lines[-1].cell_len + cell_len(character) > width:
                lines.append(Text())
            if character != "\n":
                lines[-1].append(character, style)
    if tally.prompts == 1:
        return lines
    state = "done" if snapshot.finished else f"{len(committed(snapshot))} of {len(snapshot.masked)}"
    header = f"prompt {snapshot.index + 1}: {state}, {counted(snapshot.forward_passes, 'forward pass')}"
    return [Text(header, style="dim"), *lines]


def _status(tally: Tally, hidden: int, legend: bool) -> "Iterator[Text]":
    from rich.text import Text

    line = Text(tally.figures(total=tally.prompts * tally.gen_length), style="bold", no_wrap=True, overflow="crop")
    waiting = tally.prompts - len(tally.latest)
    for count, state in ((hidden, "not shown"), (waiting, "waiting")):
        line.append(f", {count} {state}" if count else "", "not bold")
    colours = ("   confidence ", "dim"), ("<50% ", "red"), ("<90% ", "yellow"), ("more", "green")
    for text, style in colours if legend else ():
        line.append(text, f"not bold {style}")
    yield Text()
    yield line
