"""The fused head against its float64 definition and against brute force, whatever the tiles."""

import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dllmc.errors import ProgramError, RequestError
from dllmc.ops import decode_head
from dllmc.ops.decode_head import Tiling, workspace_bytes, workspace_of
from dllmc.ops.linear import HALF
from tests.ops.head_cases import (
    DECISIVE,
    GREEDY,
    MIXED,
    RANDOM,
    Segment,
    assert_results,
    decisive,
    exact,
    from_logits,
    random,
)


@pytest.mark.parametrize("rows", [1, 3, 17, 130])
@pytest.mark.parametrize(("vocab", "columns"), [(2, 1), (5, 3), (130, 32), (2048, 256), (2048, 700), (5003, 1024)])
def test_equals_the_definition_with_exact_logits(rows, vocab, columns):
    """All rules and ways to choose in one call, ties everywhere: the definition's tokens in any tiles."""
    case = exact(rows, vocab, 7, bias=rows % 2 == 1, scale=0.25 if vocab % 2 else 1.0)
    token, _, _ = case.reference(torch.float32)
    _, confidence, logprob = case.reference(torch.float64)
    assert_results(case.run(), (token, confidence, logprob))
    assert_results(case.run_in_tiles(columns), (token, confidence, logprob))


@pytest.mark.parametrize(("vocab", "columns"), [(5, 2), (130, 64), (1500, 256), (1500, 1100)])
def test_equals_brute_force(vocab, columns):
    """Every mix of temperature, filters, suppression and confidence, against Python loops in float64."""
    case, expected = decisive(random(40, vocab, 24), 36)
    assert_results(case.reference(torch.float64), expected)
    assert_results(case.run(), expected)
    assert_results(case.run_in_tiles(columns), expected)


@pytest.mark.parametrize("columns", [512, 5003])
def test_greedy_equals_float64_at_model_like_sizes(columns):
    """Random float32 inputs: tokens and confidences of the float64 definition."""
    case = random(150, 5003, 64, GREEDY)
    z = case.scale * (case.hidden.double() @ case.weight.T.double() + case.bias.double())
    for row, segment in enumerate(case.row_segment.tolist()):
        z[row, list(case.segments[segment].suppressed)] = -torch.inf
    best, second = z.topk(2).values.T
    case = case.take((best - second > DECISIVE).nonzero()[:130, 0])
    assert len(case.hidden) == 130
    assert_results(case.run_in_tiles(columns), case.reference(torch.float64))


@pytest.mark.parametrize("columns", [4, 9, 50])
def test_suppressed_tokens_have_no_probability(columns):
    """Suppressing the best tokens, a whole tile or all but one leaves the softmax of the rest."""
    logits = torch.arange(50.0).repeat(4, 1) / 4
    suppressed = [(49,), (40, 49, 48), tuple(range(20, 50)), tuple(v for v in range(50) if v != 13)]
    token, confidence, _ = from_logits(logits, [Segment(suppressed=ids) for ids in suppressed]).run_in_tiles(columns)
    assert token.tolist() == [48, 47, 19, 13]
    for row, ids in enumerate(suppressed):
        rest = torch.tensor([logits[row, v] for v in range(50) if v not in ids]).double().softmax(0)
        torch.testing.assert_close(confidence[row].double(), rest.max(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 0.0}, {"top_k": 1, "top_p": 0.5}])
def test_filters_that_leave_one_token_are_greedy(only_best):
    """With ties the kept token is the lowest id, as argmax picks."""
    case = exact(64, 300, 3, [Segment(temperature=1.0, seed=4, **only_best)], bias=False, scale=1.0)
    greedy = replace(case, segments=[Segment()])
    assert_results(case.run_in_tiles(77), greedy.run())


@pytest.mark.parametrize(
    ("filters", "vocab", "kept"),
    [({"top_k": 5}, 3000, 5), ({"top_p": 0.5}, 4, 3), ({"top_p": 0.999}, 4, 4), ({"top_k": 2, "top_p": 0.5}, 4, 2)],
)
def test_equal_logits_are_kept_from_the_lowest_id(filters, vocab, kept):
    """Among equals rank follows the token id; a token is kept while its betters' probability is <= top_p."""
    case = from_logits(torch.zeros(200, 4), [Segment(temperature=1.0, seed=4, **filters)])
    case = replace(case, weight=torch.zeros(vocab, 4))
    for token, _, _ in (case.run(), case.run_in_tiles(max(2, vocab // 3))):
        assert set(token.tolist()) == set(range(kept))


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.9}])
def test_filters_look_within_the_best_1024(filters):
    """Where 1024 tokens do not make up top_p or top_k, those behind them are still left out."""
    case = from_logits(torch.zeros(300, 2), [Segment(temperature=1.0, seed=8, **filters)])
    case = replace(case, weight=torch.zeros(4000, 2))
    token, _, _ = case.run_in_tiles(600)
    assert 900 < token.max() < 1024


