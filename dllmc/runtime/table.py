"""Where requests stand in their decoding, as columns: a step reads and writes those of all its requests at once.

A row is one request's; `dllmc.runtime.request.RequestState` fills it and gives it its meaning. What happens in each
step happens here, for any number of rows without a loop over them; what happens once a block, there.
"""

from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from dllmc.runtime.params import Phase
from dllmc.spec import MAX_DEFER_TOKENS, MAX_SUPPRESS_TOKENS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

PHASES: tuple[Phase, ...] = get_args(Phase)
FULL, REFRESH, REUSE = range(3)
BYTES_OF_POSITION = 4 * 8 + 1  # of a request, in the columns that have one entry a position
SIDES = 2  # sequences of a request, with guidance


class Table:
    """`rows` requests of up to `positions` positions, which hold up to `pages` pages of the KV pool a side."""

    # The schedule. span: where the active span begins; it ends at `end`. left: masked positions of the block.
    prompt_length: IntArray
    length: IntArray
    start: IntArray
    end: IntArray
    span: IntArray
    step: IntArray
    step_in_block: IntArray
    left: IntArray
    masked_at_start: IntArray
    # How many tokens a step commits. steps_per_block: 0 where there is none. threshold: +inf likewise.
    steps_per_block: IntArray
    timestep: BoolArray
    threshold: FloatArray
    # The cache. interval: 0 without one. kept: keys a head keeps of the block. lost: it was taken within the block,
    # whose Refresh is done again, without commit, before it goes on.
    caches: BoolArray
    delay: IntArray
    interval: IntArray
    kept: IntArray
    selection: IntArray
    pool: IntArray
    lost: BoolArray
    # What the head reads.
    cfg_scale: FloatArray
    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    rule: IntArray
    seed: IntArray
    # What the scheduler reads. due: see `Entry`. waited: steps since it last ran.
    due: DoubleArray
    waited: IntArray
    # What a GPU must yet be told: whether the row is another request's than it knows of, or in another state.
    fresh: BoolArray

    def __init__(self, rows: int, positions: int, pages: int = 0) -> None:
        for name, element in _COLUMNS.items():
            setattr(self, name, np.zeros(rows, element))
        self.token_ids: IntArray = np.zeros((rows, positions), np.int64)
        self.at_refresh: IntArray = np.zeros((rows, positions), np.int64)  # token ids that the cache is of
        self.reference: IntArray = np.full((rows, positions), -1, np.int64)
        self.masked: BoolArray = np.zeros((rows, positions), np.bool_)
        self.logprobs: DoubleArray = np.zeros((rows, positions), np.float64)
        self.suppressed: IntArray = np.full((rows, MAX_SUPPRESS_TOKENS), -1, np.int64)
        self.deferred: IntArray = np.full((rows, MAX_DEFER_TOKENS), -1, np.int64)
        self.page_table: IntArray = np.zeros((rows, SIDES, pages), np.int64)

    def copy(self, row: int, other: "Table", other_row: int) -> None:
        """Make a row what a row of another table is, its pages left out."""
        for name in _COLUMNS:
            getattr(self, name)[row] = getattr(other, name)[other_row]
        length = int(self.length[row])
        for name in ("token_ids", "at_refresh", "reference", "masked", "logprobs"):
            getattr(self, name)[row, :length] = getattr(other, name)[other_row, :length]
        self.suppressed[row], self.deferred[row] = other.suppressed[other_row], other.deferred[other_row]
        self.fresh[row] = True

    def phases(self, rows: IntArray) -> IntArray:
        """What the next step of each is: `FULL`, `REFRESH` or `REUSE` (semantics.md, "Schedule of one block")."""
        since = self.step_in_block[rows] - self.delay[rows]
        interval = self.interval[rows]
        refresh = (since == 0) | ((interval > 0) & (since % np.maximum(interval, 1) == 0)) | self.lost[rows]
        phases: IntArray = np.where(refresh, REFRESH, REUSE)
        phases[(since < 0) | ~self.caches[rows]] = FULL
        return phases

    def sides(self, rows: IntArray) -> IntArray:
        """Sequences that a step of each computes: with guidance a second one, whose prompt is masked."""
        return 1 + (self.cfg_scale[rows] > 0)

    def candidates(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Masked positions of the current blocks: [candidates] which of the rows, and the position, in order."""
        if not rows.size:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        start, end = self.start[rows], self.end[rows]
        window = start[:, None] + np.arange((end - start).max())
        inside = window < end[:, None]
        open_ = self.masked[rows[:, None], np.where(inside, window, 0)] & inside
        segment, offset = np.nonzero(open_)
        return segment, start[segment] + offset

    def commit_counts(self, rows: IntArray) -> IntArray:
        """How many candidates the step commits, maybe 0; with a threshold, the least it commits: 1."""
        steps, step, left = self.steps_per_block[rows], self.step_in_block[rows], self.left[rows]
        paced = steps > 0
        share, remainder = np.divmod(self.masked_at_start[rows], np.maximum(steps, 1))
        counts = np.where(paced, share + (step < remainder), 1)
        if (timestep := self.timestep[rows]).any():
            counts = np.where(timestep, timestep_counts(left, step, np.maximum(steps, 1)), counts)
        return counts

    def advance(self, rows: IntArray, committing: IntArray, commits: IntArray) -> None:
        """Go on in the schedule by a step of the rows, of which some commit; commits: [committing], tokens of each."""
        self.lost[rows] = False  # what was replayed has its cache again
        self.step[committing] += 1
        self.step_in_block[committing] += 1
        self.left[committing] -= commits

    def schedule(self, rows: IntArray) -> list[Array]:
        """What `advance` changes of rows, to `restore` it."""
        return [getattr(self, name)[rows] for name in _SCHEDULE]

    def restore(self, rows: IntArray, schedule: list[Array]) -> None:
        """Go back to what `schedule` was."""
        for name, values in zip(_SCHEDULE, schedule, strict=True):
            getattr(self, name)[rows] = values

    def write(
        self, rows: IntArray, segment: IntArray, position: IntArray, token: IntArray, logprob: npt.NDArray[np.floating]
    ) -> IntArray:
        """Write tokens, or the reference's, at candidates of rows; those now full, once they have advanced.

        segment: [commits], which of the rows; position, token, logprob: [commits].
        """
        at = rows[segment]
        reference = self.reference[at, position]
        self.token_ids[at, position] = np.where(reference < 0, token, reference)
        self.logprobs[at, position] = logprob
        self.masked[at, position] = False
        full: IntArray = rows[self.left[rows] == 0]
        return full


def timestep_counts(masked: IntArray, step: IntArray, steps: IntArray) -> IntArray:
    """Tokens that step `step` of a block's `steps` commits of the `masked` left; all of them at the last step.

    Before it, int(masked * (1 - t[step + 1] / t[step])) with t = linspace(1, 1e-3, steps + 1) (Dream, arXiv
    2508.15487), as one fraction of integers: t[i] = (1000 * steps - 999 * i) / (1000 * steps). No rounding decides.
    """
    return np.where(step >= steps - 1, masked, 999 * masked // np.maximum(1000 * steps - 999 * step, 1))


_SCHEDULE = ("lost", "step", "step_in_block", "left")

_ELEMENTS: dict[object, type[np.generic]] = {
    IntArray: np.int64,
    FloatArray: np.float32,
    DoubleArray: np.float64,
    BoolArray: np.bool_,
}
_COLUMNS = {name: _ELEMENTS[kind] for name, kind in get_type_hints(Table).items()}
