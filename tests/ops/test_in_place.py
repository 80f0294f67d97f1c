"""Where the registry says that a result may take the place of an operand, it is the same as out of place."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmc.ops.registry import OPERATORS
from tests.ops.calls import HALF, LAYOUTS, laid_out
from tests.ops.test_elementwise import CALLS

TOKENS, WIDTH, HEADS, HEAD_DIM = 2000, 40, 5, 8  # more tokens than one chunk of any operator
DTYPES = (torch.float32, *HALF)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, PARAMETER = random(TOKENS, WIDTH), random(WIDTH, seed=1)
OF_HEADS, ANGLES = random(TOKENS, HEADS, HEAD_DIM), random(64, HEAD_DIM, seed=2)
POSITIONS = torch.arange(TOKENS) % 64

FUSED: dict[str, list[list[Any]]] = {
    "aten.layer_norm.default": [[X, [WIDTH]], [X, [WIDTH], PARAMETER, PARAMETER, 1e-3]],
    "aten.rms_norm.default": [[X, [WIDTH]], [X, [WIDTH], PARAMETER, 1e-3]],
    "dllmc.glu.default": [[X, X.flip(0), name] for name in ("silu", "gelu", "gelu_tanh", "relu")],
    "dllmc.rms_norm.default": [[X, None, None, 1e-3], [X, PARAMETER, PARAMETER, 1e-3], [X, None, PARAMETER, 1e-3]],
    "dllmc.rope.default": [
        [OF_HEADS, ANGLES, ANGLES.flip(0), POSITIONS],
        [OF_HEADS, ANGLES[:, :4], ANGLES[:, 4:], POSITIONS],
        [OF_HEADS, ANGLES[POSITIONS], ANGLES.flip(0)[POSITIONS], None],
    ],
}


def functional(name: str) -> Any:
    """The operator that the name stands for."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def fits(name: str, position: int, args: Sequence[Any]) -> bool:
    """Whether an operand of a call is like its result."""
    if position >= len(args) or not isinstance(operand := args[position], Tensor):
        return False
    result = functional(name)(*args)
    return (result.shape, result.dtype) == (operand.shape, operand.dtype)


def cases() -> list[Any]:
    """Every operator that allows it, each operand, and calls of it."""
    return [
        pytest.param(name, position, (FUSED | CALLS)[name], id=f"{name}-{position}")
        for name, op in sorted(OPERATORS.items())
        for position in op.in_place
        if any(fits(name, position, args) for args in (FUSED | CALLS)[name])
    ]


def run(name: str, args: Sequence[Any], out: Tensor) -> Tensor:
    op = OPERATORS[name]
    size = op.workspace_bytes([x for x in args if isinstance(x, Tensor)], "cpu")
    op.bind(args, [out], torch.empty(size, dtype=torch.uint8) if size else None)()
    return out


def test_every_operator_that_allows_it_is_tried() -> None:
    assert {name for name, op in OPERATORS.items() if op.in_place} <= {*FUSED, *CALLS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "position", "calls"), cases())
def test_in_place_is_out_of_place(name: str, position: int, calls: list[list[Any]], dtype: torch.dtype) -> None:
    """To the last bit, in every layout of the operand; nothing beside it is written."""
    tried = 0
    for args in calls:
        given = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        if not fits(name, position, given):
            continue
        for layout in LAYOUTS:
            place = laid_out(given[position].clone(), layout)
            placed = [*given[:position], place, *given[position + 1 :]]
            expected = run(name, placed, torch.empty_like(place))  # dense, its axes in memory as those of the operand
            beside = _beside(place)
            torch.testing.assert_close(run(name, placed, place), expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(_beside(place), beside)
            tried += 1
    assert tried


def _beside(x: Tensor) -> Tensor:
    """The elements of a tensor's memory that are not its own."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    own = torch.zeros(len(memory), dtype=torch.bool)
    own.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return memory[~own]
