"""fit-budget: the largest sizes whose planned program fits, given up in a fixed order."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmc.compiler import CompileOptions, rewrite
from dllmc.errors import BudgetError, PassError
from dllmc.ir.program import CHUNK, LEAST, Program
from dllmc.passes import pipeline
from dllmc.passes.fit_budget import STEPS, FitBudget
from dllmc.passes.plan_memory import planned
from dllmc.passes.sizing import resized
from tests.passes.two_layers import SPEC, Model

PASSES = pipeline.DEFAULT_PIPELINE.replace("chunk-activations", "chunk-activations{chunk=4096}")
LOOPS, WHOLE = (
    rewrite(
        Model(),
        SPEC,
        CompileOptions(max_tokens_per_step=700, max_logit_rows=300, max_requests=4, passes=passes),
    )[0]
    for passes in (PASSES, pipeline.DEFAULT_PIPELINE)
)


def total(program: Program) -> int:
    """All that an engine allocates: written out, of a plan."""
    done = planned(program)
    assert done.arena_bytes is not None
    return done.weight_bytes + done.state_bytes + done.cache_bytes + done.arena_bytes


def fit(program: Program, **options: int | bool) -> Program:
    step = replace(LOOPS, program=program, maxima=dict(program.maxima))
    FitBudget(**options).run(step)
    assert step.program is not None
    assert step.maxima == step.program.maxima
    return step.program


def sized(tokens: int, rows: int, chunk: int) -> Program:
    assert LOOPS.program is not None
    return resized(LOOPS.program, wanted(tokens, rows, chunk))


def wanted(tokens: int, rows: int, chunk: int) -> dict[str, int]:
    """Each row may be guided; active spans are as long as blocks and a token more; the pool holds one request."""
    active, pages = 2 * rows + 4, -(-tokens // 32) + 1
    sizes = {"tokens": tokens, "rows": rows, "guided": rows, "segments": 4, "active": active}
    return {**sizes, "pages": pages, CHUNK: chunk}


SMALLEST, LARGEST = total(sized(2, 1, 1)), total(sized(700, 300, 700))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.floats(0, 1.1))
def test_no_more_is_given_up_than_needed(share: float) -> None:
    """What is chosen fits; one more of the size that was given up last, of those that may be larger, does not.

    But for one percent: sizes are chosen by the bound of a plan, and where a plan misses it, a little more is given up.
    """
    budget = int(SMALLEST + share * (LARGEST - SMALLEST))
    fitted = fit(sized(700, 300, 4096), bytes=budget, tokens=True, rows=True)
    sizes = {name: fitted.maxima[name] for name in ("tokens", "rows", CHUNK)}
    assert total(fitted) <= budget
    assert fitted.maxima["guided"] == sizes["rows"]
    assert sizes[CHUNK] <= sizes["tokens"]
    if total(sized(700, 300, 700)) <= budget:
        assert sizes == {"tokens": 700, "rows": 300, CHUNK: 700}
        return
    larger = []
    at = {"tokens": 700, "rows": 300, CHUNK: 700}
    for size, least in STEPS:  # where each size stands when the next is tried
        at[size] = max(sizes[size], min(least, at[size]))
        at[CHUNK] = min(at[CHUNK], at["tokens"])
        larger.append((size, dict(at)))
        if at == sizes:
            break
    size, reached = larger[-1]
    assert reached == sizes
    assert total(sized(**{**sizes, size: sizes[size] + 1})) > 0.99 * budget


def test_given_sizes_stay() -> None:
    """Tokens and rows that a user has chosen are kept, and chunks make up for them."""
    program = sized(700, 300, 4096)
    for choice in ({"tokens": True}, {"rows": True}, {}):
        budget = total(sized(700, 300, 8))
        fitted = fit(program, bytes=budget, **choice)
        assert total(fitted) <= budget
        assert choice.get("tokens") or fitted.maxima["tokens"] == 700
        assert choice.get("rows") or fitted.maxima["rows"] == 300


@pytest.mark.parametrize("free", [True, False])
def test_too_small_a_budget(free: bool) -> None:
    """The refusal says what takes what, and names a budget that works: the smallest."""
    program = sized(700, 300, 4096)
    with pytest.raises(
        BudgetError, match=r"weights take \d+, state \d+, the KV pool \d+, and the arena \d+ for steps of"
    ) as refusal:
        fit(program, bytes=1, tokens=free, rows=free)
    found = re.search(r"give (\d+) bytes or more", str(refusal.value))
    assert found is not None
    smallest = int(found[1])
    assert smallest == (SMALLEST if free else total(sized(700, 300, 1)))
    fit(program, bytes=smallest, tokens=free, rows=free)
    with pytest.raises(BudgetError):
        fit(program, bytes=smallest - 1, tokens=free, rows=free)


def test_without_a_budget_nothing_changes() -> None:
    program = sized(700, 300, 16)
    assert fit(program) is program


def test_a_program_without_loops() -> None:
    """It has no chunks to choose; its rows and tokens are."""
    assert WHOLE.program is not None
    bare = replace(WHOLE.program, arena_bytes=None)
    fitted = fit(bare, bytes=(SMALLEST + total(bare)) // 2, tokens=True, rows=True)
    assert CHUNK not in fitted.maxima
    assert all(fitted.maxima[size] >= LEAST[size] for size in ("tokens", "rows"))
    assert fitted.maxima["tokens"] < 700


def test_a_budget_needs_its_passes() -> None:
    """Text that leaves them out is refused with their names."""
    with pytest.raises(PassError, match="needs the passes chunk-activations, fit-budget"):
        _ = CompileOptions(memory_budget=1 << 30, passes="inline-regions,lower,plan-memory").pipeline


def test_a_budget_makes_loops_up_to_the_longest_sequence() -> None:
    """Without sizes of its own, a budget that is ample holds the default sizes, or as long a sequence as there is."""
    step, _ = rewrite(Model(), SPEC, CompileOptions(memory_budget=1 << 34))
    pages = step.maxima.pop("pages")
    sizes = {"tokens": 4096, "rows": 1024, "guided": 1024, "segments": 64, "active": 2112}
    assert step.maxima == {**sizes, CHUNK: 4096}
    assert pages > 4096 // 32 + 64  # and all that is left
    longer = Model()
    longer.cos, longer.sin = torch.ones(9000, 4), torch.zeros(9000, 4)
    step, _ = rewrite(longer, replace(SPEC, max_positions=9000), CompileOptions(memory_budget=1 << 34))
    assert step.maxima["tokens"] == 9000
