"""The fused head's Triton kernels against its definition in float64 and brute force: interpreted, or on a GPU."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllmc.errors import ProgramError
from dllmc.ops import decode_head, head_tiles
from dllmc.ops.chunks import bytes_of
from dllmc.ops.decode_head import cuda_workspace_bytes
from dllmc.ops.head_tiles import FUSED_PART, FUSED_ROWS, PART, CudaTiling
from tests.ops.calls import LAYOUTS, WAYS, call, laid_out, on_device
from tests.ops.head_cases import (
    GREEDY,
    MIXED,
    RANDOM,
    Case,
    Results,
    Segment,
    assert_results,
    decisive,
    exact,
    from_logits,
    random,
)
from tests.ops.launches import counted, replayed

WAYS = [way for way in WAYS if "kernel" in way.id or way.id == "graph-cuda"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY = FUSED_ROWS + 1
VIEWS = (
    "slice.Tensor",
    "view.dtype",
    "view.default",
    "t.default",
    "transpose.int",
    "permute.default",
    "detach.default",
)


def launch(args: Sequence[Any], outs: Sequence[Tensor]) -> None:
    """The kernels in exactly the workspace that is planned, full of garbage, with a guard behind it."""
    from dllmc.ops.kernels import decode_head as kernels

    hidden, weight = args[:2]
    size = cuda_workspace_bytes(len(hidden), *weight.shape, hidden.dtype)
    workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device=hidden.device)
    multiply = kernels.multiply if hidden.is_cuda else widened
    with patch.object(kernels, "multiply", multiply):
        kernels.decode_head(*args[:7], args[7:], *outs, workspace[:size])
    assert workspace[size:].eq(255).all()


def widened(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """What cuBLAS does with half precision, and a CPU does not: a product that is not rounded."""
    torch.mm(hidden.float(), weight.float().T, out=logits)


def run(case: Case, way: str, device: str) -> Results:
    token, confidence, logprob = call(way, "decode_head", case.args, launch, device)
    return token, confidence, logprob


def tiles_of(logits: int, rows: int = head_tiles.CHUNK_ROWS) -> ExitStack:
    """As if a tile held so many logits, and a chunk so many rows: more of both than a test could afford."""
    stack = ExitStack()
    stack.enter_context(patch.object(head_tiles, "TILE_LOGITS", logits))
    stack.enter_context(patch.object(head_tiles, "CHUNK_ROWS", rows))
    return stack


def path(fused: bool) -> ExitStack:
    """As if any number of rows were few, or many."""
    stack = ExitStack()
    stack.enter_context(patch.object(head_tiles, "FUSED_ROWS", FUSED_ROWS if fused else 0))
    return stack


def check_exact(case: Case, way: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Of logits that are exact: the definition's tokens, and its confidences and logprobs in float64."""
    token, _, _ = case.reference(torch.float32)
    _, confidence, logprob = case.reference(torch.float64)
    assert_results(run(case.to(dtype), way, device), (token, confidence, logprob))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (13, 300), (MANY, 131)])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_equals_the_definition_with_exact_logits(way, device, rows, vocab, dtype):
    """All rules and ways to choose in one call, ties everywhere: the definition's tokens, by either path."""
    check_exact(exact(rows, vocab, 7, bias=rows % 2 == 1, scale=0.25 if vocab % 2 else 1.0), way, device, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [2, 5, 128, 1003, 2048, 5003])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, FUSED_ROWS, MANY, 130])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_the_grid(way, device, rows, vocab, dtype):
    """Rows, tokens and hidden sizes that no tile divides, and those that fill one; with bias and scale, or without."""
    hidden_size = (7, 64, 130)[(rows + vocab) % 3]
    case = exact(rows, vocab, hidden_size, bias=rows % 2 == 1, scale=0.25 if vocab % 2 else 1.0)
    check_exact(case, way, device, dtype)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_equals_brute_force(way, device, fused):
    """Every mix of temperature, filters, suppression and confidence, against Python loops in float64."""
    case, expected = decisive(random(20, 150, 24), 14)
    with path(fused):
        assert_results(run(case, way, device), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [24, 70])
