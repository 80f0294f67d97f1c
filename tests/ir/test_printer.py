"""A program as text: every tensor with its place and lifetime, every instruction with its operands."""

import math

from dllmc.ir.printer import text_of
from dllmc.ir.program import Affine, DType, ForRows, Instruction, Program, Tensor, View
from tests.loops import CHUNK, START, rows_of
from tests.programs import MAXIMA, TOKENS, shape, tensor, whole


def test_the_text_of_a_program() -> None:
    """Whole tensors are names; a dense start shows its shape; other views show strides and first element too."""
    hidden = Tensor("bfloat16", shape(TOKENS, 4), 64, (0, 2))
    heads = View("%h", shape(2, TOKENS, 2), shape(2, 4, 1))
    last = View("%h", shape(4), shape(1), Affine(-4, (("tokens", 4),)))
    start = View("%h", shape(2, 4), shape(4, 1))
    program = Program(
        name="dense",
        maxima=MAXIMA,
        inputs={"ids": tensor(TOKENS, dtype="int64")},
        weights={"scale": tensor()},
        buffers={"%h": hidden, "%unplanned": Tensor("uint8", shape(Affine(-1, (("tokens", 2),))))},
        instructions=(
            Instruction("aten.add.Tensor", (whole("ids", tensor(TOKENS)), 1, None, "x"), (whole("%h", hidden),)),
            Instruction("op", ((heads, (start,)), DType("int32"), True, -math.inf), (heads, last), "%unplanned"),
        ),
        outputs={"row": last, "all": whole("%h", hidden)},
    )
    assert text_of(program).splitlines() == [
        "program dense",
        "  input ids: int64[tokens]",
        "  weight scale: float32[]",
        "  buffer %h: bfloat16[tokens, 4] at 64, alive [0, 2)",
        "  buffer %unplanned: uint8[2*tokens - 1]",
        "     0  %h = aten.add.Tensor(ids, 1, None, 'x')",
        "     1  %h[2, tokens, 2; strides 2, 4, 1; from 0], %h[4; strides 1; from 4*tokens - 4] = "
        "op([%h[2, tokens, 2; strides 2, 4, 1; from 0], [%h[2, 4]]], int32, True, -inf), workspace %unplanned",
        "  return row = %h[4; strides 1; from 4*tokens - 4]",
        "  return all = %h",
    ]


def test_the_text_of_a_loop() -> None:
    """Its rows above its calls, which stand in, and are numbered on from those before."""
    ids, chunk = tensor(TOKENS, 2), tensor(CHUNK, 2)
    rows, all_rows = rows_of("ids", ids, TOKENS), whole("ids", ids)
    body = (
        Instruction("copy", (rows,), (whole("%c", chunk),)),
        Instruction("op", (whole("%c", chunk), all_rows, START), (rows,)),
    )
    outside = Instruction("op", (all_rows,), ())
    items = (outside, ForRows(TOKENS, body), outside)
    program = Program("dense", {**MAXIMA, "chunk": 4}, {"ids": ids}, {}, {"%c": chunk}, items, {})
    assert text_of(program).splitlines() == [
        "program dense",
        "  input ids: float32[tokens, 2]",
        "  buffer %c: float32[chunk, 2]",
        "     0   = op(ids)",
        "        for 4 rows of tokens:",
        "     1    %c = copy(ids[chunk, 2; strides 2, 1; from 2*start])",
        "     2    ids[chunk, 2; strides 2, 1; from 2*start] = op(%c, ids, start)",
        "     3   = op(ids)",
    ]
