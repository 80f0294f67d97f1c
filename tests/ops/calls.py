"""A fused operator as its users call it: from a graph, as a program's instruction, and by its Triton kernel's launcher.

Kernels are interpreted on the CPU, and compiled on a GPU; where there is one, none is interpreted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmc.ops.registry import operator

GUARD = 64
UNTOUCHED = 77.0

Launch = Callable[[Sequence[Any], Sequence[Tensor]], object]

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
WAYS = [
    *(pytest.param(way, "cpu", id=f"{way}-cpu") for way in ("graph", "instruction")),
    pytest.param("kernel", "cpu", id="kernel-cpu", marks=interpreted),
    *(pytest.param(way, "cuda", id=f"{way}-cuda", marks=pytest.mark.gpu) for way in ("graph", "instruction", "kernel")),
]


def call(way: str, name: str, args: Sequence[Any], launch: Launch, device: str = "cpu") -> list[Tensor]:
    """The results of `dllmc::<name>` on a device, on the CPU. `launch` calls the kernel: operands, then outputs."""
    placed = [on_device(arg, device) for arg in args]
    if way == "graph":
        results = _list(getattr(torch.ops.dllmc, name)(*placed))
    else:
        results, memory = _outputs(announced(name, placed), device)
        if way == "kernel":
            launch(placed, results)
        else:
            _as_instruction(name, placed, results, placed)
        for block in memory:
            assert torch.cat((block[:GUARD], block[-GUARD:])).eq(UNTOUCHED).all(), "written beyond the output"
    return [result.cpu() for result in results]


def as_instruction(name: str, args: Sequence[Any], planned_for: Sequence[Any]) -> list[Tensor]:
    """The results on the CPU, in a workspace that is planned for other, larger operands."""
    results, _ = _outputs(announced(name, args), "cpu")
    _as_instruction(name, args, results, planned_for)
    return results


def announced(name: str, args: Sequence[Any]) -> list[Tensor]:
    """What the operator's fake says of its results: tensors without memory."""
    meta = [_without_memory(arg) if isinstance(arg, Tensor) else arg for arg in args]
    return _list(getattr(torch.ops.dllmc, name)(*meta))


def _as_instruction(name: str, args: Sequence[Any], outs: Sequence[Tensor], planned_for: Sequence[Any]) -> None:
    """Bound over a workspace full of garbage, and run twice: what is bound once is called often."""
    op = operator(f"dllmc.{name}.default")
    size = op.workspace_bytes(
        [_without_memory(arg) for arg in planned_for if isinstance(arg, Tensor)], outs[0].device.type
    )
    workspace = torch.empty(size, dtype=torch.uint8, device=outs[0].device)
    run = op.bind(args, outs, workspace if size else None)
    for _ in range(2):
        workspace.fill_(255)
        run()


def _outputs(fakes: Sequence[Tensor], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Memory as announced, dense in the middle of blocks; and the blocks."""
    blocks = [torch.full((fake.numel() + 2 * GUARD,), UNTOUCHED, dtype=fake.dtype, device=device) for fake in fakes]
    outs = [block.as_strided(fake.shape, fake.stride(), GUARD) for block, fake in zip(blocks, fakes, strict=True)]
    return outs, blocks


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def on_device(value: Any, device: str) -> Any:
    """The same values on a device, with the same strides."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    whole = torch.empty(_extent(value), dtype=value.dtype, device=device)
    return whole.as_strided(value.shape, value.stride()).copy_(value)


def _extent(x: Tensor) -> int:
    """Elements of memory from a tensor's first to behind its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values [..., width] in other memory.

    columns: of a wider matrix. swapped: the two axes before the last in the other order. apart: every second element of
    the last axis.
    """
    if layout == "dense":
        return x.contiguous()
    if layout == "columns":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 5), UNTOUCHED)[..., 3:-2].copy_(x)
    if layout == "swapped":
        return x if x.dim() < 3 else x.transpose(-3, -2).contiguous().transpose(-3, -2)
    return x.new_full((*x.shape, 2), UNTOUCHED)[..., 1].copy_(x)


LAYOUTS = ("dense", "columns", "swapped", "apart")

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


def assert_rounded_once(
    found: Tensor, expected: Tensor, way: str, device: str, roundings: int = 1, scale: Tensor | float = 1
) -> None:
    """Half precision lies within half a unit of float64 `expected`, wider dtypes within a few units.

    A few float32 (or float64) units of `scale` come on top: of the numbers that a result is the difference of.

    The interpreter cuts float32 to bfloat16 where a GPU rounds: a whole unit. roundings: of a result, where it is more.
    """
    assert found.dtype in DTYPES
    inside = torch.finfo(torch.promote_types(found.dtype, torch.float32)).eps
    units = 16.0
    if found.dtype in HALF:
        cut = found.dtype == torch.bfloat16 and (way, device) == ("kernel", "cpu")
        units = (1 if cut else 0.5) * roundings * 1.01
    rounded = units * torch.finfo(found.dtype).eps * (expected.abs() + torch.finfo(found.dtype).smallest_normal)
    allowed = rounded + 16 * inside * scale
    beyond = ~((found.double() - expected).abs() <= allowed)
    assert not beyond.any(), f"found {found[beyond].tolist()}, expected {expected[beyond].tolist()}"


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
