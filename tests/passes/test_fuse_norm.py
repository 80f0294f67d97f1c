"""fuse-norm: norms become one operator each, with the residual add before them inside."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import TOLERANCES, Body, Tiny, captured, execute, lines, rewritten, run, step_inputs, text

PASSES = "inline-regions,remove-noops,fuse-norm"
DTYPES = (torch.float32, torch.bfloat16)
PARAMETERS = {"weight": torch.linspace(0.5, 2, 8), "bias": torch.linspace(-1, 1, 8), "wide": torch.ones(2, 8)}
NONE = {"rms_norms": 0, "torch_rms_norms": 0, "layer_norms": 0}


def scale(x: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(module: Tiny, x: Tensor) -> Tensor:
    """Llama's and Qwen2's: in float32, rounded before the weight."""
    wide = x.to(torch.float32)
    return module.weight * (wide * scale(wide)).to(x.dtype)


def llada(module: Tiny, x: Tensor) -> Tensor:
    """LLaDA's: the same inside a region that switches autocast off."""
    with torch.autocast(enabled=False, device_type=x.device.type):
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        x = x.to(dtype)
    return module.weight * x


def converted_weight(module: Tiny, x: Tensor) -> Tensor:
    """T5's later spelling: the weight too in float32, one rounding at the end."""
    wide = x.float()
    return (wide * scale(wide) * module.weight.float()).to(x.dtype)


def quotient(module: Tiny, x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x * x, -1, True) + 1e-6) * module.weight


