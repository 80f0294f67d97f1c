"""Each operator as it is written in ONNX, against its definition: torch's own, or float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from dllmc.export.onnx import elementwise, packed, philox
from dllmc.export.onnx.head import TILE, all_logits, decode_head
from dllmc.export.onnx.step import EMIT
from dllmc.ops import decode_head as head
from dllmc.ops import glu, norms, rope
from dllmc.ops.elementwise import OPTIONS
from dllmc.ops.registry import OPERATORS
from tests import brute_force
from tests.export.emitted import run
from tests.ops import attention_cases, head_cases
from tests.ops import test_keep as keep_cases
from tests.ops.attention_cases import Segment
from tests.ops.test_keep import NOTHING, Refresh
from tests.ops.test_signatures import calls, function_of

HALVES = (torch.float32, torch.float16)


def test_every_operator_is_written() -> None:
    assert elementwise.EMIT.keys() | EMIT.keys() == OPERATORS.keys()
    assert not elementwise.EMIT.keys() & EMIT.keys()


def positive(operand: Any) -> Any:
    """Numbers in (0.2, 2), in which every function of the list is defined; no two alike."""
    if isinstance(operand, torch.Tensor) and operand.is_floating_point():
        return torch.rand(operand.shape, generator=torch.Generator().manual_seed(operand.numel())) * 1.8 + 0.2
    if isinstance(operand, list):
        return [positive(item) for item in operand]
    return operand


@settings(deadline=None, derandomize=True, max_examples=400)
@given(call=calls())
def test_torchs_operators(call: tuple[str, list[Any]]) -> None:
    """Whatever torch takes, in float32: the same to a few roundings."""
    name, operands = call
    operands = [positive(operand) for operand in operands]
    names = OPTIONS.get(name, ())
    count = len(operands) - len(names)
    options = dict(zip(names, operands[count:], strict=True))
    assume(name != "aten.linear.default" or operands[1].dim() == 2)
    try:
        expected = function_of(name)(*operands[:count], **options)
    except (RuntimeError, IndexError):
        assume(False)
    dtype = str(expected.dtype).removeprefix("torch.")
    weights = (1, 2) if name == "aten.linear.default" else ()
    [found] = run(lambda g, args: [elementwise.EMIT[name](g, args, dtype)], operands, weights)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "segments",
    [
        [Segment(9)],
        [Segment(4), Segment(17), Segment(1)],
        [Segment(5, 11), Segment(3), Segment(2, 40)],
        [Segment(12, queries=3), Segment(7, 16, queries=0), Segment(6, 1)],
    ],
)
def test_attention(segments: list[Segment], heads: tuple[int, int], window: int | None) -> None:
    """Of every query that a segment has; pages anywhere in the pool, and no numbers where nothing is cached."""
    for dtype in HALVES:
        args = attention_cases.step(segments, heads, 16, dtype, page_tokens=8, window=window)
        if not any(s.kept for s in segments):
            args = args[:8]
        [found] = run(packed.EMIT["dllmc.attention.default"], args)
        rows = np.concatenate([np.arange(*span) for span in args[3].tolist()])
        allowed = attention_cases.tolerance(dtype) * (1 if dtype == torch.float32 else 2)
        wanted = attention_cases.expected(args)[rows]
        np.testing.assert_allclose(found.double().numpy()[rows], wanted, rtol=allowed, atol=allowed)
        assert found.isfinite().all()


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "segments",
    [
        [Refresh(9, 4, 5, 7)],
        [Refresh(0, 2, 20, 20, pool=1), NOTHING, Refresh(20, 8, 0, 3, pool=7)],
        [Refresh(6, 2, 6, 5, shared=True), Refresh(13, 4, 3, 16), NOTHING, Refresh(5, 1, 0, 1, pool=5)],
    ],
)
def test_keep(segments: list[Refresh], heads: tuple[int, int]) -> None:
    """Integers, of which many scores are equal, exact for spans of 1, 2, 4, 8: slots as defined, others untouched."""
    for seed in range(3):
        args = keep_cases.step(segments, heads, 16, torch.float32, page_tokens=8, seed=seed)
        [found] = run(packed.EMIT["dllmc.keep.default"], args)
        assert torch.equal(found, keep_cases.expected(args))


def assert_decided(case: head_cases.Case) -> None:
    """Tokens of all rows whose choice rounding cannot turn, and all confidences and logprobs of theirs."""
    token, confidence, logprob = run(decode_head, case.args, static=(1, 2))
    for row, (wanted, sure, logarithm, margin) in enumerate(case.brute_force()):
        if margin > head_cases.DECISIVE:
            assert int(token[row]) == wanted, row
            assert float(confidence[row]) == pytest.approx(sure, rel=2e-4, abs=2e-5)
            assert float(logprob[row]) == pytest.approx(logarithm, rel=2e-4, abs=2e-4)


@pytest.mark.parametrize("vocab", [50, 1000, TILE, TILE + 1, 2 * TILE + 6])
def test_the_head(vocab: int) -> None:
    """Every rule, temperature, filter and suppression beside each other, over one tile and several."""
    assert_decided(head_cases.random(36, vocab, 24, seed=vocab))


@pytest.mark.parametrize("segments", [head_cases.GREEDY, head_cases.SAMPLED[:2], head_cases.SAMPLED[2:6]])
def test_the_head_of_requests_alike(segments: list[head_cases.Segment]) -> None:
    """Without the branches that none of them needs."""
    assert_decided(head_cases.random(15, 300, 16, segments, seed=4))


def test_the_head_with_ties() -> None:
    """Exact logits, of which most are equal: the lowest token of the best."""
    case = head_cases.exact(12, TILE + 40, 8, head_cases.GREEDY, bias=True, scale=0.5)
    token, confidence, logprob = run(decode_head, case.args, static=(1, 2))
    wanted = head.reference(*case.to(torch.float64).args)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(confidence.double(), wanted[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprob.double(), wanted[2], rtol=1e-5, atol=1e-5)


def test_the_head_of_half_precision_has_float32_logits() -> None:
    case = head_cases.random(12, 600, 16, head_cases.GREEDY).to(torch.float16)
    token, confidence, _ = run(decode_head, case.args, static=(1, 2))
    wanted = head.reference(*case.to(torch.float64).args)
    assert torch.equal(token, wanted[0])
    torch.testing.assert_close(confidence.double(), wanted[1], rtol=1e-4, atol=1e-5)


def test_logits() -> None:
    case = head_cases.random(7, TILE + 9, 16)
    [found] = run(lambda g, args: [all_logits(g, args)], case.args, static=(1, 2))
    exact = case.to(torch.float64)
    assert exact.bias is not None
    wanted = exact.scale * (exact.hidden @ exact.weight.T + exact.bias)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_noise_is_that_of_the_definition() -> None:
    """Bit by bit the same random words: of seeds of 64 bits, negative ones too, and tokens of a large vocabulary."""
    seed = torch.tensor([0, 5, -8, 2**40 + 1, 2**63 - 1])[:, None]
    position, step = torch.arange(5)[:, None] * 1000, torch.arange(5)[:, None]
    first, count = torch.tensor([126464]), torch.tensor([9])
    [noise] = run(
        lambda g, a: [philox.gumbel_range(g, *(x.name for x in (a[0], a[1], a[2], a[3], a[4])))],
        [seed, first, count, position, step],
    )
    drawn = [
        [brute_force.gumbel(int(s) % 2**64, 126464 + v, int(p), int(n)) for v in range(9)]
        for s, p, n in zip(seed, position, step, strict=True)
    ]
    np.testing.assert_allclose(noise.numpy(), np.array(drawn), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_row_wise_operators(dtype: torch.dtype) -> None:
    """Norms, rope and gates, within a rounding of the result."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, residual, weight, bias = random(5, 3, 16), random(5, 3, 16), random(16), random(16)
    angles = torch.rand(9, 8, generator=generator) * 6
    positions = torch.tensor([8, 0, 3, 3, 1])
    doubled = torch.cat((angles, angles), dim=1)
    total = (x + residual).to(dtype)
    allowed = 2 * torch.finfo(dtype).eps
    double = [t.double() for t in (x, weight, bias, total, residual)]
    for name, args, wanted in (
        ("rms_norm", [x, weight, None, 1e-6], [norms.rms_norm_reference(double[0], double[1], None, 1e-6)]),
        ("rms_norm", [x, None, bias, 1e-6], [norms.rms_norm_reference(double[0], None, double[2], 1e-6)]),
        (
            "add_rms_norm",
            [x, residual, weight, bias, 1e-6],
            [norms.rms_norm_reference(double[3], double[1], double[2], 1e-6), double[3]],
        ),
        (
            "add_layer_norm",
            [x, residual, weight, None, 1e-5],
            [norms.layer_norm_reference(double[3], double[1], None, 1e-5), double[3]],
        ),
        ("rope", [x, angles.cos()[:5], angles.sin()[:5], None], None),
        ("rope", [x, doubled.cos(), doubled.sin(), positions], None),
        *(("glu", [x, residual, activation], None) for activation in glu.ACTIVATIONS),
    ):
        if wanted is None:
            reference = {"rope": rope.reference, "glu": glu.reference}[name]
            floats = [isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args]
            wanted = [reference(*(arg.double() if f else arg for arg, f in zip(args, floats, strict=True)))]
        found = run(packed.EMIT[f"dllmc.{name}.default"], args)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(one.double().numpy(), other.numpy(), rtol=allowed, atol=4 * allowed)


def test_guidance() -> None:
    hidden = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    guided, guidance = torch.tensor([3, 0]), torch.tensor([1.5, 0.5])
    [found] = run(packed.EMIT["dllmc.guide_rows.default"], [hidden, guided, guidance])
    wanted = hidden[:5].double()
    for twin, (row, factor) in enumerate(zip(guided.tolist(), guidance.double().tolist(), strict=True)):
        unconditional = hidden[5 + twin].double()
        wanted[row] = unconditional + (factor + 1) * (hidden[row].double() - unconditional)
    np.testing.assert_allclose(found.double().numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
    [alone] = run(packed.EMIT["dllmc.guide_rows.default"], [hidden, guided[:0], guidance[:0]])
    assert torch.equal(alone, hidden)
