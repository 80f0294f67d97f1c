"""The one `torch.library` namespace, `dllmc`; every operator's file defines its schema and kernels in it.

Plain `define` and `impl`: `torch.library.custom_op` would load torch._inductor and torch._dynamo.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

library: Any = torch.library.Library("dllmc", "DEF")


@torch.no_grad()
def run_bound(
    bind: Callable[[Sequence[Any], Sequence[Tensor], Tensor | None], Callable[[], object]],
    args: Sequence[Any],
    outs: Sequence[Tensor],
    workspace_of: Callable[[Sequence[Tensor]], int] = lambda tensors: 0,
) -> None:
    """An operator's call from a graph, which gives it no memory: bind it over a workspace of its own, and run it."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    bind(args, outs, outs[0].new_empty(workspace_of(tensors), dtype=torch.uint8))()
