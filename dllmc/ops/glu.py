"""`dllmc::glu`: a gated linear unit's product, activation(gate) * up.

    gate, up [..., width], possibly columns of one projection -> [..., width]

activation: silu, gelu, gelu_tanh (its tanh form) or relu. In float32 (float64 for float64), rounded once to gate's
dtype; but half precision on the CPU rounds the activation too, as the calls do that this replaces: to widen first costs
a third more.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops.chunks import Call, by_chunk, chunks, wide_dtype
from dllmc.ops.library import library, run_bound

library.define("glu(Tensor gate, Tensor up, str activation) -> Tensor")

# Activation -> the definition, and a torch function with `out=` (not `relu.out`, which copies from a transient).
_ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[..., object]]] = {
    "silu": (F.silu, torch.ops.aten.silu.out),
    "gelu": (F.gelu, torch.ops.aten.gelu.out),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu.out, approximate="tanh")),
    "relu": (F.relu, partial(torch.clamp_min, min=0)),
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definition, in float32, or in float64 for float64."""
    dtype = wide_dtype(gate)
    return (_ACTIVATIONS[activation][0](gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Call:
    """CPU: two torch calls a chunk of rows, in the output alone."""
    gate, up, activation = args
    _require_fitting(gate, up, activation)
    if gate.is_cuda:
        from dllmc.ops.kernels.glu import glu

        return partial(glu, gate, up, activation, outs[0])
    activate = _ACTIVATIONS[activation][1]

    def of_chunk(parts: Sequence[Tensor]) -> list[Call]:
        out, gate_part, up_part = parts
        return [partial(activate, gate_part, out=out), partial(out.mul_, up_part)]

    return by_chunk(lambda: chunks(outs[0], gate, up), of_chunk)


def _require_fitting(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ProgramError(f"glu expects an activation of {', '.join(ACTIVATIONS)}, found {activation!r}")
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        found = " and ".join(f"{t.dtype} {list(t.shape)}" for t in (gate, up))
        raise ProgramError(f"glu expects a gate and a factor of one shape and dtype, found {found}")


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(gate)
    run_bound(bind, (gate, up, activation), (out,))
    return out


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Dense, its axes in memory as those of gate, as torch lays out what this replaces."""
    return torch.empty_like(gate)


library.impl("glu", _glu, "CPU")
library.impl("glu", _glu, "CUDA")
torch.library.register_fake("dllmc::glu", _fake, lib=library)
