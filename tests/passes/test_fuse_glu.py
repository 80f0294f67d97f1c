"""fuse-glu: a gate's activation and its product with the other half become one operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import Body, Tiny, lines, rewritten, text

PASSES = "inline-regions,remove-noops,fuse-glu"
DTYPES = (torch.float32, torch.bfloat16)

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation: str, dtype: torch.dtype) -> None:
    """The gate's activation and the product are one call, which keeps the activation's name."""
    step, entry = rewritten(lambda m, x: ACTIVATIONS[activation](x.sin()) * x.exp(), PASSES, dtype)
    assert entry.modified
    assert entry.stats == {"glus": 1}
    assert entry.notes == ()
    assert text(step) == lines(
        f"""
        0 = sin(x)
        1 = exp(x)
        2 = glu(0, 1, {activation})
        3 = linear(2, head.weight)
        4 = select(3, 0, 0)
        return logits=4
        """
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.exp() * F.silu(x.sin()),
        lambda m, x: torch.sigmoid(x.sin()) * x.sin() * x.exp(),
        lambda m, x: x.exp() * (x.sin() * x.sin().sigmoid()),
    ],
    ids=("the other factor first", "x * sigmoid(x)", "both the other way round"),
)
def test_other_spellings(body: Body) -> None:
    """Factors in either order, SiLU as a product; the gate is the same value in both places."""
    step, entry = rewritten(body, f"inline-regions,cse,{PASSES.partition(',')[2]}")
    assert entry.stats == {"glus": 1}
    shown = text(step)
    gate = next(line.split(" = ")[0] for line in shown.splitlines() if "sin(x)" in line)
    up = next(line.split(" = ")[0] for line in shown.splitlines() if "exp(x)" in line)
    assert f"glu({gate}, {up}, silu)" in shown
    assert "mul(" not in shown


def test_halves_of_one_projection() -> None:
    """Gate and up may be columns of one value."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        gate, up, rest = module.qkv(x).chunk(3, dim=-1)
        return F.silu(gate) * up + rest

    for dtype in DTYPES:
        step, _ = rewritten(body, PASSES, dtype)
        assert "= glu(2, 3, silu)" in text(step)


def test_an_activation_that_others_read_stays() -> None:
    """It is computed once more inside the operator; no one else loses it."""
    step, entry = rewritten(lambda m, x: (gate := F.relu(x.sin())) * x + gate, PASSES)
    assert entry.stats == {"glus": 1}
    assert text(step).startswith(
        lines(
            """
            0 = sin(x)
            1 = relu(0)
            2 = glu(0, x, relu)
            3 = add(2, 1)
            """
        )
    )


def test_one_inside_the_other() -> None:
    """The product of one is the gate of the next."""
    step, entry = rewritten(lambda m, x: F.relu(F.silu(x) * x.exp()) * x.sin(), PASSES)
    assert entry.stats == {"glus": 2}
    assert "1 = glu(x, 0, silu)\n2 = sin(x)\n3 = glu(1, 2, relu)" in text(step)


@pytest.mark.parametrize(
    ("body", "note"),
    [
        (
            lambda m, x: F.silu(x) * x.double().mean(-1, keepdim=True).to(x.dtype),
            "gate and up differ: torch.float32 [1, s",
        ),
        (lambda m, x: F.gelu(x) * m.weight, ", 8], torch.float32 [8]"),
        (lambda m, x: (F.relu(x) * x.double()).to(x.dtype), "torch.float64 [1, s"),
    ],
    ids=("a column", "a vector", "another dtype"),
)
def test_what_is_refused_is_noted(body: Body, note: str) -> None:
    """A product that broadcasts or promotes stays, and the note says what differs."""
    _, entry = rewritten(body, PASSES, weight=torch.linspace(0.5, 2, 8))
    assert not entry.modified
    assert entry.stats == {"glus": 0}
    (found,) = entry.notes
    assert found.startswith("mul (aten.mul.Tensor) at ")
    assert " stays: gate and up differ: " in found
    assert note in found


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.silu(x) * 2,
        lambda m, x: F.silu(x) * x.shape[1],
        lambda m, x: F.silu(x) + x,
        lambda m, x: x.sin() * x.sigmoid(),
        lambda m, x: x * x.sigmoid(),
        lambda m, x: torch.tanh(x) * x,
        lambda m, x: F.leaky_relu(x) * x,
        lambda m, x: F.silu(x).exp() * x,
    ],
    ids=(
        "a constant factor",
        "a size",
        "a sum",
        "another's sigmoid",
        "SiLU alone",
        "tanh",
        "leaky ReLU",
        "a call between",
    ),
)
def test_what_is_no_gate_stays(body: Body) -> None:
    """Not modified, and nothing to say."""
    step, entry = rewritten(body, PASSES)
    assert not entry.modified
    assert entry.stats == {"glus": 0}
    assert entry.notes == ()
    assert "glu" not in str(step.graph).replace("gelu", "").replace("leaky_relu", "")
