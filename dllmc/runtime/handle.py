"""What a caller holds of a request that was submitted: wait for it, follow it, cancel it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dllmc.errors import StepError
from dllmc.runtime.request import GenerationResult, RequestState
from dllmc.runtime.roster import Entry

if TYPE_CHECKING:
    from dllmc.runtime.engine import Engine

Status = Literal["waiting", "running", "finished", "cancelled", "failed"]


@dataclass(frozen=True)
class Update:
    """What was committed of a request since its last update. Lists have an entry a token, by ascending position."""

    positions: list[int]
    """From 0 at the first position of the generation region. Infilled positions are in no update."""

    token_ids: list[int]
    """A stop in the last block cuts off what follows it there, some of which may have been in updates before."""

    logprobs: list[float] | None
    """Natural log of each token's probability; None unless the params ask for `logprobs`."""

    text: str
    """Text of the blocks that are over, as far as no update had it: all updates' texts are the result's `text`.
    Empty without a tokenizer."""

    finished: bool
    """Whether this is the last update."""


class Request:
    """A submitted request. Made by `Engine.submit`; its methods may be called from any thread.

    Whoever waits for it runs the engine's steps, unless another thread does: no thread of its own is needed.
    """

    def __init__(self, engine: "Engine", entry: Entry) -> None:
        self.engine = engine
        self.entry = entry
        self._end: GenerationResult | Exception | None = None

    @property
    def done(self) -> bool:
        """Whether it is finished, cancelled or failed."""
        return self._end is not None

    @property
    def status(self) -> Status:
        """Where it is now; "cancelled" at its deadline too."""
        if self._end is None:
            return "waiting" if self.entry.row is None else "running"
        if isinstance(self._end, GenerationResult):
            return "finished"
        return "failed" if isinstance(self._end, StepError) else "cancelled"

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for what it returns. timeout: seconds, looked at between steps; None waits as long as it takes.

        Raises `TimeoutError`, and it goes on; `CancelledError`; `DeadlineError`; `StepError` where its step failed.
        """
        self.engine.run_until(lambda: self.done, timeout)
        assert self._end is not None
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def stream(self) -> Iterator[Update]:
        """Its tokens as they are committed, from the first; the last update is `finished`. Raises as `result` does."""
        progress = Progress(self)
        while True:
            self.engine.run_until(progress.has_more)
            yield (update := progress.update())
            if update.finished:
                return

    def cancel(self) -> None:
        """End it, unless it is done: between two steps, when its place and pages are free at once."""
        self.engine.cancel(self)

    def end(self, end: GenerationResult | Exception) -> None:
        """Say what it ended with; the engine does."""
        self._end = end


class Progress:
    """How far a reader has followed a request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._state: RequestState = request.entry.state
        self._shown = np.zeros(self._state.length, np.bool_)
        self._shown[: self._state.prompt_length] = True
        self._shown[self._state.fixed] = True
        self._text = ""
        self._decoded = self._state.prompt_length  # up to which position

    def has_more(self) -> bool:
        """Whether there is an update, or never will be."""
        with self._request.engine.lock:
            return self._request.done or bool((~self._state.masked & ~self._shown).any())

    def update(self) -> Update:
        """What is new. Raises what the request ended with, if that is no result."""
        request, state = self._request, self._state
        with request.engine.lock:
            result = request.result() if request.done else None
            first = state.prompt_length
            end = state.length if result is None else first + len(result.token_ids)
            new = (~state.masked & ~self._shown)[:end].nonzero()[0]
            self._shown[new] = True
            logprobs = state.logprobs
            return Update(
                positions=(new - first).tolist(),
                token_ids=state.token_ids[new].tolist(),
                logprobs=None if logprobs is None else logprobs[new].tolist(),
                text=self._new_text(),
                finished=result is not None,
            )

    def _new_text(self) -> str:
        """What no later block changes: not half a character, nor what may become a stop string."""
        finished, start = self._state.finished, self._state.start
        if not finished and start == self._decoded:
            return ""
        self._decoded = start
        text = self._state.text() or ""
        if not finished:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            stops = self._state.params.stop
            text = text[: len(text) - max((_overlap(text, stop) for stop in stops), default=0)]
        new = text[len(self._text) :]
        self._text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
