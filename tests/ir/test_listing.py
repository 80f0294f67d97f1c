"""A step graph as plain data: what of a call is listed, and which calls take memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.ir.listing import Lister, listing
from dllmc.ir.step_graph import StepGraph
from dllmc.ir.trace import Call
from tests.graphs import MAXIMA, Tiny, captured, run, step_of
from tests.ir import stacks
from tests.ir.stacks import Block, Stack

TOKENS = MAXIMA["tokens"]


def called(step: StepGraph, operator: str) -> list[Call]:
    """The calls of one operator."""
    return [call for call in listing(step) if call.operator == operator]


def test_inputs_calls_and_what_is_returned_are_lines() -> None:
    """In that order; an input has its type and bytes, the return names what it returns."""
    graph = listing(step_of(lambda module, x: F.gelu(x)))
    assert [call.operator for call in graph] == [
        *("input", "aten.unsqueeze", "aten.embedding", "aten.gelu", "aten.linear", "aten.select.int", "return"),
    ]
    assert (graph[0].name, graph[0].type, graph[0].size_bytes) == ("token_ids", "int64[tokens]", TOKENS * 8)
    assert graph[-1].arguments == "logits=%select"


def test_a_call_has_its_weights_by_name_its_layer_and_its_line() -> None:
    linear, _ = called(captured(Stack([Block()])), "aten.linear")
    assert linear.arguments == "%rms_norm, layers.0.up.weight"
    assert linear.type == "float32[1, tokens, 8]"
    assert linear.size_bytes == TOKENS * 8 * 4
    assert linear.layer == "layers.0"
    assert linear.source.startswith(f"{stacks.__file__}:")
    assert linear.source.endswith(", in forward: h = self.up(self.norm(x))")


def test_a_view_takes_no_bytes_even_as_one_of_several() -> None:
    """What shares its memory with what it is made from: a transpose, each piece of a chunk, a piece picked."""
    step = step_of(lambda module, x: torch.cat(x.transpose(1, 2).transpose(1, 2).chunk(2, -1), -1))
    for operator in ("aten.transpose.int", "aten.chunk", "getitem"):
        for call in called(step, operator):
            assert call.is_view
            assert call.size_bytes == 0
    [cat] = called(step, "aten.cat")
    assert not cat.is_view
    assert cat.size_bytes == TOKENS * 8 * 4


def test_a_reshape_that_copies_is_no_view() -> None:
    step = step_of(lambda module, x: x.transpose(1, 2).reshape(1, -1).view(1, -1, 8))
    [copied] = called(step, "aten.reshape")
    assert not copied.is_view
    assert copied.size_bytes == TOKENS * 8 * 4


def test_several_results_of_one_type_or_of_more() -> None:
    """`T x n`, or all of them in parentheses; the bytes are those of all."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        best, at = torch.sort(x, -1)
        return torch.cat(x.chunk(2, -1), -1) + best + at

    step = step_of(body)
    assert called(step, "aten.chunk")[0].type == "float32[1, tokens, 4] x 2"
    [sort] = called(step, "aten.sort")
    assert sort.type == "(float32[1, tokens, 8], int64[1, tokens, 8])"
    assert sort.size_bytes == TOKENS * 8 * (4 + 8)


def test_sizes_of_the_step_are_words_and_no_calls() -> None:
    """`arange(T)`: the argument reads `tokens`; nothing is listed for the size itself."""
    step = step_of(lambda module, x: x + torch.arange(2 * x.shape[1] + 1)[1 : x.shape[1] + 1, None].expand(-1, 8))
    assert called(step, "aten.arange")[0].arguments == "2*tokens + 1"
    assert called(step, "aten.arange")[0].size_bytes == (2 * TOKENS + 1) * 8
    assert not called(step, "aten.sym_size.int")


def test_a_lister_follows_the_passes() -> None:
    """Behind a pass it says what a fresh one says, though it keeps what has not changed."""
    step = step_of(lambda module, x: F.gelu(x) + F.gelu(x))
    run(step, "inline-regions,fold-constants")
    lister = Lister(step)
    before = {call.name: call for call in lister.graph()}
    assert run(step, "inline-regions,cse").modified
    after = {call.name: call for call in lister.graph()}
    assert tuple(after.values()) == listing(step)
    assert before.keys() - after.keys() == {"gelu_1"}
    assert before["add"].arguments == "%gelu, %gelu_1"
    assert after["add"].arguments == "%gelu, %gelu"