@pytest.mark.parametrize(
    ("segment", "kept"),
    [
        (Segment(temperature=0.8, seed=11), 6),
        (Segment(temperature=0.8, seed=11, top_k=3), 3),
        (Segment(temperature=0.8, seed=11, top_p=0.7), 2),
    ],
)
def test_samples_follow_softmax_of_what_is_kept(segment, kept):
    """Frequencies over 20000 positions: chi-square below its 99.9 % point for five degrees."""
    logits = torch.tensor([1.5, 0.0, 1.0, -0.5, 0.25, -1.0])
    draws = 20_000
    token, _, _ = from_logits(logits.expand(draws, 6).contiguous(), [segment]).run()
    best = logits.argsort(descending=True)[:kept]
    expected = torch.zeros(6).index_copy(0, best, draws * (logits[best] / 0.8).softmax(0))
    counts = token.bincount(minlength=6)
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected)[best] ** 2 / expected[best]).sum() < 20.52


def test_random_confidence_has_its_own_stream():
    """It depends on seed, position and step alone: not on logits, temperature or the token drawn."""
    segments = [Segment(rule=RANDOM, seed=3, step=9), Segment(rule=RANDOM, temperature=1.0, seed=3, step=9)]
    case = random(8, 50, 4, segments)
    case = replace(case, row_position=torch.arange(8) // 2)
    confidence = case.run()[1].view(4, 2)
    assert torch.equal(confidence[:, 0], confidence[:, 1])
    assert confidence[:, 0].unique().numel() == 4


@pytest.mark.parametrize("columns", [300, 5003])
def test_a_row_alone_gives_what_it_gives_among_others(columns):
    """The rows that share a call change no token, and confidences by no more than the GEMM's rounding."""
    case, _ = decisive(random(26, 1203, 16), 24)
    together = case.run_in_tiles(columns)
    for row in range(24):
        alone = case.take([row]).run()
        assert alone[0] == together[0][row]
        torch.testing.assert_close(alone[1][0], together[1][row], rtol=1e-6, atol=1e-6)


def test_more_rows_than_a_tile_takes():
    """Above 1024 rows the call is cut into chunks of rows; each row keeps its own parameters."""
    case = exact(1500, 40, 5, bias=True, scale=1.0)
    assert Tiling.of(1500, 40, 5, torch.float32).rows == 750
    assert_results(case.run(), case.reference(torch.float32))


@pytest.fixture
def without_instructions(monkeypatch):
    """As on a CPU that multiplies no matrices of half precision: weights are widened."""
    monkeypatch.setattr(decode_head, "has_native_gemm", lambda dtype: False)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_weights_give_float32_logits(dtype):
    """Logits are not rounded to the dtype of `hidden`: results are those of its values in float64."""
    wide, expected = decisive(random(30, 900, 48).to(dtype).to(torch.float32), 28)
    assert_results(wide.to(dtype).run(), expected)


@pytest.mark.usefixtures("without_instructions")
def test_half_precision_weights_are_cast_in_parts():
    """Weights wider than the workspace are cast a few rows at a time."""
    wide, expected = decisive(random(6, 700, 2048).to(torch.bfloat16).to(torch.float32), 5)
    assert Tiling.of(5, 700, 2048, torch.bfloat16) == Tiling(5, 700, 256, 256 * 2048)
    assert_results(wide.to(torch.bfloat16).run(), expected)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"),
    [(8, 700, 2048), (9, 700, 2048), (32, 30_000, 8), (64, 20_000, 8), (65, 20_000, 8)],
)
def test_few_rows_and_more_give_the_same(dtype, rows, vocab, hidden_size):
    """In several tiles, in parts of them, and whichever way round the product is faster."""
    case = exact(rows, vocab, hidden_size, bias=True, scale=0.5)
    token, _, _ = case.reference(torch.float32)
    _, confidence, logprob = case.reference(torch.float64)
    assert_results(case.to(dtype).run(), (token, confidence, logprob))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden_size"), [(1, 700, 2048), (9, 700, 2048), (40, 400, 8), (600, 1500, 8)]
)
def test_native_products_round_logits_alone(monkeypatch, dtype, rows, vocab, hidden_size):
    """On a CPU that multiplies the dtype: products are rounded to it, bias, scale and statistics are float32."""
    monkeypatch.setattr(decode_head, "has_native_gemm", lambda dtype: True)
    case = exact(rows, vocab, hidden_size, bias=True, scale=0.5)
    products = (case.hidden.double() @ case.weight.double().T).to(dtype).float()
    rounded = replace(case, hidden=products, weight=torch.eye(vocab))
    token, _, _ = rounded.reference(torch.float32)
    _, confidence, logprob = rounded.reference(torch.float64)
    assert Tiling.of(rows, vocab, hidden_size, dtype).native
    assert_results(case.to(dtype).run(), (token, confidence, logprob))


sizes = st.integers(1, 5000)


