"""Layer norm and RMS norm over the last dimension, as torch defines them; statistics in float32 or better.

    aten.layer_norm(x [..., width], [width], weight [width] | None, bias [width] | None, eps)
    aten.rms_norm(x [..., width], [width], weight [width] | None, eps | None)

Statistics are in the workspace. RMS norm of half precision, which torch computes in a dozen passes and as many
allocations, has a chunk of rows, its result and the weight widened to float32 there, and rounds once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.linear import HALF

Call = Callable[[], object]

# Elements of a chunk that is widened: 1 MiB, so that it and its result stay in a second-level cache.
CHUNK_BUDGET = 1 << 18


def layer_norm_workspace(tensors: Sequence[Tensor]) -> int:
    """Bytes for the layer norm of x, the first of a call's tensors: two statistics a row."""
    x = tensors[0]
    return 0 if x.dtype in HALF else x.element_size() * 2 * x.shape[:-1].numel()


def rms_norm_workspace(tensors: Sequence[Tensor]) -> int:
    """Bytes for the RMS norm of x, the first of a call's tensors."""
    x = tensors[0]
    return 4 * sum(_parts(x)) if x.dtype in HALF else x.element_size() * x.shape[:-1].numel()


def bind_layer_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """float32 writes straight into the output; half precision has a transient of the output's size."""
    x, shape, weight, bias, eps = _with_defaults(args[:5], None, None, 1e-5)  # a sixth is cuDNN's
    _require_last(shape, x)
    if x.dtype in HALF:
        return lambda: outs[0].copy_(F.layer_norm(x, shape, weight, bias, eps))
    mean, scale = _shaped(_memory(workspace, x.dtype), 2, *x.shape[:-1], 1)
    out = {"out0": outs[0], "out1": mean, "out2": scale}
    return lambda: torch.ops.aten.native_layer_norm.out(x, shape, weight, bias, eps, **out)


def bind_rms_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """Works in the output and the workspace alone."""
    x, shape, weight, eps = _with_defaults(args, None, None)
    _require_last(shape, x)
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    if x.dtype in HALF:
        return _bind_widened_rms_norm(x, weight, eps, outs[0], _memory(workspace, torch.float32))
    scale = _shaped(_memory(workspace, x.dtype), *x.shape[:-1], 1)
    return lambda: _rms_norm(x, weight, eps, outs[0], scale)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, out: Tensor, scale: Tensor) -> None:
    """scale: [..., 1], overwritten."""
    torch.mean(torch.mul(x, x, out=out), -1, keepdim=True, out=scale)
    torch.mul(x, scale.add_(eps).rsqrt_(), out=out)
    if weight is not None:
        out.mul_(weight)


def _bind_widened_rms_norm(x: Tensor, weight: Tensor | None, eps: float, out: Tensor, floats: Tensor) -> Call:
    parts = _parts(x)
    scales, wide, result, wide_weight = floats[: sum(parts)].split(parts)
    axis, length = _chunk(x)
    chunks = list(zip(x.split(length, axis), out.split(length, axis), strict=True))

    def call() -> None:
        weight32 = None if weight is None else wide_weight.copy_(weight)
        for source, target in chunks:
            x32, out32 = (_shaped(part, *source.shape) for part in (wide, result))
            _rms_norm(x32.copy_(source), weight32, eps, out32, _shaped(scales, *source.shape[:-1], 1))
            target.copy_(out32)

    return call


def _parts(x: Tensor) -> list[int]:
    """Float32 elements of workspace: a statistic a row, a chunk of x, its result, and the weight.

    None falls when an axis of x grows, so what is planned for the largest step suffices for any.
    """
    axis, _ = _chunk(x)
    width = x.shape[-1]
    chunk = min(x.numel(), max(CHUNK_BUDGET, x.shape[axis + 1 :].numel()))
    return [chunk // width, chunk, chunk, width]


def _chunk(x: Tensor) -> tuple[int, int]:
    """The axis that x [..., width] is cut along, the first of more than one element, and the length of a cut."""
    axis = next((axis for axis, size in enumerate(x.shape[:-1]) if size > 1), 0)
    return axis, max(1, CHUNK_BUDGET // max(1, x.shape[axis + 1 :].numel()))


def _shaped(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _memory(workspace: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert workspace is not None, "norms declare a workspace"
    return workspace.view(dtype)


def _with_defaults(args: Sequence[Any], *defaults: Any) -> list[Any]:
    """The operands of a call, trailing ones at their defaults where it leaves them out; the first two are given."""
    return [*args, *defaults[len(args) - 2 :]]


def _require_last(shape: Sequence[int], x: Tensor) -> None:
    if list(shape) != [x.shape[-1]]:
        raise ProgramError(f"a norm over the last dimension [{x.shape[-1]}] is expected, found one over {list(shape)}")
