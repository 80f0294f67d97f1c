"""What a caller may ask of a request: the prompt, how to sample, how to cache.

What the values alone contradict is refused where they are made; what depends on the model is checked by
`require_servable` and by `dllmc.runtime.request.Request`. Either way it is a `RequestError` before anything runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

import numpy as np

from dllmc.errors import RequestError
from dllmc.spec import MAX_DEFER_TOKENS, MAX_SUPPRESS_TOKENS, MAX_TOP_K

CONFIDENCE_RULES = ("low_confidence", "topk_margin", "entropy", "random")
"""The choices of `SamplingParams.remasking`. A rule's index is its code in `dllmc::decode_head`."""

SCHEDULES = ("uniform", "timestep")
"""The choices of `SamplingParams.schedule`."""

CACHE_MODES = ("block", "none")
"""The choices of `CachePolicy.mode`."""

SELECTIONS = ("per_head", "shared")
"""The choices of `CachePolicy.selection`."""

MAX_POOL = 255
"""The widest window of `CachePolicy.pool`."""

Phase = Literal["full", "refresh", "reuse"]
"""What a step of a request is (semantics.md, "Terms")."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_TOKEN_FIELDS = ("stop_token_ids", "suppress_tokens", "defer_tokens")


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded (semantics.md, "Commit"). Raises `RequestError` on values that cannot be served.

    At most one of `steps` and `threshold` is given; with neither, each step commits one token.
    """

    gen_length: int = 128
    """Positions after the prompt to decode, at least 1. The completion is shorter when a stop token cuts it."""

    block_length: int = 32
    """Positions decoded together before the next block starts, at least 1. The last block may be shorter."""

    steps: int | None = None
    """Forward passes over all blocks, a multiple of `blocks`. An infilled or short block may need fewer."""

    threshold: float | None = None
    """Commit each candidate at least this confident, and always the best one (Fast-dLLM, arXiv 2505.22618).

    In the unit of `remasking`: in (0, 1], but for "entropy" at most 0 (nats), as its confidences are.
    """

    temperature: float = 0.0
    """Divides the logits before Gumbel noise is added, at least 0; at 0 the best token is taken. No unit."""

    top_k: int | None = None
    """Sample only from this many of the best tokens, 1 to 1024. None: from all."""

    top_p: float | None = None
    """Sample only from the fewest best tokens (of the best 1024) that reach this probability, in (0, 1]. None: all."""

    remasking: str = "low_confidence"
    """One of `CONFIDENCE_RULES`: what ranks the candidates of a step (LLaDA, arXiv 2502.09992; Dream, 2508.15487)."""

    schedule: str = "uniform"
    """One of `SCHEDULES`: how `steps` share a block, evenly (LLaDA) or by timestep (Dream; needs `steps`)."""

    cfg_scale: float = 0.0
    """Scale of classifier-free guidance, at least 0; 0 is off, else a step runs the request twice. No unit."""

    seed: int = 0
    """Key of the noise, a signed 64-bit integer. The same seed gives the same tokens in any batch."""

    ignore_eos: bool = False
    """Do not stop at the model's end tokens; `stop_token_ids` still stop."""

    stop_token_ids: Sequence[int] = ()
    """Token ids that end decoding with their block; the completion is cut after the first. Kept as a tuple."""

    stop: str | Sequence[str] = ()
    """Texts that end decoding with their block; the completion's text is cut before the first. Kept as a tuple."""

    suppress_tokens: Sequence[int] = ()
    """At most 64 token ids that are never chosen: their logits are -inf (LLaDA's `logits_eos_inf`)."""

    defer_tokens: Sequence[int] = ()
    """At most 64 token ids that, as a choice, are committed last (LLaDA's `confidence_eos_eot_inf`)."""

    logprobs: bool = False
    """Return the log-probability of each token of the completion."""

    def __post_init__(self) -> None:
        for name in _TOKEN_FIELDS:
            ids = getattr(self, name)
            listed = isinstance(ids, Sequence) and not isinstance(ids, str | bytes)
            self._require(name, listed and all(is_integer(i) for i in ids), "a list of integer token ids")
            object.__setattr__(self, name, tuple(int(i) for i in ids))
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        texts_ok = isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)
        self._require("stop", texts_ok, "a text, or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(texts))
        for name in ("gen_length", "block_length"):
            self._require(name, _integer_in(getattr(self, name), 1), "an integer >= 1")
        self._require("steps", self.steps is None or _integer_in(self.steps, 1), "an integer >= 1, or None")
        top_k_ok = self.top_k is None or _integer_in(self.top_k, 1, MAX_TOP_K)
        self._require("top_k", top_k_ok, f"an integer in [1, {MAX_TOP_K}], or None")
        top_p_ok = self.top_p is None or (_number_in(self.top_p, 0, 1) and self.top_p > 0)
        self._require("top_p", top_p_ok, "a number in (0, 1], or None")
        self._require("seed", _integer_in(self.seed, -(2**63), 2**63 - 1), "an integer in [-2**63, 2**63 - 1]")
        for name in ("temperature", "cfg_scale"):
            self._require(name, _number_in(getattr(self, name), 0, _FLOAT32_MAX), "a finite float32 number >= 0")
        for name in ("ignore_eos", "logprobs"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        self._require("remasking", self.remasking in CONFIDENCE_RULES, f"one of {', '.join(CONFIDENCE_RULES)}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        for name, most in (("suppress_tokens", MAX_SUPPRESS_TOKENS), ("defer_tokens", MAX_DEFER_TOKENS)):
            count = len(getattr(self, name))
            self._require(name, count <= most, f"at most {most} ids, not {count}")
        self._check_pace()

    def _check_pace(self) -> None:
        """`steps`, `threshold` and `schedule` against each other and against what they pace."""
        if self.steps is not None and self.threshold is not None:
            raise RequestError(
                f"SamplingParams: steps = {self.steps} and threshold = {self.threshold} are both given; "
                "expected at most one: steps fixes how many tokens a step commits, threshold decides it by confidence"
            )
        if self.threshold is not None and self.remasking == "entropy":
            expected = "a finite float32 number <= 0 with remasking = 'entropy', whose confidences are sum p log p"
            self._require("threshold", _number_in(self.threshold, -_FLOAT32_MAX, 0), expected)
        elif self.threshold is not None:
            ok = _number_in(self.threshold, 0, 1) and self.threshold > 0
            self._require("threshold", ok, f"a number in (0, 1] with remasking = {self.remasking!r}, or None")
        if self.schedule == "timestep" and self.steps is None:
            raise RequestError(
                "SamplingParams.schedule is 'timestep' and steps is None; expected steps to be an integer >= 1: "
                "the timestep schedule is over a fixed number of steps"
            )
        if self.steps is not None and self.steps % self.blocks:
            nearest = -(-self.steps // self.blocks) * self.blocks
            raise RequestError(
                f"SamplingParams.steps is {self.steps}; expected a multiple of {self.blocks}, the number of blocks "
                f"in gen_length = {self.gen_length} with block_length = {self.block_length}; {nearest} would do"
            )

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise RequestError(f"SamplingParams.{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def blocks(self) -> int:
        """Blocks of the generation region: ceil(gen_length / block_length)."""
        return -(-self.gen_length // self.block_length)

    @property
    def steps_per_block(self) -> int | None:
        """Steps that each block is given; None where `steps` is."""
        return None if self.steps is None else self.steps // self.blocks


@dataclass(frozen=True)
class CachePolicy:
    """How a request reuses keys and values between the steps of a block (semantics.md, "Schedule of one block").

    The defaults are Fast-dLLM's dual cache (arXiv 2505.22618); `delay=1` with `selection="shared"` is Sparse-dLLM's
    (2508.02558), with `selection="per_head"` dLLM-Serve's (2512.17077).
    """

    mode: str = "block"
    """"block": a Refresh caches keys and values outside of the active span for the block's steps behind it. "none":
    every step computes every position."""

    retention: float = 1.0
    """Share of the positions outside of the active span that are cached, in (0, 1]; at least one of them."""

    selection: str = "per_head"
    """One of `SELECTIONS`: every head of a layer keeps positions of its own, or all keep the same ones."""

    pool: int = 3
    """Positions over which scores are max-pooled before they are compared: odd; 1 is off."""

    delay: int = 0
    """Steps of a block that compute every position before the Refresh, at least 0."""

    refresh_interval: int | None = None
    """Steps from one Refresh of a block to the next, at least 1. None: one Refresh a block."""

    def __post_init__(self) -> None:
        self._require("mode", self.mode in CACHE_MODES, f"one of {', '.join(CACHE_MODES)}")
        self._require("retention", _number_in(self.retention, 0, 1) and self.retention > 0, "a number in (0, 1]")
        self._require("selection", self.selection in SELECTIONS, f"one of {', '.join(SELECTIONS)}")
        odd = _integer_in(self.pool, 1, MAX_POOL) and self.pool % 2 == 1
        self._require("pool", odd, f"an odd integer in [1, {MAX_POOL}]")
        self._require("delay", _integer_in(self.delay, 0), "an integer >= 0")
        often = self.refresh_interval is None or _integer_in(self.refresh_interval, 1)
        self._require("refresh_interval", often, "an integer >= 1, or None")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise RequestError(f"CachePolicy.{name} is {getattr(self, name)!r}; expected {expected}")

    def kept(self, candidates: int) -> int:
        """How many of the positions outside of the active span each head keeps."""
        return min(max(1, int(candidates * self.retention)), candidates)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and tokens that are fixed from the start inside the region to generate (infilling)."""

    content: str | Sequence[int]
    """Text, for the model's tokenizer, or token ids."""

    infill: Mapping[int, int] = field(default_factory=dict)
    """Offset in the generation region, in [0, gen_length) -> token id."""

    reference: Sequence[int] | None = None
    """Teacher forcing: a completion of `gen_length` token ids. Where and when the model's choices would be committed,
    these are instead, and `logprobs` are theirs: how well the model predicts a known text in the order it decodes."""

    def __post_init__(self) -> None:
        if not isinstance(self.content, Sequence) or isinstance(self.content, bytes | bytearray):
            raise RequestError(f"Prompt.content is {self.content!r}; expected text or a list of integer token ids")
        if not isinstance(self.infill, Mapping):
            raise RequestError(f"Prompt.infill is {self.infill!r}; expected a mapping of offset to token id")
        if self.reference is not None and (not isinstance(self.reference, Sequence) or isinstance(self.reference, str)):
            raise RequestError(f"Prompt.reference is {self.reference!r}; expected a list of integer token ids, or None")


def require_servable(params: SamplingParams, vocab_size: int) -> None:
    """Check what depends on the model: its tokens are ids in [0, vocab_size). Raises `RequestError`."""
    for name in _TOKEN_FIELDS:
        require_token_ids(f"SamplingParams.{name}", enumerate(getattr(params, name)), vocab_size)
    if len(set(params.suppress_tokens)) == vocab_size:
        raise RequestError(
            f"SamplingParams.suppress_tokens names all {vocab_size} tokens of the vocabulary; "
            f"expected at most {vocab_size - 1} of them, so that one is left to choose"
        )


def require_token_ids(what: str, indexed: Iterable[tuple[object, object]], vocab_size: int) -> None:
    """Check (index, token id) pairs, for example `enumerate(ids)`; `what` names them in the `RequestError`."""
    for index, token in indexed:
        if not _integer_in(token, 0, vocab_size - 1):
            raise RequestError(f"{what}[{index!r}] is {token!r}; expected a token id in [0, {vocab_size})")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, NumPy's included; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _integer_in(value: object, low: int, high: int | None = None) -> bool:
    return is_integer(value) and low <= value and (high is None or value <= high)


def _number_in(value: object, low: float, high: float) -> bool:
    """Whether it is a number in [low, high]; NaN, True and False are not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(low <= value <= high)


DENSE = CachePolicy(mode="none")
"""Every step computes every position."""
