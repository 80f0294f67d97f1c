"""`dllmc::guide_rows`: classifier-free guidance on hidden rows, before the head, which is linear.

    hidden [rows + guided, D], guided [guided] int64, guidance [guided] float32 -> [rows, D]

The last `guided` rows of `hidden` are the unconditional twins of the rows that `guided` names:
h = h_uncond + (guidance + 1) * (h_cond - h_uncond) (semantics.md, "Commit"; LLaDA, arXiv 2502.09992).
Where `guided` names a row twice, as the padding of a step may, that row is guided by one of its twins.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllmc.ops.library import library, run_bound

library.define("guide_rows(Tensor hidden, Tensor guided, Tensor guidance) -> Tensor")


def guide_rows_out(hidden: Tensor, guided: Tensor, guidance: Tensor, out: Tensor) -> None:
    """CPU: copy the conditional rows, then move the guided ones away from their twins."""
    rows = out.shape[0]
    out.copy_(hidden[:rows])
    if guided.shape[0]:
        twins = hidden[rows:]
        out[guided] = torch.lerp(twins, out[guided], (guidance[:, None] + 1).to(out.dtype))


def _fake(hidden: Tensor, guided: Tensor, guidance: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0] - guided.shape[0], hidden.shape[1])


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Callable[[], object]:
    """Resolve a call over fixed memory."""
    hidden, guided, guidance = args
    if hidden.is_cuda:
        from dllmc.ops.kernels.guide_rows import guide_rows

        return partial(guide_rows, hidden, guided, guidance, outs[0])
    return partial(guide_rows_out, hidden, guided, guidance, outs[0])


def _guide_rows(hidden: Tensor, guided: Tensor, guidance: Tensor) -> Tensor:
    out = _fake(hidden, guided, guidance)
    run_bound(bind, (hidden, guided, guidance), (out,))
    return out


library.impl("guide_rows", _guide_rows, "CPU")
library.impl("guide_rows", _guide_rows, "CUDA")
torch.library.register_fake("dllmc::guide_rows", _fake, lib=library)
