"""Muon (Jordan et al., 2024): momentum whose matrices are orthogonalised before they are applied.

torch.optim.Muon does the same in bfloat16, which CPUs without AMX multiply slower than float32.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration: they push all singular values towards 1 in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> the same with singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The step has the root mean square of an AdamW step, so AdamW's learning rates fit."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                by_shape[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