@pytest.mark.parametrize("vocab", [130, 1500, 3001])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_equals_brute_force_in_several_parts(way, device, vocab, rows):
    """The same over vocabularies of several parts."""
    case, expected = decisive(random(rows + 10, vocab, 24, seed=vocab), rows)
    assert_results(run(case, way, device), expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_candidates_and_statistics_go_from_tile_to_tile(way, device, fused):
    """Tiles of one part, and a last one that is short; more candidates than a tile has, and fewer."""
    part = FUSED_PART if fused else PART
    segments = [Segment(temperature=1.0, top_p=0.9, seed=2), Segment(temperature=1.0, top_k=9, seed=3), Segment()]
    case = exact(6, 2 * part + part // 3, 5, segments, bias=False, scale=0.5)
    with path(fused), tiles_of(6 * part * 2 - 1):
        assert CudaTiling.of(6, len(case.weight)).columns == part
        check_exact(case, way, device)
    if fused:
        with path(fused), tiles_of(len(MIXED) * part):
            check_exact(exact(len(MIXED), 2 * part + 9, 5, bias=True, scale=1.0), way, device)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_more_rows_than_a_chunk_takes(way, device):
    """Each chunk of rows keeps its own parameters, and the last one may be shorter."""
    with path(fused=False), tiles_of(10 * PART, rows=10):
        assert CudaTiling.of(15, 300).rows == 8
        check_exact(exact(15, 300, 5, bias=True, scale=1.0), way, device)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_suppressed_tokens_have_no_probability(way, device, fused):
    """Suppressing the best tokens, a whole part or all but one leaves the softmax of the rest."""
    vocab = 2 * FUSED_PART + 50
    logits = torch.arange(float(vocab)).repeat(4, 1) / 4
    suppressed = [(305,), (304, 305, 303), tuple(range(128, 306)), tuple(v for v in range(vocab) if v != 13)]
    case = from_logits(logits, [Segment(suppressed=ids) for ids in suppressed])
    with path(fused):
        token, confidence, _ = run(replace(case, row_target=torch.full((4,), -1)), way, device)
    assert token.tolist() == [304, 302, 127, 13]
    for row, ids in enumerate(suppressed):
        rest = torch.tensor([logits[row, v] for v in range(vocab) if v not in ids]).double().softmax(0)
        torch.testing.assert_close(confidence[row].double(), rest.max(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("filters", "vocab", "kept"),
    [({"top_k": 5}, 300, 5), ({"top_p": 0.5}, 4, 3), ({"top_p": 0.999}, 4, 4), ({"top_k": 2, "top_p": 0.5}, 4, 2)],
)
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_equal_logits_are_kept_from_the_lowest_id(way, device, filters, vocab, kept):
    """Among equals, zeros of both signs, rank follows the token id; a token is kept while its betters' p <= top_p."""
    logits = torch.tensor([-0.0, 0.0, 0.0, -0.0]).repeat(24, vocab // 4)
    case = from_logits(logits, [Segment(temperature=1.0, seed=4, **filters)])
    token, _, _ = run(case, way, device)
    assert set(token.tolist()) == set(range(kept))


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.9}])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_filters_look_within_the_best_1024(way, device, filters):
    """Where 1024 tokens do not make up top_p or top_k, those behind them are still left out."""
    case = from_logits(torch.zeros(12, 2), [Segment(temperature=1.0, seed=8, **filters)])
    with path(fused=False):
        token, _, _ = run(replace(case, weight=torch.zeros(1300, 2)), way, device)
    assert 700 < token.max() < 1024


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_any_strides(way, device, fused):
    """Of hidden rows, weight and bias: windows on wider memory, and every second element."""
    case = exact(6, 140, 8, bias=True, scale=0.5)
    for layout in LAYOUTS:
        assert case.bias is not None
        hidden, weight, bias = (laid_out(x, layout) for x in (case.hidden, case.weight, case.bias))
        with path(fused):
            check_exact(replace(case, hidden=hidden, weight=weight, bias=bias), way, device)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_huge_logits_do_not_overflow(way, device, fused):
    """Logits of +-1e4 leave sums finite, and the best token certain."""
    logits = torch.full((5, 300), -1e4)
    logits[:, 7] = 1e4
    case = from_logits(logits, [replace(s, suppressed=tuple(range(200, 264))) for s in GREEDY])
    case = replace(case, row_target=torch.tensor([-1, 7, 3, 200, -1]))
    with path(fused):
        token, confidence, logprob = run(case, way, device)
    assert token.tolist() == [7] * 5
    assert logprob.tolist() == [0.0, 0.0, -2e4, -torch.inf, 0.0]
    assert confidence.tolist()[:3] == [1.0, 1.0, 0.0]  # low_confidence, topk_margin, entropy


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_margins_of_almost_equal_tokens_are_exact(way, device):
    """p1 - p2 where the two differ by less than float32 tells of 1 - exp(x)."""
    gaps = torch.tensor([0.0, 1e-9, 3e-8, 1e-6, 1e-4, 1e-2, 0.5, 3.0])
    logits = torch.stack((torch.zeros(8), -gaps, torch.full((8,), -9.0)), dim=1)
    case = from_logits(logits, [Segment(rule=decode_head.ConfidenceRule.TOPK_MARGIN)])
    _, confidence, _ = run(case, way, device)
    p = logits.double().softmax(1)
    margin = -torch.expm1(-gaps.double()) * p[:, 0]
    torch.testing.assert_close(confidence.double(), margin, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which interprets
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_logits_that_are_not_numbers_give_tokens_of_the_vocabulary(way, device, fused):
    """A model that overflows yields NaN confidences, never a token out of range."""
    logits = torch.linspace(-2, 2, 200).repeat(6, 1)
    logits[::2, ::3] = torch.nan
    logits[1::2] = torch.inf
    logits[3::6] = torch.nan
    segments = [Segment(), Segment(temperature=1.0), Segment(temperature=1.0, top_k=4, top_p=0.5)]
    with path(fused):
        token, confidence, _ = run(from_logits(logits, segments), way, device)
    assert ((token >= 0) & (token < 200)).all()
    assert confidence.isnan().all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("way", "device"), WAYS)
def test_what_is_out_of_range_is_not_followed(way, device, fused):
    """A GPU checks no index: segments are those at the tables' ends, targets have no probability, rules the first."""
    case = exact(4, 40, 3, [Segment(), Segment(temperature=1.0, top_k=3, seed=5)], bias=False, scale=1.0)
    outside = replace(case, row_segment=torch.tensor([-(2**40), 2**40, -1, 2]))
    *args, _, seed, step, suppressed = case.args
    with path(fused):
        for found, expected in zip(run(outside, way, device), case.reference(torch.float32), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert run(replace(case, row_target=torch.full((4,), 40)), way, device)[2].eq(-torch.inf).all()
        other_rules = [*args, torch.tensor([4, -1]), seed, step, suppressed]
        assert_results(call(way, "decode_head", other_rules, launch, device), case.reference(torch.float32))


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_no_rows_and_no_suppressed_tokens(way, device):
    """A step without masked rows gives three empty results; a table without columns suppresses nothing."""
    case = exact(4, 20, 3, GREEDY[:3], bias=True, scale=1.0)
    assert all(x.shape == (0,) for x in run(case.take([]), way, device))
    assert case.args[-1].shape == (3, 0)
    check_exact(case, way, device)


def test_a_random_confidence_is_bit_for_bit_the_cpu_s():
    """The same words, and the same 23 bits of them."""
    segments = [Segment(rule=RANDOM, seed=seed, step=step) for seed, step in ((3, 9), (-1, 0), (2**40 + 7, 5))]
    case = random(9, 50, 4, segments)
    assert torch.equal(run(case, "kernel", DEVICE)[1], case.run()[1])


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 300_000))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_workspace_suffices_for_fewer_rows_and_is_bounded(rows, more, vocab):
    """What is planned for the most rows fits any call with as many or fewer; 4096 rows of LLaDA's take 60 MiB."""
    planned = cuda_workspace_bytes(rows + more, vocab, 4096, torch.bfloat16)
    tiling = CudaTiling.of(rows, vocab)
    assert bytes_of(tiling.memory()) <= planned <= (56 << 20) + 28 * (vocab + PART) * 1024
    assert tiling.columns == vocab or (tiling.columns > 0 and tiling.columns % tiling.part == 0)
    assert cuda_workspace_bytes(4096, 126_464, 4096, torch.bfloat16) < 60 << 20


