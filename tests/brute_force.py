"""A decoder that follows semantics.md word for word: what dllmc's results are compared against.

One request at a time, Python loops and float64; nothing here is shared with dllmc. Dense passes run the model as it
is, cached ones (`tests.brute_force_cache`) its float64 twin. It also measures how clear-cut its decisions were
(`Decoded.margin`), so that a test that compares a float32 run can set aside the few examples in which rounding may
decide.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.brute_force_cache import CachedSide, Policy, phase
from tests.layered import LayeredModel, layered

Model = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Logits = NDArray[np.float64]
Side = Callable[[Sequence[int], range, int], tuple[Logits, float]]
"""One forward pass of a step: (ids, block, step in the block) -> logits [len(ids), V], margin of its selection."""

TOP_P_LIMIT = 1024  # top-p looks within this many best tokens
GUMBEL_STREAM, CONFIDENCE_STREAM = 0, 1


class Spec(Protocol):
    """What decoding needs to know of a model; `dllmc.spec.ModelSpec` is one."""

    @property
    def mask_id(self) -> int: ...
    @property
    def end_ids(self) -> Collection[int]: ...
    @property
    def shifted(self) -> bool: ...


@dataclass(frozen=True)
class Decoded:
    """A completion.

    `logprobs[i]` is the clean log-probability of token i when it was committed, None where it was infilled.
    `margin` is the smallest change that would have altered a decision: in logits for the choice of a token, in
    probability for the edge of top-p, in the measure's own unit for confidences, in scores for what is cached.
    `phases` says what each step was: "full", "refresh" or "reuse".
    """

    token_ids: list[int]
    finish_reason: str
    logprobs: list[float | None]
    margin: float
    phases: list[str]

    @property
    def forward_passes(self) -> int:
        """How many steps it took: a guided step is one, though the model runs twice."""
        return len(self.phases)

    @property
    def decisive(self) -> bool:
        """Whether float32 rounding cannot have changed any decision."""
        return self.margin >= 1e-4


def decode(
    model: Model | LayeredModel,
    spec: Spec,
    prompt_ids: Sequence[int],
    *,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
    threshold: float | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    remasking: str = "low_confidence",
    schedule: str = "uniform",
    cfg_scale: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    stop_token_ids: Collection[int] = (),
    suppress_tokens: Collection[int] = (),
    defer_tokens: Collection[int] = (),
    infill: Mapping[int, int] | None = None,
    reference: Sequence[int] | None = None,
    cache: Mapping[str, Any] | None = None,
) -> Decoded:
    """Decode one prompt. `infill` maps offsets in the generation region to token ids.

    `cache` has CachePolicy's arguments, with mode="block" if it says nothing else; None decodes densely. What is
    cached is computed by a `LayeredModel`; the reference models have one each (`layered`).
    With a `reference` of `gen_length` tokens, those are committed in place of the choices (teacher forcing).

    Raises ValueError where `steps` do not split evenly over the blocks, or come together with a threshold.
    """
    if steps is not None and threshold is not None:
        raise ValueError("give steps or a threshold, not both")
    blocks = math.ceil(gen_length / block_length)
    if steps is not None and steps % blocks:
        raise ValueError(f"{blocks} blocks do not divide {steps} steps")
    steps_per_block = None if steps is None else steps // blocks
    stops = set(stop_token_ids) | (set() if ignore_eos else set(spec.end_ids))

    begin, total = len(prompt_ids), len(prompt_ids) + gen_length
    ids = [*prompt_ids, *[spec.mask_id] * gen_length]
    masked = [False] * begin + [True] * gen_length
    logprobs: list[float | None] = [None] * total
    for offset, token in (infill or {}).items():
        ids[begin + offset], masked[begin + offset] = token, False
    policy = Policy(**({"mode": "none"} if cache is None else cache))
    sides = [(side_of(model, spec, policy), list(prompt_ids))]
    if cfg_scale != 0:
        sides.append((side_of(model, spec, policy), [spec.mask_id] * begin))
    phases: list[str] = []
    margin = math.inf

    for start in range(begin, total, block_length):
        end = min(start + block_length, total)
        masked_at_start, i = sum(masked[start:end]), 0
        while any(masked[start:end]):
            logits, selection_margin = step_logits(sides, ids[begin:], cfg_scale, range(start, end), i)
            margin, step = min(margin, selection_margin), len(phases)
            phases.append(phase(policy, i))
            logits[:, list(suppress_tokens)] = -math.inf
            candidates = [p for p in range(start, end) if masked[p]]
            row = {p: logits[max(p - 1, 0) if spec.shifted else p] for p in candidates}

            choice, confidence = {}, {}
            for p in candidates:
                noise = [gumbel(seed, v, p, step) for v in range(len(row[p]))] if temperature else None
                choice[p], choice_margin = choose(row[p], temperature, top_k, top_p, noise)
                margin = min(margin, choice_margin)
                if remasking == "random":
                    confidence[p] = uniform(seed, 0, p, step, CONFIDENCE_STREAM)
                else:
                    confidence[p] = confidence_of(remasking, row[p], choice[p])
            if any(choice[p] not in defer_tokens for p in candidates):
                confidence |= {p: -math.inf for p in candidates if choice[p] in defer_tokens}

            ranked = sorted(candidates, key=lambda p: (-confidence[p], p))
            if threshold is not None:
                committed, edge = above_threshold(ranked, confidence, threshold)
            else:
                left = len(ranked)
                committed, edge = best(ranked, confidence, quota(schedule, i, left, masked_at_start, steps_per_block))
            if remasking != "random":  # random confidences are exact, in any precision
                margin = min(margin, edge)
            for p in committed:
                ids[p], masked[p] = choice[p] if reference is None else reference[p - begin], False
                probability = softmax(row[p])[ids[p]]
                logprobs[p] = math.log(probability) if probability > 0 else -math.inf
            i += 1

        stop = next((p for p in range(start, end) if ids[p] in stops), None)
        if stop is not None:
            return Decoded(ids[begin : stop + 1], "stop", logprobs[begin : stop + 1], margin, phases)
    return Decoded(ids[begin:], "length", logprobs[begin:], margin, phases)


def side_of(model: Any, spec: Spec, policy: Policy) -> Side:
    """One side of a request: dense passes of a `Model`, or passes of a `LayeredModel` with a cache of its own."""
    if policy.mode == "none":
        return lambda ids, block, i: (forward(model, ids), math.inf)
    return CachedSide(layered(model) if isinstance(model, nn.Module) else model, policy, spec.shifted)


def step_logits(
    sides: Sequence[tuple[Side, list[int]]], generation: Sequence[int], cfg_scale: float, block: range, i: int
) -> tuple[Logits, float]:
    """A step's logits [tokens, V] and its selection's margin: of one side, or guided, each side with its own prompt."""
    passes = [side([*prompt, *generation], block, i) for side, prompt in sides]
    margin = min(selection_margin for _, selection_margin in passes)
    if len(passes) == 1:
        return passes[0][0], margin
    (conditional, _), (unconditional, _) = passes
    return unconditional + (cfg_scale + 1) * (conditional - unconditional), margin


def forward(model: Model, ids: Sequence[int]) -> Logits:
    """Run the model on one sequence: logits [len(ids), V], widened to float64."""
    with torch.no_grad():
        logits: Logits = model(torch.tensor([list(ids)]), None)[0].double().numpy().copy()
    return logits


def softmax(z: Logits) -> Logits:
    """Probabilities of logits z [V]."""
    e: Logits = np.exp(z - z.max())
    e /= e.sum()
    return e


def choose(
    z: Logits, temperature: float, top_k: int | None, top_p: float | None, noise: Sequence[float] | None
) -> tuple[int, float]:
    """The token chosen from logits z [V], and how much would have to change for another one to be.

    The filters keep the first `kept` tokens in order of z / t. Another token is chosen if a kept one overtakes the
    winner, if a dropped one is let in and overtakes it, or if the winner itself is dropped.
    """
    possible = [v for v in range(len(z)) if z[v] > -math.inf]
    scale = temperature or 1.0
    scaled = z / scale
    noisy = scaled if noise is None else scaled + np.array(noise)
    order = sorted(possible, key=lambda v: (-scaled[v], v))
    kept = limit = min(len(order), top_k or len(order), TOP_P_LIMIT if top_p is not None else len(order))
    before = [0.0, *accumulate(softmax(scaled)[order])]  # probability of all better ranks
    if top_p is not None:
        kept = sum(before[rank] <= top_p for rank in range(limit))

    winner = min(order[:kept], key=lambda v: (-noisy[v], v))
    margin = math.inf
    for rank, v in enumerate(order):
        behind = scale * (noisy[winner] - noisy[v])
        if rank >= kept:
            let_in = scale * (scaled[order[kept - 1]] - scaled[v])
            if top_p is not None and rank < limit:
                let_in = min(let_in, before[rank] - top_p)
            margin = min(margin, max(behind, let_in))
        elif v != winner:
            margin = min(margin, behind)
        else:
            if kept < len(order):
                margin = min(margin, scale * (scaled[v] - scaled[order[kept]]))
            if top_p is not None and rank > 0:
                margin = min(margin, top_p - before[rank])
    return winner, float(margin)


def confidence_of(remasking: str, z: Logits, token: int) -> float:
    """Confidence in the chosen token from clean logits z [V]; higher is committed sooner."""
    p = softmax(z)
    if remasking == "low_confidence":
        return float(p[token])
    if remasking == "topk_margin":
        second, first = np.sort(p)[-2:]
        return float(first - second)
    if remasking == "entropy":
        return float(sum(x * math.log(x) for x in p if x > 0))
    raise ValueError(f"unknown remasking {remasking!r}")


def quota(schedule: str, i: int, masked: int, masked_at_start: int, steps_per_block: int | None) -> int:
    """How many of the `masked` positions the i-th step of a block commits; without steps, one."""
    if steps_per_block is None:
        return 1
    if schedule == "uniform":
        share, remainder = divmod(masked_at_start, steps_per_block)
        return share + (1 if i < remainder else 0)
    if schedule == "timestep":
        if i == steps_per_block - 1:
            return masked
        t = np.linspace(1, 1e-3, steps_per_block + 1)
        return int(masked * (1 - t[i + 1] / t[i]))
    raise ValueError(f"unknown schedule {schedule!r}")


def best(ranked: Sequence[int], confidence: Mapping[int, float], count: int) -> tuple[Sequence[int], float]:
    """The first `count` of the ranked positions, and the confidence that separates them from the rest."""
    committed, rest = ranked[:count], ranked[count:]
    if not committed or not rest or confidence[committed[-1]] == -math.inf:
        return committed, math.inf  # no boundary, or one among deferred choices, where only positions count
    return committed, confidence[committed[-1]] - confidence[rest[0]]


def above_threshold(
    ranked: Sequence[int], confidence: Mapping[int, float], threshold: float
) -> tuple[Sequence[int], float]:
    """The ranked positions that reach the threshold, at least the first, and the smallest distance to a change."""
    first, others = ranked[0], ranked[1:]
    margin = min((abs(confidence[p] - threshold) for p in others), default=math.inf)
    if others and confidence[first] < threshold:
        margin = min(margin, confidence[first] - confidence[others[0]])
    return [first, *(p for p in others if confidence[p] >= threshold)], margin


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a key and a counter of 32-bit words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    low = 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & low, (product0 >> 32) ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def uniform(seed: int, token_id: int, position: int, step: int, stream: int) -> float:
    """A number in (0, 1), the same wherever it is drawn; `position` counts from the start of the prompt.

    `step` is the number of forward passes the request made before this one, over all its blocks.
    """
    words = philox((seed & 0xFFFFFFFF, seed >> 32), (token_id // 4, position, step, stream))
    return ((words[token_id % 4] >> 9) + 0.5) * 2.0**-23


def gumbel(seed: int, token_id: int, position: int, step: int) -> float:
    """Standard Gumbel noise for one token's logit."""
    return -math.log(-math.log(uniform(seed, token_id, position, step, GUMBEL_STREAM)))