def reciprocal(module: Tiny, x: Tensor) -> Tensor:
    return module.weight * (x * torch.reciprocal(torch.sqrt(1e-6 + x.square().mean(dim=2, keepdim=True))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [llama, llada, quotient, reciprocal], ids=lambda f: f.__name__)
def test_case_1_is_one_operator(norm: Body, dtype: torch.dtype) -> None:
    """Every spelling: square as pow, product or square; rsqrt, quotient or reciprocal; the weight on either side."""
    step, entry = rewritten(norm, PASSES, dtype, **PARAMETERS)
    assert entry.modified
    assert entry.stats == NONE | {"rms_norms": 1}
    assert entry.notes == ()
    assert text(step) == lines(
        """
        0 = rms_norm(x, self.weight, None, 1e-06)
        1 = linear(0, head.weight)
        2 = select(1, 0, 0)
        return logits=2
        """
    )


@pytest.mark.parametrize(
    ("body", "call"),
    [
        (lambda m, x: x * scale(x), "rms_norm(x, None, None, 1e-06)"),
        (lambda m, x: x * scale(x) * m.weight + m.bias, "rms_norm(x, self.weight, self.bias, 1e-06)"),
        (lambda m, x: m.bias + m.weight * (scale(x) * x), "rms_norm(x, self.weight, self.bias, 1e-06)"),
        (lambda m, x: x * scale(x, 1) * m.weight, "rms_norm(x, self.weight, None, 1)"),
        (lambda m, x: F.rms_norm(x, (8,), m.weight, 1e-3), "rms_norm(x, self.weight, None, 0.001)"),
        (lambda m, x: F.rms_norm(x, (8,), eps=1e-3), "rms_norm(x, None, None, 0.001)"),
    ],
    ids=("no weight", "a bias", "a bias first", "a whole eps", "case 2: torch's", "case 2: without weight"),
)
def test_weight_and_bias_may_be_missing(body: Body, call: str) -> None:
    """Cases 1 and 2: the operator takes None for what the norm has not."""
    step, entry = rewritten(body, PASSES, **PARAMETERS)
    assert entry.modified
    assert text(step).startswith(f"0 = {call}\n1 = linear(0, ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_eps(dtype: torch.dtype) -> None:
    """Case 2: without eps it is that of the dtype in which torch computes, which small values tell."""
    module = Tiny(lambda m, x: F.rms_norm(x * 2**-13, (8,))).to(dtype)
    step, inputs = captured(module), step_inputs(9)
    expected = module(inputs["token_ids"][None])[0]
    run(step, PASSES)
    assert "1 = rms_norm(0, None, None, 1.19209e-07)" in text(step)
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=TOLERANCES[dtype])


def test_a_converted_weight_is_no_weight() -> None:
    """The norm fuses without it, in the dtype of the converted values."""
    step, entry = rewritten(converted_weight, PASSES, torch.bfloat16, **PARAMETERS)
    assert entry.modified
    assert text(step).startswith(
        lines(
            """
            0 = to(x, float32)
            1 = rms_norm(0, None, None, 1e-06)
            2 = to(self.weight, float32)
            3 = mul(1, 2)
            4 = to(3, bfloat16)
            """
        )
    )


def test_a_conversion_at_the_end() -> None:
    """Case 1: all of it in float64, the result rounded once to what x was."""
    step, _ = rewritten(lambda m, x: (x.double() * scale(x.double())).to(x.dtype), PASSES)
    assert text(step).startswith("0 = rms_norm(x, None, None, 1e-06)\n1 = linear(0, ")


def residual(module: Tiny, x: Tensor) -> Tensor:
    """What a transformer makes of it: sum, norm, something, and the sum again."""
    total = x + x.sin()
    return total + llama(module, total).cos()


def test_case_3_the_sum_is_returned_to_its_readers() -> None:
    """The operator adds; what else reads the sum reads the operator's second result."""
    for dtype in DTYPES:
        step, entry = rewritten(residual, PASSES, dtype, **PARAMETERS)
        assert entry.stats == NONE | {"rms_norms": 1}
        assert text(step) == lines(
            """
            0 = sin(x)
            1 = add_rms_norm(x, 0, self.weight, None, 1e-06)
            2 = getitem(1, 0)
            3 = getitem(1, 1)
            4 = cos(2)
            5 = add(3, 4)
            6 = linear(5, head.weight)
            7 = select(6, 0, 0)
            return logits=7
            """
        )


def test_case_3_the_sum_is_not_returned_to_no_one() -> None:
    """A sum that the norm alone reads is a result without a reader."""
    step, _ = rewritten(lambda m, x: F.rms_norm(x.exp() + x, (8,), m.weight, 1e-6), PASSES, **PARAMETERS)
    assert text(step) == lines(
        """
        0 = exp(x)
        1 = add_rms_norm(0, x, self.weight, None, 1e-06)
        2 = getitem(1, 0)
        3 = linear(2, head.weight)
        4 = select(3, 0, 0)
        return logits=4
        """
    )


def test_case_3_the_sum_may_be_read_before_the_norm() -> None:
    """The operator stands where the sum stood, so that every reader comes behind it."""

    def early(module: Tiny, x: Tensor) -> Tensor:
        total = x + x.sin()
        read = total.cos()
        return llama(module, total) + read

    step, _ = rewritten(early, PASSES, **PARAMETERS)
    assert text(step) == lines(
        """
        0 = sin(x)
        1 = add_rms_norm(x, 0, self.weight, None, 1e-06)
        2 = getitem(1, 0)
        3 = getitem(1, 1)
        4 = cos(3)
        5 = add(2, 4)
        6 = linear(5, head.weight)
        7 = select(6, 0, 0)
        return logits=7
        """
    )


def test_case_3_two_norms_of_one_sum() -> None:
    """The sum is made once, by the norm that comes last; the other reads it."""

    def parallel(module: Tiny, x: Tensor) -> Tensor:
        total = x + x.sin()
        return llama(module, total) + F.rms_norm(total, (8,), module.bias, 1e-3)

    step, entry = rewritten(parallel, PASSES, **PARAMETERS)
    assert entry.stats == {"rms_norms": 1, "torch_rms_norms": 1, "layer_norms": 0}
    assert text(step) == lines(
        """
        0 = sin(x)
        1 = add_rms_norm(x, 0, self.bias, None, 0.001)
        2 = getitem(1, 0)
        3 = getitem(1, 1)
        4 = rms_norm(3, self.weight, None, 1e-06)
        5 = add(4, 2)
        6 = linear(5, head.weight)
        7 = select(6, 0, 0)
        return logits=7
        """
    )


def test_case_3_norms_one_behind_the_other() -> None:
    """BERT's order: the norm is of the sum, and the next sum is of the norm."""

    def post_norm(module: Tiny, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.layer_norm(x + x.sin(), (8,), module.weight, module.bias, 1e-12)
        return x

    for dtype in DTYPES:
        step, entry = rewritten(post_norm, PASSES, dtype, **PARAMETERS)
        assert entry.modified
        assert entry.stats == NONE | {"layer_norms": 2}
        assert text(step) == lines(
            """
            0 = sin(x)
            1 = add_layer_norm(x, 0, self.weight, self.bias, 1e-12)
            2 = getitem(1, 0)
            3 = sin(2)
            4 = add_layer_norm(2, 3, self.weight, self.bias, 1e-12)
            5 = getitem(4, 0)
            6 = linear(5, head.weight)
            7 = select(6, 0, 0)
            return logits=7
            """
        )


def test_case_3_layer_norm_without_weight_and_with_readers_of_the_sum() -> None:
    """The layer norm of torch too gives its sum to others."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        total = x + x.sin()
        return total * F.layer_norm(total, (8,))

    step, _ = rewritten(body, PASSES)
    assert lines(
        """
        1 = add_layer_norm(x, 0, None, None, 1e-05)
        2 = getitem(1, 0)
        3 = getitem(1, 1)
        4 = mul(3, 2)
        """
    ) in text(step)


@pytest.mark.parametrize(
    "summed",
    [
        lambda m, x: x + m.bias,
        lambda m, x: x + 1,
        lambda m, x: torch.add(x, x.sin(), alpha=2),
        lambda m, x: x + x.sin().double().mean(-1, keepdim=True).float(),
    ],
    ids=("a vector", "a number", "a multiple", "a column"),
)
def test_a_sum_that_is_no_residual_stays_outside(summed: Body) -> None:
    """Case 3 wants two values of the sum's own shape: any other sum is made before the norm."""
    step, entry = rewritten(lambda m, x: llama(m, summed(m, x)), PASSES, **PARAMETERS)
    assert entry.stats == NONE | {"rms_norms": 1}
    assert "= add(" in text(step)
    assert "= rms_norm(" in text(step)


@pytest.mark.parametrize(
    ("body", "note"),
    [
        (lambda m, x: (x.double() * scale(x.double())).cos().to(x.dtype), "it makes torch.float64 of torch.float32"),
        (
            lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
            "its statistics are over the axes [1, 2], not the last",
        ),
        (lambda m, x: F.layer_norm(x + m.bias, (8,)), "its two summands have different shapes or dtypes"),
    ],
    ids=("another dtype", "other axes", "a layer norm of a sum with a vector"),
)
def test_what_is_refused_is_noted(body: Body, note: str) -> None:
    """What has the form of a norm but is not the operator's stays, with its line and the reason."""
    step, entry = rewritten(body, PASSES, **PARAMETERS)
    assert not entry.modified
    assert entry.stats == NONE
    (found,) = entry.notes
    assert found.endswith(f"stays: {note}")
    assert " at " in found
    assert "dllmc" not in str(step.graph)


def test_a_weight_of_another_width_stays_outside() -> None:
    """The norm fuses without it, and the note says why."""
    step, entry = rewritten(lambda m, x: x * scale(x) * m.one, PASSES, one=torch.tensor([3.0]))
    assert text(step).startswith("0 = rms_norm(x, None, None, 1e-06)\n1 = mul(0, self.one)\n")
    (note,) = entry.notes
    assert note.startswith("mul_1 (aten.mul.Tensor) at ")
    assert note.endswith("stays: its weight has the shape [1], not [8]")


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6),
        lambda m, x: x.sin() * scale(x),
        lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda m, x: x * scale(x).to(torch.int64).float(),
        lambda m, x: F.layer_norm(x, (8,), m.weight),
        lambda m, x: F.rms_norm(x.view(1, -1, 2, 4), (2, 4), m.wide[:, :4].contiguous()).flatten(2),
    ],
    ids=("a cube", "two values", "a sum", "no reciprocal", "truncated", "a layer norm alone", "two axes"),
)
def test_what_is_no_norm_stays(body: Body) -> None:
    """Not modified, and nothing to say."""
    step, entry = rewritten(body, PASSES, **PARAMETERS)
    assert not entry.modified
    assert entry.stats == NONE
    assert entry.notes == ()
    assert "dllmc" not in str(step.graph)
