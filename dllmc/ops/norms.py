"""Layer norm and RMS norm over the last axis, each alone or of a residual sum; statistics in float32 or better.

    dllmc::rms_norm(x [..., width], weight [width] | None, bias [width] | None, eps) -> [..., width]
    dllmc::add_rms_norm, dllmc::add_layer_norm(x, residual, weight, bias, eps) -> normed, x + residual
    aten.rms_norm and aten.layer_norm, as torch defines them, over the last axis alone

The sum is rounded to x's dtype, and the norm is of that rounded sum. A result is rounded once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.chunks import Call, Part, by_chunk, bytes_of, carved, chunks, in_order, rows_in_chunk, shaped, wide_dtype
from dllmc.ops.library import library, run_bound

library.define("rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
for _name in ("add_rms_norm", "add_layer_norm"):
    library.define(f"{_name}(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)")


def rms_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in float32, or in float64 for float64: x / sqrt(mean(x^2) + eps) * weight + bias."""
    wide = x.to(wide_dtype(x))
    return _affine(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), weight, bias).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, likewise: the same of x - mean(x)."""
    wide = x.to(wide_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    return _affine(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), weight, bias).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def rms_norm_workspace(tensors: Sequence[Tensor]) -> int:
    """Bytes for the RMS norm of x, the first of a call's tensors; weight and bias, if any, are the others."""
    x, *affine = tensors
    return bytes_of(_parts(x, *affine))


def add_rms_norm_workspace(tensors: Sequence[Tensor]) -> int:
    """Bytes for the RMS norm of the sum of a call's first two tensors."""
    return rms_norm_workspace([tensors[0], *tensors[2:]])


def bind_rms_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`dllmc::rms_norm`."""
    x, weight, bias, eps = args
    return _bind_rms(x, None, weight, bias, eps, outs, workspace)


def bind_add_rms_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`dllmc::add_rms_norm`."""
    x, residual, weight, bias, eps = args
    return _bind_rms(x, residual, weight, bias, eps, outs, workspace)


def bind_torch_rms_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`aten.rms_norm(x, [width], weight, eps)`; without eps, the dtype's own."""
    x, shape, weight, eps = _with_defaults(args, None, None)
    _require_last(shape, x)
    return _bind_rms(x, None, weight, None, torch.finfo(wide_dtype(x)).eps if eps is None else eps, outs, workspace)


def bind_add_layer_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`dllmc::add_layer_norm`."""
    x, residual, weight, bias, eps = args
    return _bind_layer_norm(x, residual, weight, bias, eps, outs)


def bind_layer_norm(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """`aten.layer_norm(x, [width], weight, bias, eps)`."""
    x, shape, weight, bias, eps = _with_defaults(args[:5], None, None, 1e-5)  # a sixth is cuDNN's
    _require_last(shape, x)
    return _bind_layer_norm(x, None, weight, bias, eps, outs)


def _bind_rms(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    outs: Sequence[Tensor],
    workspace: Tensor | None,
) -> Call:
    """CPU: in the output and the workspace alone. outs: the norm, and the sum where there is a residual."""
    if x.is_cuda:
        return _bind_kernel(x, residual, weight, bias, eps, outs, centred=False)
    statistics, wide, wide_weight, wide_bias = carved(workspace, _parts(x, weight, bias))
    once: list[Call] = []
    weight = _widened(weight, wide_weight, once)
    bias = _widened(bias, wide_bias, once)
    least = torch.tensor(eps, dtype=wide.dtype)

    def of_chunk(parts: Sequence[Tensor]) -> list[Call]:
        out, source, *addends = parts
        calls: list[Call] = []
        if addends:
            calls.append(partial(torch.add, *addends, out=source))
        result, scale = out, shaped(statistics, *source.shape[:-1], 1)
        if source.dtype != wide.dtype:
            result = shaped(wide, *source.shape)
            calls.append(partial(result.copy_, source))
            source = result
        calls += [
            partial(torch.linalg.vector_norm, source, dim=-1, keepdim=True, out=scale),
            partial(torch.addcmul, least, scale, scale, value=1 / x.shape[-1], out=scale),
            scale.rsqrt_,
            partial(torch.mul, source, scale, out=result),
        ]
        if weight is not None and bias is not None:
            calls.append(partial(torch.addcmul, bias, result, weight, out=result))
        elif weight is not None:
            calls.append(partial(result.mul_, weight))
        elif bias is not None:
            calls.append(partial(result.add_, bias))
        if result is not out:
            calls.append(partial(out.copy_, result))
        return calls

    return in_order([*once, by_chunk(lambda: _chunks(x, residual, outs), of_chunk)])


def _parts(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> list[Part]:
    """Workspace: a statistic a row, and what is widened: a chunk of x, and each of weight and bias."""
    width, dtype = x.shape[-1], wide_dtype(x)
    rows = rows_in_chunk(x.shape[:-1].numel(), width * x.element_size())
    wide = 0 if x.dtype == dtype else rows * width
    return [(n, dtype) for n in (rows, wide, *(0 if p is None or p.dtype == dtype else width for p in (weight, bias)))]


def _widened(parameter: Tensor | None, memory: Tensor, calls: list[Call]) -> Tensor | None:
    """The parameter in the memory's dtype, where it is copied to if it has another."""
    if parameter is None or parameter.dtype == memory.dtype:
        return parameter
    calls.append(partial(memory.copy_, parameter))
    return memory


