"""What each row of the fused head asks for: its segment's parameters, and which rows need more than their argmax.

Work that few rows want (noise, filters, margins, entropies) is done for those rows alone, and costs nothing when
there are none; deciding that reads the small per-segment tables on the host.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dllmc.errors import RequestError
from dllmc.spec import MAX_TOP_K

CANDIDATES = MAX_TOP_K
"""How many of a row's best tokens top-k and top-p can look at (semantics.md, "Commit")."""


class ConfidenceRule(IntEnum):
    """How sure a choice is, from clean logits; the values of `confidence_rule`."""

    LOW_CONFIDENCE = 0
    TOPK_MARGIN = 1
    ENTROPY = 2
    RANDOM = 3


@dataclass(frozen=True)
class HeadRows:
    """R rows. A row with temperature above 0 is in `sampled`, or in `filtered` if top-k or top-p limit its choice."""

    position: Tensor  # [R] int64
    seed: Tensor  # [R] int64
    step: Tensor  # [R] int64
    temperature: Tensor  # [R] float32
    sampled: Tensor  # int64 indices of rows, as all indices below
    filtered: Tensor
    top_k: Tensor  # [filtered] int64, 1024 where off
    top_p: Tensor  # [filtered] float32, infinite where off
    candidates: int  # best tokens to keep of each filtered row: the largest of `top_k`
    by_margin: Tensor
    by_entropy: Tensor
    by_random: Tensor
    targeted: Tensor
    target: Tensor  # [targeted] int64: the token whose logprob is wanted
    suppressed_row: Tensor  # [pairs] int64: token suppressed_token[i] is suppressed in row suppressed_row[i]
    suppressed_token: Tensor

    @classmethod
    def of(
        cls,
        row_segment: Tensor,
        row_position: Tensor,
        row_target: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        confidence_rule: Tensor,
        seed: Tensor,
        step: Tensor,
        suppressed: Tensor,
    ) -> "HeadRows":
        """From the operator's arguments (`dllmc.ops.decode_head`). Raises `RequestError` for an unknown rule."""
        rule = confidence_rule[row_segment]
        if unknown := set(rule.tolist()) - set(ConfidenceRule):
            known = ", ".join(f"{r.value} ({r.name.lower()})" for r in ConfidenceRule)
            raise RequestError(f"decode_head: confidence_rule holds {sorted(unknown)}; expected one of {known}")
        temperature, top_k, top_p = temperature[row_segment], top_k[row_segment], top_p[row_segment]
        samples, filters = temperature > 0, (top_k > 0) | (top_p < 1)
        filtered, targeted = _indices(samples & filters), _indices(row_target >= 0)
        limit = torch.where(top_k > 0, top_k.clamp_max(CANDIDATES), CANDIDATES)[filtered]
        of_row = suppressed[row_segment]
        suppressed_row, column = (of_row >= 0).nonzero(as_tuple=True)
        return cls(
            position=row_position,
            seed=seed[row_segment],
            step=step[row_segment],
            temperature=temperature,
            sampled=_indices(samples & ~filters),
            filtered=filtered,
            top_k=limit,
            top_p=torch.where(top_p < 1, top_p, torch.inf)[filtered],
            candidates=int(limit.max()) if filtered.numel() else 0,
            by_margin=_indices(rule == ConfidenceRule.TOPK_MARGIN),
            by_entropy=_indices(rule == ConfidenceRule.ENTROPY),
            by_random=_indices(rule == ConfidenceRule.RANDOM),
            targeted=targeted,
            target=row_target[targeted],
            suppressed_row=suppressed_row,
            suppressed_token=of_row[suppressed_row, column],
        )


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]
