"""The sizes of a step are chosen so that weights, arena and state fit a budget."""

from dataclasses import dataclass, replace

from dllmc.errors import BudgetError, PassError
from dllmc.ir.program import CHUNK, PAGES, Program
from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.plan_memory import planned
from dllmc.passes.sizing import resized, total_bytes, with_rows, with_tokens

# What is made smaller until the step fits, and to what at least, in turn: rows and tokens give way first where that
# costs no work, and chunks that keep a matrix product efficient last.
STEPS = (
    (CHUNK, 256),
    ("rows", 128),
    ("tokens", 512),
    (CHUNK, 16),
    ("rows", 16),
    ("tokens", 2),
    ("rows", 1),
    (CHUNK, 1),
)


@dataclass(frozen=True)
class FitBudget(Pass):
    """Make chunks, and as far as they may be chosen rows and tokens, as large as fits `bytes`; 0 is no budget.

    The sizes that the step was captured for are the largest. A size is given up in the order of `STEPS`, and no more of
    it than is needed. The KV pool holds at least what a request as long as a step caches, and has all that is left.
    Raises `BudgetError` with the smallest budget that would do.
    """

    name = "fit-budget"
    requires = ("lowered",)
    bytes: int = 0
    tokens: bool = False
    rows: bool = False

    def run(self, step: StepGraph) -> PassResult:
        if step.program is None:
            raise PassError("pass 'fit-budget': the step has no program; run lower before it")
        if not self.bytes:
            return PassResult(False)
        step.program = program = self._fitted(step.program)
        step.maxima = dict(program.maxima)
        return PassResult(False, {size: program.maxima[size] for size in self._sizes(program)})

    def _fitted(self, program: Program) -> Program:
        """The largest program whose plan fits: where a plan misses the bound, the next one makes up for it."""
        spare = 0
        while True:
            fitted = self._fit_bound(program, self.bytes - spare)
            excess = total_bytes(planned(fitted)) - self.bytes
            if excess <= 0:
                pages = {PAGES: fitted.maxima[PAGES] + -excess // fitted.page_bytes} if fitted.caches else {}
                return replace(fitted, maxima=fitted.maxima | pages)
            spare += excess

    def _fit_bound(self, program: Program, budget: int) -> Program:
        maxima = with_tokens(program, program.maxima, program.maxima["tokens"])
        for size, least in STEPS:
            if size in self._sizes(program) and total_bytes(resized(program, maxima)) > budget:
                low, high = min(least, maxima[size]), maxima[size]
                while low < high:  # the most that fits, or the least allowed
                    middle = (low + high + 1) // 2
                    if total_bytes(resized(program, _with(program, maxima, size, middle))) <= budget:
                        low = middle
                    else:
                        high = middle - 1
                maxima = _with(program, maxima, size, low)
        fitted = resized(program, maxima)
        if total_bytes(fitted) > budget:
            needed = total_bytes(planned(fitted))
            raise BudgetError(
                f"a memory budget of {self.bytes} bytes is too small: weights take {fitted.weight_bytes}, state "
                f"{fitted.state_bytes}, the KV pool {fitted.cache_bytes}, and the arena "
                f"{needed - fitted.weight_bytes - fitted.state_bytes - fitted.cache_bytes} for steps of "
                f"{', '.join(f'{value} {name}' for name, value in maxima.items())}; give {needed} bytes or more"
                + ("" if self.tokens and self.rows else ", or let steps be smaller")
            )
        return fitted

    def _sizes(self, program: Program) -> list[str]:
        """The sizes that may be chosen."""
        free = {CHUNK: CHUNK in program.maxima, "tokens": self.tokens, "rows": self.rows}
        return [size for size, chosen in free.items() if chosen]


def _with(program: Program, maxima: dict[str, int], size: str, value: int) -> dict[str, int]:
    """The sizes with one changed, and those that go with it."""
    if size == "tokens":
        return with_tokens(program, maxima, value)
    return with_rows(maxima, value) if size == "rows" else maxima | {size: value}