def _bind_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    outs: Sequence[Tensor],
) -> Call:
    """CPU: torch's fused kernel, whose result is a transient of a chunk: it has no variant that writes elsewhere.

    `native_layer_norm.out` copies from a transient too, and computing in place costs up to half as much again.
    """
    if x.is_cuda:
        return _bind_kernel(x, residual, weight, bias, eps, outs, centred=True)

    def of_chunk(parts: Sequence[Tensor]) -> list[Call]:
        out, source, *addends = parts
        calls: list[Call] = []
        if addends:
            calls.append(partial(torch.add, *addends, out=source))
        return [*calls, partial(_layer_norm, source, [x.shape[-1]], weight, bias, eps, out)]

    return by_chunk(lambda: _chunks(x, residual, outs), of_chunk)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    out.copy_(torch.layer_norm(x, shape, weight, bias, eps))


def _chunks(x: Tensor, residual: Tensor | None, outs: Sequence[Tensor]) -> Any:
    """Chunks of the output, of what is normed, and, where that is a sum, of its addends."""
    if residual is None:
        return chunks(outs[0], x)
    _require_alike(x, residual)
    return chunks(outs[0], outs[1], x, residual)


def _bind_kernel(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    outs: Sequence[Tensor],
    centred: bool,
) -> Call:
    from dllmc.ops.kernels.norm import norm

    if residual is not None:
        _require_alike(x, residual)
    total = None if residual is None else outs[1]
    return partial(norm, x, residual, weight, bias, eps, outs[0], total, centred=centred)


def _with_defaults(args: Sequence[Any], *defaults: Any) -> list[Any]:
    """The operands of a call, trailing ones at their defaults where it leaves them out; the first two are given."""
    return [*args, *defaults[len(args) - 2 :]]


def _require_last(shape: Sequence[int], x: Tensor) -> None:
    if list(shape) != [x.shape[-1]]:
        raise ProgramError(f"a norm over the last dimension [{x.shape[-1]}] is expected, found one over {list(shape)}")


def _require_alike(x: Tensor, residual: Tensor) -> None:
    if (x.shape, x.dtype) != (residual.shape, residual.dtype):
        found = " and ".join(f"{t.dtype} {list(t.shape)}" for t in (x, residual))
        raise ProgramError(f"a norm of a residual sum expects addends of one shape and dtype, found {found}")


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    run_bound(bind_rms_norm, (x, weight, bias, eps), (out,), rms_norm_workspace)
    return out


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    outs = torch.empty_like(x), torch.empty_like(x)
    run_bound(bind_add_rms_norm, (x, residual, weight, bias, eps), outs, add_rms_norm_workspace)
    return outs


def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    outs = torch.empty_like(x), torch.empty_like(x)
    run_bound(bind_add_layer_norm, (x, residual, weight, bias, eps), outs)
    return outs


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Dense, its axes in memory as those of x: what views of the arithmetic that a norm stands for rely on."""
    return torch.empty_like(x)


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


for _device in ("CPU", "CUDA"):
    library.impl("rms_norm", _rms_norm, _device)
    library.impl("add_rms_norm", _add_rms_norm, _device)
    library.impl("add_layer_norm", _add_layer_norm, _device)
torch.library.register_fake("dllmc::rms_norm", _fake, lib=library)
torch.library.register_fake("dllmc::add_rms_norm", _add_fake, lib=library)
torch.library.register_fake("dllmc::add_layer_norm", _add_fake, lib=library)