@given(sizes, sizes, st.integers(1, 300_000), st.integers(1, 9000), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, derandomize=True)
def test_workspace_suffices_for_fewer_rows_and_is_bounded(rows, more, vocab, hidden_size, dtype):
    """What is planned for the most rows fits any call with as many or fewer, on any CPU, and stays at 4 or 8 MiB."""
    planned = workspace_bytes(rows + more, vocab, hidden_size, dtype)
    for native in (False, True):
        with patch.object(decode_head, "has_native_gemm", lambda dtype, native=native: native):
            assert 4 * Tiling.of(rows, vocab, hidden_size, dtype).elements <= planned
    hidden, weight = (torch.empty(n, hidden_size, dtype=dtype, device="meta") for n in (rows + more, vocab))
    assert planned == workspace_of([hidden, weight], "cpu") <= (4 if dtype == torch.float32 else 8) << 20


def test_too_small_a_workspace_is_an_error():
    """The message says how much is needed and how much there is."""
    case = exact(3, 130, 7, bias=False, scale=1.0)
    outs = {name: torch.empty(3) for name in ("token", "confidence", "logprob")}
    with pytest.raises(ProgramError, match="3 rows by 130 tokens need a workspace of 3120 bytes, found 3116"):
        decode_head.decode_head_out(*case.args, **outs, workspace=torch.empty(3116, dtype=torch.uint8))


def test_unknown_confidence_rule_is_an_error():
    """The message names the value and the choices."""
    *args, _, seed, step, suppressed = exact(3, 130, 7, [Segment()], bias=False, scale=1.0).args
    with pytest.raises(RequestError, match=r"confidence_rule holds \[4\].*3 \(random\)"):
        torch.ops.dllmc.decode_head(*args, torch.tensor([4]), seed, step, suppressed)


def test_no_rows():
    """A step without masked rows gives three empty results."""
    token, confidence, logprob = exact(4, 20, 3, bias=True, scale=1.0).take([]).run()
    assert token.shape == confidence.shape == logprob.shape == (0,)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor, and the bytes of the largest storage, that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = self.new_bytes = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.untyped_storage().data_ptr() not in self.known:
                    self.new_bytes = max(self.new_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("segments", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_no_tensor_of_rows_by_vocab_exists(segments):
    """At 64 rows by 200000 tokens nothing but the weight exceeds the workspace, or twice that for int64 words."""
    rows, vocab, hidden_size = 64, 200_000, 16
    case = random(rows, vocab, hidden_size, segments)
    outs = {name: torch.empty(rows) for name in ("confidence", "logprob")}
    outs["token"] = torch.empty(rows, dtype=torch.int64)
    workspace = torch.empty(workspace_bytes(rows, vocab, hidden_size, torch.float32), dtype=torch.uint8)
    with LargestTensor() as largest:
        largest.known = {t.untyped_storage().data_ptr() for t in (case.weight, case.hidden, case.bias, workspace)}
        decode_head.decode_head_out(*case.args, **outs, workspace=workspace)
    assert largest.elements <= max(vocab * hidden_size, workspace.numel()) < rows * vocab
    assert 0 < largest.new_bytes <= 2 * workspace.numel()


def test_fake_tensors_give_three_values_a_row():
    """Shape propagation needs no kernel: on fake and meta tensors, and with a symbolic number of rows."""
    case = exact(6, 50, 4, bias=True, scale=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = case.run()
    meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in case.args]
    outs = [fake, torch.ops.dllmc.decode_head(*meta)]
    for token, confidence, logprob in outs:
        assert token.shape == confidence.shape == logprob.shape == (6,)
        assert (token.dtype, confidence.dtype, logprob.dtype) == (torch.int64, torch.float32, torch.float32)


class Head(torch.nn.Module):
    def forward(self, *args):
        return torch.ops.dllmc.decode_head(*args)


def test_exports_with_a_symbolic_number_of_rows():
    """The exported graph keeps the one call, and runs with another number of rows."""
    case = exact(6, 50, 4, bias=True, scale=1.0)
    rows = torch.export.Dim("rows")
    dynamic = ({0: rows}, None, None, None, {0: rows}, {0: rows}, {0: rows}, *[None] * 7)
    program = torch.export.export(Head(), case.args, dynamic_shapes=(dynamic,), strict=False)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.dllmc.decode_head.default) == 1
    other = case.take([4, 1, 3])
    assert_results(program.module()(*other.args), other.reference(torch.float32))


def test_neither_inductor_nor_dynamo_is_loaded():
    """Importing and calling the operator leaves torch's compilers out of the process."""
    script = """
import sys, torch
from dllmc.ops import decode_head
one = torch.zeros(1, dtype=torch.int64)
rows, tables = (one, one, one), (torch.ones(1), one, torch.ones(1), one, one, one, one[None])
torch.ops.dllmc.decode_head(torch.ones(1, 4), torch.eye(4), None, 1.0, *rows, *tables)
loaded = sorted({"torch._inductor", "torch._dynamo"} & sys.modules.keys())
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)
