"""The few shapes that a GPU's steps come in: a step is padded up to one, and the shape is recorded once as a graph.

Tokens cost the most, so their choices are close: beyond 128, four an octave, of which a quarter at most is padding;
below, where reading the weights takes the time, the powers of two. Rows and segments are powers of two. What costs
little follows from these: as many guided rows as rows, as many active tokens as tokens, or none.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from dllmc.ir.program import Sizes

LEAST = {"tokens": 16, "rows": 8, "segments": 1}
"""The smallest choice of each size."""

STEPS_FROM = 128
"""Tokens from which on an octave has `STEPS` choices instead of one."""

STEPS = 4


@dataclass(frozen=True)
class Buckets:
    """`choices`: of tokens, rows and segments, ascending up to the program's maximum. `maxima`: of all sizes."""

    choices: Mapping[str, tuple[int, ...]]
    maxima: Sizes

    @classmethod
    def of(cls, maxima: Sizes) -> "Buckets":
        """For steps of at most these sizes."""
        return cls({size: _choices(size, maxima[size]) for size in LEAST}, maxima)

    def padded(self, sizes: Sizes) -> dict[str, int]:
        """The shape of a step that holds these sizes, none beyond the maxima.

        Where guided rows are padded, at least one row is padding, which padded guided rows name. A step that has no
        room for one, since all rows of the largest step are real, keeps its number of guided rows.
        """
        guided = sizes["guided"]
        tokens, segments = self._up("tokens", sizes["tokens"]), self._up("segments", sizes["segments"])
        rows = self._up("rows", min(sizes["rows"] + (guided > 0), self.maxima["rows"]))
        if guided and rows > sizes["rows"]:
            guided = max(guided, min(rows, self.maxima["guided"]))
        active = min(tokens, self.maxima["active"]) if sizes["active"] else 0
        return {"tokens": tokens, "rows": rows, "guided": guided, "segments": segments, "active": active}

    def _up(self, size: str, least: int) -> int:
        choices = self.choices[size]
        return choices[bisect_left(choices, least)]


def _choices(size: str, most: int) -> tuple[int, ...]:
    found, choice = [], LEAST[size]
    while choice < most:
        found.append(choice)
        fine = size == "tokens" and choice >= STEPS_FROM
        choice += (1 << choice.bit_length() - 1) // STEPS if fine else choice
    return (*found, most)
