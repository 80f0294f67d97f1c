"""A gated linear unit's product of rows: activation(gate) * up.

    gate, up, out: [outer, inner, width], any strides

Each program takes block columns of one row:
    1. load gate and up
    2. apply the activation to gate, and multiply
    3. round once, store
in float32, or float64 for float64. Offsets are 64 bits: a step's activations may pass 2^31 elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from dllmc.ops.chunks import planes
from dllmc.ops.kernels.configs import Launch, configured

MOST_COLUMNS = 1024


def glu(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """Write activation(gate) * up to `out`, each [..., width]; activation as in `dllmc.ops.glu`."""
    width = gate.shape[-1]
    launch = configured(Launch(MOST_COLUMNS), "glu", gate, rows=gate.numel() // max(width, 1), width=width)
    block = min(launch.tile, triton.next_power_of_2(width))
    for gate_plane, up_plane, out_plane in planes(gate, up, out):
        outer, inner, _ = gate_plane.shape
        _glu[(outer * inner, triton.cdiv(width, block))](
            gate_plane,
            up_plane,
            out_plane,
            inner,
            width,
            *gate_plane.stride(),
            *up_plane.stride(),
            *out_plane.stride(),
            activation=activation,
            block=block,
            num_warps=launch.warps,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _glu(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    inner: tl.tensor,
    width: tl.tensor,
    gate_outer: tl.tensor,
    gate_inner: tl.tensor,
    gate_column: tl.tensor,
    up_outer: tl.tensor,
    up_inner: tl.tensor,
    up_column: tl.tensor,
    out_outer: tl.tensor,
    out_inner: tl.tensor,
    out_column: tl.tensor,
    activation: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i, j = row // inner, row % inner
    column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_ptr + i * gate_outer + j * gate_inner + column * gate_column, mask=inside, other=0.0)
    up = tl.load(up_ptr + i * up_outer + j * up_inner + column * up_column, mask=inside, other=0.0)
    dtype = gate.dtype
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    gate, up = gate.to(wide), up.to(wide)
    if activation == "silu":
        active = gate * tl.sigmoid(gate)
    elif activation == "gelu":
        active = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif activation == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z), and z = sqrt(2 / pi) (x + 0.044715 x^3)
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = tl.maximum(gate, 0.0)
    tl.store(out_ptr + i * out_outer + j * out_inner + column * out_column, (active * up).to(dtype), mask=inside)
