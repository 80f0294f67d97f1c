"""Noise as kernels draw it: the words of `dllmc.ops.noise`, and a logarithm that is as good as the CPU's."""

import pytest
import torch
from torch import Tensor

from dllmc.ops import noise

triton = pytest.importorskip("triton")
tl = triton.language

from dllmc.ops.kernels import noise as kernels  # noqa: E402  (needs Triton)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, 1, -1, 2**40 + 17, -(2**63), 2**63 - 1, 2**32, 77]
POSITIONS = [0, 5, 2**31, 2**32 - 1, 7, 8, 9, 10]
STEPS = [0, 1, 2**32 - 1, 2**31 + 5, 3, 0, 0, 1]


@triton.jit
def _draw(seed_ptr, position_ptr, step_ptr, tile_ptr, single_ptr, uniform_ptr, first, columns: tl.constexpr):
    row = tl.arange(0, 8)
    seed, position, step = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)
    column = tl.arange(0, columns)
    place = row[:, None] * columns + column[None, :]
    tl.store(tile_ptr + place, kernels.gumbel_tile(seed, first, position, step, 0, 8, columns))
    token = (first + column)[None, :]
    tl.store(single_ptr + place, kernels.gumbel(seed[:, None], token, position[:, None], step[:, None], 0))
    tl.store(uniform_ptr + place, kernels.uniform(seed[:, None], token, position[:, None], step[:, None], 1))


@triton.jit
def _log(x_ptr, out_ptr, count, at_once: tl.constexpr):
    at = tl.program_id(0) * at_once + tl.arange(0, at_once)
    tl.store(out_ptr + at, kernels.log(tl.load(x_ptr + at, mask=at < count, other=1.0)), mask=at < count)


def on_device(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("first", [0, 4, 1000, 126_000])
def test_words_are_those_of_the_cpu(first: int) -> None:
    """Uniforms bit for bit, Gumbel noise to within rounding, of seeds, positions and steps at their limits."""
    columns = 256
    keys = [on_device(values) for values in (SEEDS, POSITIONS, STEPS)]
    tile, single, uniform = (torch.empty(8, columns, device=DEVICE) for _ in range(3))
    _draw[(1,)](*keys, tile, single, uniform, first, columns=columns)
    seed, position, step = (torch.tensor(values)[:, None] for values in (SEEDS, POSITIONS, STEPS))
    token = torch.arange(first, first + columns)[None, :].expand(8, columns)
    assert torch.equal(uniform.cpu(), noise.uniform(seed, token, position, step, noise.CONFIDENCE_STREAM))
    expected = noise.gumbel(seed, token, position, step)
    assert torch.equal(tile.cpu(), single.cpu())
    torch.testing.assert_close(tile.cpu(), expected, rtol=4e-7, atol=4e-7)


def test_the_logarithm_is_as_good_as_float32() -> None:
    """Every uniform near 0 and 1, sums, and numbers of all sizes: two units in the last place."""
    near = (torch.arange(20_000) + 0.5) * 2.0**-23
    sizes = torch.logspace(-37, 38, 20_000, dtype=torch.float64).float()
    x = torch.cat((near, 1 - near, 1 + near, sizes, torch.tensor([1.0, torch.inf, torch.nan])))
    out = torch.empty(len(x), device=DEVICE)
    _log[(triton.cdiv(len(x), 1024),)](x.to(DEVICE), out, len(x), at_once=1024)
    torch.testing.assert_close(out.cpu().double(), x.double().log(), rtol=2.5e-7, atol=0, equal_nan=True)
