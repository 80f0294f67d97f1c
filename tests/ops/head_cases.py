"""Inputs for the fused head: segments with mixed parameters, logits that are exact or clear-cut, and what to expect."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from dllmc.ops import decode_head
from dllmc.ops.decode_head import ConfidenceRule, HeadRows, Tiling
from tests import brute_force

Results = tuple[Tensor, Tensor, Tensor]  # token, confidence, logprob

DECISIVE = 1e-4
"""Rows whose choice a smaller change than this could alter are left out where float32 meets float64."""


@dataclass(frozen=True)
class Segment:
    """One request's entries in the head's tables."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    rule: ConfidenceRule = ConfidenceRule.LOW_CONFIDENCE
    seed: int = 0
    step: int = 0
    suppressed: tuple[int, ...] = ()


MARGIN, ENTROPY, RANDOM = ConfidenceRule.TOPK_MARGIN, ConfidenceRule.ENTROPY, ConfidenceRule.RANDOM
GREEDY = [Segment(rule=rule, seed=5, step=2) for rule in ConfidenceRule] + [Segment(suppressed=(0, 1, 77))]
SAMPLED = [
    Segment(temperature=1.0, seed=3),
    Segment(temperature=0.7, seed=2**40 + 1, step=4, rule=MARGIN),
    Segment(temperature=1.3, top_k=3, seed=9, rule=ENTROPY),
    Segment(temperature=0.9, top_p=0.61, seed=-8, rule=RANDOM),
    Segment(temperature=2.0, top_k=40, top_p=0.83, seed=1, step=7),
    Segment(temperature=1.5, top_p=0.47, seed=6, suppressed=(2, 5, 64)),
    Segment(temperature=0.8, seed=4, suppressed=(0,), rule=ENTROPY),
]
MIXED = GREEDY + SAMPLED


def tables(segments: list[Segment]) -> tuple[Tensor, ...]:
    """The seven per-segment arguments, in the operator's order."""
    temperature, top_k, top_p, rule, seed, step, suppressed = zip(*map(astuple, segments), strict=True)
    width = max(map(len, suppressed))
    padded = [[*ids, *[-1] * (width - len(ids))] for ids in suppressed]
    counts = [torch.tensor(column, dtype=torch.int64) for column in (rule, seed, step)]
    return (
        torch.tensor(temperature),
        torch.tensor(top_k, dtype=torch.int64),
        torch.tensor(top_p),
        *counts,
        torch.tensor(padded, dtype=torch.int64),
    )