def test_what_kernels_rely_on_is_checked():
    """Another dtype, too small a workspace, and tables that are not dense are errors that say so."""
    args = list(exact(3, 130, 7, bias=False, scale=1.0).args)
    needed = bytes_of(CudaTiling.of(3, 130).memory())
    with pytest.raises(
        ProgramError, match=f"3 rows by 130 tokens need a workspace of {needed} bytes on a GPU, found 9"
    ):
        decode_head._require_cuda(args, torch.empty(9, dtype=torch.uint8))
    with pytest.raises(ProgramError, match=r"float32, bfloat16 or float16 on a GPU, found torch\.float64"):
        decode_head._require_cuda([args[0].double(), *args[1:]], torch.empty(needed, dtype=torch.uint8))
    args[5] = torch.arange(6)[::2]
    with pytest.raises(ProgramError, match=r"row_position is dense on a GPU, found strides \[2\]"):
        decode_head._require_cuda(args, torch.empty(needed, dtype=torch.uint8))


class Calls(TorchDispatchMode):
    """Records the torch operators that are called, and the elements of memory that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        if "empty" in str(func):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("rows", [9, MANY])
def test_the_host_reads_nothing_and_allocates_nothing(rows):
    """Between launches, torch only takes views and multiplies into the workspace."""
    from triton.runtime.jit import KernelInterface

    from dllmc.ops.kernels.decode_head import decode_head

    case = exact(rows, 700, 7, bias=True, scale=1.0)
    outs = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    workspace = torch.empty(cuda_workspace_bytes(rows, 700, 7, torch.float32), dtype=torch.uint8)
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    args = case.args
    with patch.object(KernelInterface, "__getitem__", lambda kernel, grid: nothing), Calls() as calls:
        decode_head(*args[:7], args[7:], *outs, workspace)
    assert calls.elements == 0
    assert calls.names <= {f"aten.{name}" for name in (*VIEWS, "empty.memory_format", "mm.out")}


def test_launches():
    """Few rows take three; more take two a tile, and one."""
    for rows, tiles in ((9, 1), (MANY, 2)):
        case = exact(rows, PART + 5, 3, [Segment()], bias=False, scale=1.0)
        with tiles_of(MANY * PART), counted() as launches:
            run(case, "kernel", DEVICE)
        assert launches == {"reduce_tile": tiles, "select_candidates": tiles, "finish_rows": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [24, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_recorded_call_reads_its_operands_anew(rows, dtype):
    """It never waits for the GPU; replayed with other hidden rows, segments and parameters, it gives their results."""
    case = exact(rows, 5003, 64, bias=True, scale=0.25)
    other = exact(rows + 1, 5003, 64, MIXED[::-1], bias=True, scale=0.25).take(list(range(1, rows + 1)))
    placed = [on_device(x, "cuda") for x in case.to(dtype).args]
    outs = [torch.empty(rows, dtype=kind, device="cuda") for kind in (torch.int64, torch.float32, torch.float32)]
    workspace = torch.empty(cuda_workspace_bytes(rows, 5003, 64, dtype), dtype=torch.uint8, device="cuda")
    bound = decode_head.bind(placed, outs, workspace)
    fresh = other.to(dtype).args
    replayed(bound, lambda: [x.copy_(y) for x, y in zip(placed, fresh, strict=True) if isinstance(x, Tensor)])
    token, _, _ = other.reference(torch.float32)
    _, confidence, logprob = other.reference(torch.float64)
    assert_results([x.cpu() for x in outs], (token, confidence, logprob))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 151_936), (FUSED_ROWS, 151_936), (MANY, 151_936), (300, 151_936), (2100, 9000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_like_sizes(rows, vocab, dtype):
    """Several tiles of a vocabulary, and several chunks of rows: what the CPU chooses and draws."""
    case = exact(rows, vocab, 24, bias=False, scale=0.125).to(dtype)
    assert_results(run(case, "kernel", "cuda"), case.to(torch.float32).run())
