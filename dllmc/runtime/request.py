"""The record of one request while it is decoded: its tokens, what is masked, where in the schedule it stands.

A request knows nothing of batches or devices: a step asks it for its `phase`, `candidates()` and `commit_count()`, and
hands the decision back to `commit()`. Positions, never token values, say what is masked (semantics.md, "Commit").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from dllmc.errors import RequestError
from dllmc.runtime.params import (
    DENSE,
    CachePolicy,
    Phase,
    SamplingParams,
    is_integer,
    require_servable,
    require_token_ids,
)
from dllmc.spec import ModelSpec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationResult:
    """What a finished request returns."""

    token_ids: list[int]
    """The completion only, cut after its first stop token."""

    text: str | None
    """The completion as text; None without a tokenizer."""

    forward_passes: int
    """Steps taken; a guided step counts once."""

    finish_reason: FinishReason
    """"stop": a stop token cut the completion. "length": it has `gen_length` tokens."""

    logprobs: list[float] | None
    """Natural log of each token's probability when it was committed, 0.0 for infilled ones; None if not asked for."""


class Request:
    """A request being decoded; created valid, advanced by `commit`, finished when `finished`.

    token_ids: [P + G] int64, prompt and generation region, the model's `mask_id` where nothing is committed yet.
    masked: [P + G] bool. start, end: the current block's positions, half-open. step: steps taken, over all blocks;
    step_in_block: in this one. masked_at_start: masked positions of the current block when it began.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        spec: ModelSpec,
        infill: Mapping[int, int] = MappingProxyType({}),
        reference: Sequence[int] | None = None,
        cache: CachePolicy = DENSE,
    ) -> None:
        """Raise `RequestError`, with the numbers, for a prompt, infill or params that the model cannot serve."""
        _require_fits(len(prompt_ids), params.gen_length, spec.max_positions)
        require_token_ids("prompt", enumerate(prompt_ids), spec.vocab_size)
        _require_infill(infill, params.gen_length, spec.vocab_size)
        _require_reference(reference, params.gen_length, spec.vocab_size)
        require_servable(params, spec.vocab_size)
        self.params = params
        self.cache = cache
        self.prompt_length = len(prompt_ids)
        self.step = 0
        self.finish_reason: FinishReason | None = None

        self.token_ids: npt.NDArray[np.int64] = np.full(self.prompt_length + params.gen_length, spec.mask_id, np.int64)
        self.masked = np.ones(self.token_ids.size, np.bool_)
        fixed = self.prompt_length + np.fromiter(infill.keys(), np.int64, len(infill))
        self.token_ids[: self.prompt_length] = prompt_ids
        self.token_ids[fixed] = np.fromiter(infill.values(), np.int64, len(infill))
        self.masked[: self.prompt_length] = False
        self.masked[fixed] = False

        self._mask_id = spec.mask_id
        self._shifted = spec.shifted
        self._reference = None if reference is None else np.array([*prompt_ids, *reference], np.int64)
        self._stop_ids = np.array([*params.stop_token_ids, *(() if params.ignore_eos else spec.end_ids)], np.int64)
        self._logprobs = np.zeros(self.token_ids.size)
        self._enter_block(self.prompt_length)
        self._leave_full_blocks()

    @property
    def finished(self) -> bool:
        """Whether decoding is over and `result` may be called."""
        return self.finish_reason is not None

    @property
    def phase(self) -> Phase:
        """What the next step is."""
        return self.cache.phase(self.step_in_block)

    @property
    def span(self) -> tuple[int, int]:
        """The active span, half-open: the block, and for a shifted model its predecessor."""
        return max(self.start - self._shifted, 0), self.end

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
        return self.cache.kept(self.token_ids.size - last - self._shifted)

    @property
    def kept(self) -> int:
        """How many keys a head keeps at a Refresh of the current block."""
        first, end = self.span
        return self.cache.kept(self.token_ids.size - (end - first))

    @property
    def commit_threshold(self) -> float:
        """Confidence from which this request commits; +inf where `commit_count` alone decides."""
        return np.inf if self.params.threshold is None else self.params.threshold

    @property
    def logprobs(self) -> npt.NDArray[np.float64] | None:
        """[P + G], natural log: of each token that was committed, 0.0 elsewhere; None unless the params ask for it."""
        return self._logprobs if self.params.logprobs else None

    def candidates(self) -> npt.NDArray[np.int64]:
        """Masked positions of the current block, ascending: [rows]. Empty once finished."""
        return self.start + np.flatnonzero(self.masked[self.start : self.end])

    def targets(self) -> npt.NDArray[np.int64]:
        """The reference's tokens at the candidates, -1 without a reference: [rows]."""
        candidates = self.candidates()
        return np.full_like(candidates, -1) if self._reference is None else self._reference[candidates]

    def commit_count(self) -> int:
        """How many candidates this step commits, maybe 0; with a threshold, the least it commits: 1."""
        steps = self.params.steps_per_block
        if steps is None:
            return 1
        if self.params.schedule == "timestep":
            return timestep_count(self.candidates().size, self.step_in_block, steps)
        return uniform_count(self.masked_at_start, self.step_in_block, steps)

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
        if self.params.logprobs:
            if logprobs is None:
                raise ValueError("commit without logprobs, which the request's params ask for")
            self._logprobs[positions] = logprobs
        self.token_ids[positions] = token_ids if self._reference is None else self._reference[positions]
        self.masked[positions] = False
        self.step += 1
        self.step_in_block += 1
        self._leave_full_blocks()

    def unconditional_token_ids(self) -> npt.NDArray[np.int64]:
        """What guidance's second pass sees, [P + G]: the prompt replaced by `mask_id`, the rest as it is."""
        ids = self.token_ids.copy()
        ids[: self.prompt_length] = self._mask_id
        return ids

    def result(self) -> GenerationResult:
        """The completion, without text. Raises `ValueError` unless finished."""
        if self.finish_reason is None:
            raise ValueError(f"the request is not finished: {self.masked.sum()} positions are masked")
        end = self.end if self.finish_reason == "length" else self.start + self._stops()[0] + 1
        completion = slice(self.prompt_length, end)
        return GenerationResult(
            token_ids=self.token_ids[completion].tolist(),
            text=None,
            forward_passes=self.step,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs[completion].tolist() if self.params.logprobs else None,
        )

    def _enter_block(self, start: int) -> None:
        self.start = start
        self.end = min(start + self.params.block_length, self.token_ids.size)
        self.step_in_block = 0
        self.masked_at_start = self.candidates().size

    def _leave_full_blocks(self) -> None:
        """End each block in which nothing is masked, infilled ones too, until one has work or decoding is over."""
        while not self.candidates().size:
            if self._stops().size:
                self.finish_reason = "stop"
                return
            if self.end == self.token_ids.size:
                self.finish_reason = "length"
                return
            self._enter_block(self.end)

    def _stops(self) -> npt.NDArray[np.int64]:
        """Offsets of stop tokens in the current block, which must be full."""
        return np.flatnonzero(np.isin(self.token_ids[self.start : self.end], self._stop_ids))


def uniform_count(masked_at_start: int, step: int, steps: int) -> int:
    """Tokens that step `step` of a block's `steps` commits: an even share, the remainder going to the first ones."""
    share, remainder = divmod(masked_at_start, steps)
    return share + (step < remainder)


def timestep_count(masked: int, step: int, steps: int) -> int:
    """Tokens that step `step` of a block's `steps` commits of the `masked` left; all of them at the last step.

    Before it, int(masked * (1 - t[step + 1] / t[step])) with t = linspace(1, 1e-3, steps + 1) (Dream, arXiv
    2508.15487), as one fraction of integers: t[i] = (1000 * steps - 999 * i) / (1000 * steps). No rounding decides.
    """
    if step == steps - 1:
        return masked
    return 999 * masked // (1000 * steps - 999 * step)


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
