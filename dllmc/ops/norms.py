"""Layer norm and RMS norm over the last dimension, as torch defines them; statistics in float32.

    aten.layer_norm(x [..., width], [width], weight [width] | None, bias [width] | None, eps)
    aten.rms_norm(x [..., width], [width], weight [width] | None, eps | None)

The workspace holds a row's statistics: two float32 a row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import ProgramError

Call = Callable[[], object]


def workspace_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes for the statistics of every row of a call's x."""
    return 2 * 4 * math.prod(shapes[0][:-1])


def bind_layer_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """float32 writes straight into the output; other dtypes have a transient of the output's size."""
    x, shape, weight, bias, eps = _with_defaults(args[:5], None, None, 1e-5)  # a sixth is cuDNN's
    _require_last(shape, x)
    if x.dtype != torch.float32:
        return lambda: outs[0].copy_(F.layer_norm(x, shape, weight, bias, eps))
    mean, scale = _statistics(x, workspace)
    out = {"out0": outs[0], "out1": mean, "out2": scale}
    return lambda: torch.ops.aten.native_layer_norm.out(x, shape, weight, bias, eps, **out)


def bind_rms_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """float32 works in the output and the workspace; other dtypes have a transient of the output's size."""
    x, shape, weight, eps = _with_defaults(args, None, None)
    _require_last(shape, x)
    if x.dtype != torch.float32:
        return lambda: outs[0].copy_(F.rms_norm(x, shape, weight, eps))
    out, (scale, _) = outs[0], _statistics(x, workspace)
    eps = torch.finfo(x.dtype).eps if eps is None else eps

    def call() -> None:
        torch.mean(torch.mul(x, x, out=out), -1, keepdim=True, out=scale)
        torch.mul(x, scale.add_(eps).rsqrt_(), out=out)
        if weight is not None:
            out.mul_(weight)

    return call


def _with_defaults(args: Sequence[Any], *defaults: Any) -> list[Any]:
    """The operands of a call, trailing ones at their defaults where it leaves them out; the first two are given."""
    return [*args, *defaults[len(args) - 2 :]]


def _statistics(x: Tensor, workspace: Tensor | None) -> tuple[Tensor, Tensor]:
    assert workspace is not None, "norms declare a workspace"
    shape = (*x.shape[:-1], 1)
    rows = math.prod(shape)
    first, second = workspace[: 2 * 4 * rows].view(torch.float32).view(2, rows)
    return first.view(shape), second.view(shape)


def _require_last(shape: Sequence[int], x: Tensor) -> None:
    if list(shape) != [x.shape[-1]]:
        raise ProgramError(f"a norm over the last dimension [{x.shape[-1]}] is expected, found one over {list(shape)}")