@dataclass(frozen=True)
class Case:
    """A call of the operator."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    segments: list[Segment]
    row_segment: Tensor
    row_position: Tensor
    row_target: Tensor  # -1: none

    @property
    def args(self) -> tuple[object, ...]:
        rows = self.row_segment, self.row_position, self.row_target
        return self.hidden, self.weight, self.bias, self.scale, *rows, *tables(self.segments)

    def to(self, dtype: torch.dtype) -> "Case":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def take(self, rows: Tensor | list[int]) -> "Case":
        return replace(
            self,
            hidden=self.hidden[rows],
            row_segment=self.row_segment[rows],
            row_position=self.row_position[rows],
            row_target=self.row_target[rows],
        )

    def reference(self, dtype: torch.dtype) -> Results:
        return decode_head.reference(*self.to(dtype).args)

    def run(self) -> Results:
        return torch.ops.dllmc.decode_head(*self.args)

    def run_in_tiles(self, columns: int) -> Results:
        """The CPU implementation, forced into tiles of that many columns."""
        tiling = Tiling(len(self.hidden), columns)
        head = self.hidden, self.weight, self.bias, self.scale
        return decode_head.decode_tiles(*head, self.rows(), tiling, torch.empty(tiling.elements))

    def rows(self) -> HeadRows:
        return HeadRows.of(self.row_segment, self.row_position, self.row_target, *tables(self.segments))

    def brute_force(self) -> list[tuple[int, float, float, float]]:
        """Token, confidence, logprob and margin of each row, from `tests.brute_force` in float64."""
        case = self.to(torch.float64)
        z = case.hidden @ case.weight.T
        z = case.scale * (z if case.bias is None else z + case.bias)
        rows = (x.tolist() for x in (self.row_segment, self.row_position, self.row_target))
        return [
            brute_force_row(self.segments[segment], position, target, row)
            for segment, position, target, row in zip(*rows, z, strict=True)
        ]


def brute_force_row(segment: Segment, position: int, target: int, logits: Tensor) -> tuple[int, float, float, float]:
    """One row: token, confidence, logprob, and how little would change the token."""
    z = logits.numpy().copy()
    z[[v for v in segment.suppressed if v < len(z)]] = -torch.inf
    seed, temperature = segment.seed % 2**64, float(torch.tensor(segment.temperature))
    noise = [brute_force.gumbel(seed, v, position, segment.step) for v in range(len(z))] if temperature else None
    top_p = float(torch.tensor(segment.top_p)) if segment.top_p < 1 and temperature else None
    token, margin = brute_force.choose(z, temperature, segment.top_k if temperature else None, top_p, noise)
    if segment.rule == RANDOM:
        confidence = brute_force.uniform(seed, 0, position, segment.step, brute_force.CONFIDENCE_STREAM)
    else:
        confidence = brute_force.confidence_of(segment.rule.name.lower(), z, token)
    wanted = token if target < 0 else target
    return token, confidence, float(logits.new_tensor(z).log_softmax(0)[wanted]), margin


def exact(
    rows: int, vocab: int, hidden_size: int, segments: list[Segment] = MIXED, *, bias: bool, scale: float
) -> Case:
    """Small integers everywhere: logits are exact in float32, in any order of summation, and most have ties."""
    generator = torch.Generator().manual_seed(rows * 10007 + vocab)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    hidden, weight = integers(rows, hidden_size), integers(vocab, hidden_size)
    return _case(hidden, weight, integers(vocab) if bias else None, scale, _fitting(segments, vocab))


def random(rows: int, vocab: int, hidden_size: int, segments: list[Segment] = MIXED, *, seed: int = 0) -> Case:
    """Normal logits with a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, hidden_size, generator=generator) for n in (rows, vocab))
    bias = torch.randn(vocab, generator=generator)
    return _case(hidden, weight, bias, 2 / (hidden_size + 1) ** 0.5, _fitting(segments, vocab))


def from_logits(logits: Tensor, segments: list[Segment]) -> Case:
    """A head that computes exactly these logits [rows, vocab]."""
    return _case(logits, torch.eye(logits.shape[1]), None, 1.0, segments)


def _fitting(segments: list[Segment], vocab: int) -> list[Segment]:
    """The segments without suppressed tokens that a small vocabulary lacks or cannot spare."""
    return [replace(s, suppressed=tuple(v for v in s.suppressed if v < vocab - 1)) for s in segments]


def _case(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, segments: list[Segment]) -> Case:
    index = torch.arange(len(hidden))
    vocab = len(weight)
    target = torch.where(index % 3 == 1, (7 * index + vocab // 2) % vocab, -1)
    return Case(hidden, weight, bias, scale, segments, index % len(segments), 3 * index + 1, target)


def assert_results(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Tokens exactly, confidences and logprobs within 1e-5 relative."""
    assert actual[0].tolist() == expected[0].tolist()
    for out, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(out.double(), wanted.double(), rtol=1e-5, atol=1e-6)


def decisive(case: Case, rows: int) -> tuple[Case, Results]:
    """The case's first `rows` rows that float32 rounding cannot decide, and their brute-force results."""
    results = case.brute_force()
    kept = [row for row, (*_, margin) in enumerate(results) if margin >= DECISIVE][:rows]
    assert len(kept) == rows
    token, confidence, logprob, _ = zip(*(results[row] for row in kept), strict=True)
    return case.take(kept), (torch.tensor(token), torch.tensor(confidence), torch.tensor(logprob))
