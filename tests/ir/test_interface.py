"""Which programs an engine can run: those that take what it gives and return what it commits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllmc.artifact import Artifact, read
from dllmc.errors import ProgramError
from dllmc.ir import interface
from dllmc.ir.program import PAGES, Affine, ForRows, Instruction, Program, Tensor, View
from dllmc.ops import signatures
from dllmc.runtime import batch
from dllmc.runtime.table import Table

SEGMENTS = Affine(0, (("segments", 1),))


@pytest.fixture(scope="module")
def served(tiny_llada: Path) -> Artifact:
    return read(tiny_llada)


def test_what_the_compiler_makes_can_be_run(served: Artifact) -> None:
    interface.check(served.programs, served.spec)


def test_the_inputs_are_those_that_a_step_is_composed_of(served: Artifact) -> None:
    """By name, dtype and shape, of a composed step of one request."""
    table = Table(1, 8, 2)
    table.length[0], table.end[0], table.start[0] = 8, 8, 4
    table.masked[0, 4:] = True
    table.left[0] = 4
    step = batch.compose(table, np.zeros(1, np.int64), 16, mask_id=3, has_cache=True)
    assert step.inputs.keys() == interface.INPUTS.keys() | {"page_table"}
    for name, (dtype, shape) in interface.INPUTS.items():
        given = step.inputs[name]
        assert given.shape == tuple(dim.at(step.sizes) for dim in shape), name
        assert dtype == "float32" or given.dtype == np.int64, name


def changed(program: Program, group: str, name: str, **fields: Any) -> Program:
    tensors = dict(getattr(program, group))
    tensors[name] = replace(tensors[name], **fields)
    return replace(program, **{group: tensors})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: replace(p, outputs={"token": p.outputs["token"]}),
            "outputs: expected token int64.rows., .*found",
        ),
        (lambda p: changed(p, "inputs", "segments", dtype="int32"), r"input 'segments': expected int64\[segments, 2\]"),
        (
            lambda p: changed(p, "inputs", "page_table", shape=(Affine(0, (("segments", 1),)), Affine(1))),
            "pages or more",
        ),
        (lambda p: replace(p, inputs={**p.inputs, "clock": Tensor("int64", ())}), "input 'clock': no engine has it"),
        (
            lambda p: replace(p, inputs={name: t for name, t in p.inputs.items() if name != "page_table"}),
            "it has caches; expected an input 'page_table', found none",
        ),
        (lambda p: replace(p, maxima={**p.maxima, PAGES: 5}), "its maxima .* are not those of"),
    ],
)
def test_anything_else_is_refused(served: Artifact, change: Callable[[Program], Program], message: str) -> None:
    programs = {**served.programs, "refresh": change(served.programs["refresh"])}
    with pytest.raises(ProgramError, match=message):
        interface.check(programs, served.spec)


def test_a_cache_of_another_layout_is_refused(served: Artifact) -> None:
    [name, *_] = served.program.caches
    shape = served.program.caches[name].shape
    turned = {key: changed(p, "caches", name, shape=shape[::-1]) for key, p in served.programs.items() if p.caches}
    with pytest.raises(ProgramError, match=r"cache 'cache.0': expected \[2, heads, pages, page tokens, head dim\]"):
        interface.check({**served.programs, **turned}, served.spec)


def test_one_program_may_run_all_phases(served: Artifact) -> None:
    """As it is compiled without specialize-phase; `mixed` alone then takes every step."""
    interface.check({"mixed": served.programs["mixed"]}, served.spec)


def test_a_part_of_the_phases_is_refused(served: Artifact) -> None:
    programs = {name: program for name, program in served.programs.items() if name != "reuse"}
    with pytest.raises(
        ProgramError, match=r"programs \['dense', 'mixed', 'refresh'\]: expected dense, or mixed, or dense, refresh"
    ):
        interface.check(programs, served.spec)


def test_a_table_must_have_a_row_for_all_that_looks_it_up(served: Artifact) -> None:
    rows = served.spec.vocab_size
    with pytest.raises(ProgramError, match=f"looks up token_ids: expected {rows + 1} rows or more, found {rows}"):
        interface.check(served.programs, replace(served.spec, vocab_size=rows + 1))


Change = Callable[[View], View]


def with_operand(program: Program, op: str, name: str, change: Change) -> Program:
    """The program with an operand of each such call changed, in a way that is sound for a verifier or not."""

    def changed_call(call: Instruction) -> Instruction:
        if call.op != op:
            return call
        views = [change(each) if found == name else each for found, each in signatures.operands(call)]  # type: ignore[arg-type]
        return replace(call, inputs=tuple(views))

    assert not any(isinstance(item, ForRows) for item in program.instructions)
    return replace(program, instructions=tuple(changed_call(item) for item in program.instructions))  # type: ignore[arg-type]


def another(base: str) -> Change:
    return lambda view: replace(view, base=base)


def turned(view: View) -> View:
    return replace(view, strides=view.strides[::-1])


def shifted(view: View) -> View:
    return replace(view, offset=view.offset + Affine(1))


def first_row(view: View) -> View:
    return replace(view, shape=(Affine(1), *view.shape[1:]))


ATTENTION, KEEP, HEAD, GUIDE = (f"dllmc.{name}.default" for name in ("attention", "keep", "decode_head", "guide_rows"))


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [
        (
            ATTENTION,
            "segments",
            another("row_spans"),
            "expected segments to be segments of the step, found 'row_spans'",
        ),
        (ATTENTION, "segments", turned, "expected segments to be segments of the step, found 'segments'"),
        (ATTENTION, "segments", shifted, "expected segments to be segments of the step, found 'segments'"),
        (ATTENTION, "spans", another("keeping"), "expected spans to be segments or row_spans of the step"),
        (ATTENTION, "cached", another("seed"), "expected cached to be cached of the step, found 'seed'"),
        (ATTENTION, "page_table", another("suppressed"), "expected page_table to be page_table of the step"),
        (ATTENTION, "k", first_row, "expected k with tokens rows"),
        (ATTENTION, "v", first_row, "expected v with tokens rows"),
        (ATTENTION, "cache", another("%x"), "expected a whole cache, found a view of '%x'"),
        (ATTENTION, "cache", shifted, "expected a whole cache, found a view of 'cache.0'"),
        (KEEP, "segments", another("row_spans"), "expected segments to be segments of the step"),
        (KEEP, "keeping", another("suppressed"), "expected keeping to be keeping of the step"),
        (KEEP, "page_table", shifted, "expected page_table to be page_table of the step"),
        (KEEP, "q", first_row, "expected q with active rows"),
        (KEEP, "k", first_row, "expected k with tokens rows"),
        (HEAD, "row_segment", another("row_position"), "expected row_segment to be row_segment of the step"),
        (HEAD, "temperature", first_row, "expected temperature with segments rows"),
        (GUIDE, "guided", another("rows"), "expected guided to be guided of the step"),
        (GUIDE, "hidden", first_row, r"expected hidden with guided\+rows rows"),
    ],
)
def test_what_operators_trust_is_the_engines(
    served: Artifact, op: str, name: str, change: Change, message: str
) -> None:
    """Kernels read memory where these tables say; those of any other origin could hold any number."""
    forged = with_operand(served.programs["mixed"], op, name, change)
    with pytest.raises(ProgramError, match=rf"^program 'mixed': {op}: {message}"):
        interface.check({**served.programs, "mixed": forged}, served.spec)


def test_rows_of_a_table_are_the_engines_too(served: Artifact) -> None:
    """As calls on some rows have them, in loops; only parts of a row are not."""
    program = served.programs["mixed"]
    part = View("suppressed", (Affine(3), Affine(64)), (Affine(64), Affine(1)), Affine(128))
    assert interface._is_input(program, part, "suppressed")
    assert not interface._is_input(program, replace(part, offset=Affine(129)), "suppressed")
    assert not interface._is_input(program, part, "keeping")


def test_a_table_without_columns(served: Artifact) -> None:
    empty = changed(served.programs["mixed"], "inputs", "page_table", shape=(SEGMENTS, Affine(0)))
    assert not interface._is_input(
        empty, View("page_table", (SEGMENTS, Affine(1)), (Affine(1), Affine(1))), "page_table"
    )
