"""The state of one request while it is decoded: its tokens, what is masked, where in the schedule it stands.

A request knows nothing of batches or devices: a step asks for its `phase`, `candidates()` and `commit_count()`, and
hands the decision back to `commit()`. Positions, never token values, say what is masked (semantics.md, "Commit").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from dllmc.errors import RequestError
from dllmc.runtime.params import (
    CONFIDENCE_RULES,
    DENSE,
    SELECTIONS,
    CachePolicy,
    Phase,
    SamplingParams,
    is_integer,
    require_servable,
    require_token_ids,
)
from dllmc.runtime.table import PHASES, Table
from dllmc.spec import ModelSpec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationResult:
    """What a finished request returns."""

    token_ids: list[int]
    """The completion only, cut after its first stop token, or the token that completes its first stop string."""

    text: str | None
    """The completion as text, cut before its first stop string; None without a tokenizer."""

    forward_passes: int
    """Steps taken; a guided step counts once."""

    finish_reason: FinishReason
    """"stop": a stop token or string cut the completion. "length": it has `gen_length` tokens."""

    logprobs: list[float] | None
    """Natural log of each token's probability when it was committed, 0.0 for infilled ones; None if not asked for."""


class RequestState:
    """A request being decoded; created valid, advanced by `commit`, finished when `finished`.

    token_ids: [P + G] int64, prompt and generation region, the model's `mask_id` where nothing is committed yet.
    masked: [P + G] bool. fixed: infilled positions. start, end: the current block's positions, half-open. step: steps
    taken, over all blocks; step_in_block: in this one. masked_at_start: masked positions of the current block when it
    began.

    All that changes is in a row of a `Table`: of its own, or of one that it shares with others (`move`).
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        spec: ModelSpec,
        infill: Mapping[int, int] = MappingProxyType({}),
        reference: Sequence[int] | None = None,
        cache: CachePolicy = DENSE,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """Raise `RequestError`, with the numbers, for a prompt, infill or params that the model cannot serve.

        decode: token ids to text; None without a tokenizer.
        """
        _require_fits(len(prompt_ids), params.gen_length, spec.max_positions)
        require_token_ids("prompt", enumerate(prompt_ids), spec.vocab_size)
        _require_infill(infill, params.gen_length, spec.vocab_size)
        _require_reference(reference, params.gen_length, spec.vocab_size)
        require_servable(params, spec.vocab_size)
        if params.stop and decode is None:
            raise RequestError(
                f"SamplingParams.stop is {params.stop!r}, but the artifact has no tokenizer; give stop_token_ids"
            )
        self.params = params
        self.cache = cache
        self.prompt_length = len(prompt_ids)
        self.length = self.prompt_length + params.gen_length
        self.finish_reason: FinishReason | None = None
        self._mask_id = spec.mask_id
        self._shifted = spec.shifted
        self._decode = decode
        self._stop_end: int | None = None
        self._stop_ids = np.array([*params.stop_token_ids, *(() if params.ignore_eos else spec.end_ids)], np.int64)

        self.table, self.row = Table(1, self.length), 0
        self.fixed = fixed = self.prompt_length + np.fromiter(infill.keys(), np.int64, len(infill))
        self.token_ids[:] = spec.mask_id
        self.token_ids[: self.prompt_length] = prompt_ids
        self.token_ids[fixed] = np.fromiter(infill.values(), np.int64, len(infill))
        self.masked[self.prompt_length :] = True
        self.masked[fixed] = False
        if reference is not None:
            self.table.reference[0, self.prompt_length :] = reference
        self._fill_columns()
        self._enter_block(self.prompt_length)
        self.leave_full_blocks()

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return self.table.token_ids[self.row, : self.length]

    @property
    def masked(self) -> npt.NDArray[np.bool_]:
        return self.table.masked[self.row, : self.length]

    @property
    def start(self) -> int:
        return int(self.table.start[self.row])

    @property
    def end(self) -> int:
        return int(self.table.end[self.row])

    @property
    def step(self) -> int:
        return int(self.table.step[self.row])

    @property
    def step_in_block(self) -> int:
        return int(self.table.step_in_block[self.row])

    @property
    def masked_at_start(self) -> int:
        return int(self.table.masked_at_start[self.row])

    @property
    def finished(self) -> bool:
        """Whether decoding is over and `result` may be called."""
        return self.finish_reason is not None

    @property
    def phase(self) -> Phase:
        """What the next step is."""
        return PHASES[int(self.table.phases(self._rows)[0])]

    @property
    def sides(self) -> int:
        """Sequences that a step computes: with guidance a second one, whose prompt is masked."""
        return 2 if self.params.cfg_scale else 1

    @property
    def longest_block(self) -> int:
        """Positions of the longest block."""
        return min(self.params.block_length, self.params.gen_length)

    @property
    def longest_span(self) -> int:
        """Positions of the longest active span."""
        return self.longest_block + self._shifted

    @property
    def most_kept(self) -> int:
        """How many keys a head keeps at most: in the last block, which is the shortest."""
        last = self.params.gen_length - (self.params.blocks - 1) * self.params.block_length
        return self.cache.kept(self.length - last - self._shifted)

    @property
    def logprobs(self) -> npt.NDArray[np.float64] | None:
        """[P + G], natural log: of each token that was committed, 0.0 elsewhere; None unless the params ask for it."""
        return self.table.logprobs[self.row, : self.length] if self.params.logprobs else None

    def candidates(self) -> npt.NDArray[np.int64]:
        """Masked positions of the current block, ascending: [rows]. Empty once finished."""
        return self.table.candidates(self._rows)[1]

    def commit_count(self) -> int:
        """How many candidates this step commits, maybe 0; with a threshold, the least it commits: 1."""
        return int(self.table.commit_counts(self._rows)[0])

    def commit(
        self,
        positions: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int64],
        logprobs: npt.NDArray[np.floating] | None = None,
    ) -> None:
        """End a step: write tokens (the reference's, if there is one) at some candidates, maybe none, and go on.

        positions, token_ids: [commits]. logprobs: [commits], natural log; needed only where the params ask for them.
        Raises `ValueError` for a position that is no candidate, since a committed token is not touched again.
        """
        if self.finished or not np.isin(positions, self.candidates()).all():
            raise ValueError(f"commit at {positions}: expected positions among the candidates {self.candidates()}")
        if logprobs is None:
            if self.params.logprobs:
                raise ValueError("commit without logprobs, which the request's params ask for")
            logprobs = np.zeros(len(positions))
        if self.phase == "refresh":
            self.table.at_refresh[self.row] = self.table.token_ids[self.row]
        self.table.advance(self._rows, self._rows, np.array([len(positions)]))
        self.table.write(self._rows, np.zeros_like(positions), positions, token_ids, logprobs)
        self.leave_full_blocks()

    def leave_full_blocks(self) -> None:
        """End each block in which nothing is masked, infilled ones too, until one has work or decoding is over."""
        while not self.table.left[self.row]:
            self._stop_end = self._stops()
            if self._stop_end is not None:
                self.finish_reason = "stop"
                return
            if self.end == self.length:
                self.finish_reason = "length"
                return
            self._enter_block(self.end)

    def lose_cache(self) -> None:
        """Say that its pages are gone: the block's Refresh is done again before it goes on (semantics.md)."""
        self.table.lost[self.row] |= self.phase == "reuse"

    def move(self, table: Table, row: int) -> None:
        """Go on in a row of another table."""
        table.copy(row, self.table, self.row)
        self.table, self.row = table, row

    def leave(self) -> None:
        """Go on in a table of its own."""
        self.move(Table(1, self.length), 0)

    def result(self) -> GenerationResult:
        """The completion. Raises `ValueError` unless finished."""
        if self.finish_reason is None:
            raise ValueError(f"the request is not finished: {self.masked.sum()} positions are masked")
        completion = slice(self.prompt_length, self._stop_end or self.length)
        return GenerationResult(
            token_ids=self.token_ids[completion].tolist(),
            text=self.text(),
            forward_passes=self.step,
            finish_reason=self.finish_reason,
            logprobs=None if self.logprobs is None else self.logprobs[completion].tolist(),
        )

    def text(self) -> str | None:
        """The blocks that are over, as text, cut before the first stop string; None without a tokenizer."""
        if self._decode is None:
            return None
        end = self.start if self.finish_reason is None else self._stop_end or self.length
        text = self._decode(self.token_ids[self.prompt_length : end].tolist())
        return text[: min((at for at in map(text.find, self.params.stop) if at >= 0), default=len(text))]

    @property
    def _rows(self) -> npt.NDArray[np.int64]:
        return np.array([self.row], np.int64)

    def _fill_columns(self) -> None:
        """What stays as it is."""
        params, cache = self.params, self.cache
        columns = {
            "prompt_length": self.prompt_length,
            "length": self.length,
            "steps_per_block": params.steps_per_block or 0,
            "timestep": params.schedule == "timestep",
            "threshold": np.inf if params.threshold is None else params.threshold,
            "caches": cache.mode != "none",
            "delay": cache.delay,
            "interval": cache.refresh_interval or 0,
            "selection": SELECTIONS.index(cache.selection),
            "pool": cache.pool,
            "cfg_scale": params.cfg_scale,
            "temperature": params.temperature,
            "top_k": params.top_k or 0,
            "top_p": params.top_p or 1.0,
            "rule": CONFIDENCE_RULES.index(params.remasking),
            "seed": params.seed,
        }
        for name, value in columns.items():
            getattr(self.table, name)[self.row] = value
        self.table.suppressed[self.row, : len(params.suppress_tokens)] = params.suppress_tokens
        self.table.deferred[self.row, : len(params.defer_tokens)] = params.defer_tokens

    def _enter_block(self, start: int) -> None:
        table, row = self.table, self.row
        end = min(start + self.params.block_length, self.length)
        span = max(start - self._shifted, 0)
        table.start[row], table.end[row], table.span[row] = start, end, span
        table.step_in_block[row] = 0
        table.left[row] = table.masked_at_start[row] = self.masked[start:end].sum()
        table.kept[row] = self.cache.kept(self.length - (end - span)) if self.cache.mode != "none" else 0
        table.lost[row] = False

    def _stops(self) -> int | None:
        """The position behind the token that stops decoding in the current block, which must be full."""
        block = self.token_ids[self.start : self.end]
        stops = np.flatnonzero(np.isin(block, self._stop_ids))
        end = self.start + int(stops[0]) + 1 if stops.size else None
        if self._decode is None or not self._has_stop(end or self.end):
            return end
        return next(at for at in range(self.start + 1, self.end + 1) if self._has_stop(at))

    def _has_stop(self, end: int) -> bool:
        """Whether the completion's text up to a position has a stop string."""
        if self._decode is None or not self.params.stop:
            return False
        text = self._decode(self.token_ids[self.prompt_length : end].tolist())
        return any(stop in text for stop in self.params.stop)


def _require_fits(prompt_length: int, gen_length: int, max_positions: int) -> None:
    if not prompt_length:
        raise RequestError("the prompt is empty (0 tokens); expected at least 1 token")
    if prompt_length + gen_length > max_positions:
        raise RequestError(
            f"the prompt's {prompt_length} tokens and gen_length = {gen_length} make {prompt_length + gen_length} "
            f"positions; expected at most {max_positions}, the model's max_positions: "
            "shorten the prompt or lower gen_length"
        )


def _require_infill(infill: Mapping[int, int], gen_length: int, vocab_size: int) -> None:
    for offset in infill:
        if not is_integer(offset) or not 0 <= offset < gen_length:
            raise RequestError(
                f"infill offset {offset!r}; expected an integer in [0, {gen_length}), gen_length being {gen_length}"
            )
    require_token_ids("infill", infill.items(), vocab_size)


def _require_reference(reference: Sequence[int] | None, gen_length: int, vocab_size: int) -> None:
    if reference is None:
        return
    if len(reference) != gen_length:
        raise RequestError(f"the reference has {len(reference)} tokens; expected gen_length = {gen_length} of them")
    require_token_ids("reference", enumerate(reference), vocab_size)
