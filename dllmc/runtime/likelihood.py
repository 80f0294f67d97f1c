"""The likelihood of a completion under a masked diffusion model, by Monte Carlo.

log p(x | prompt) is bounded by the expectation, over a number l of masked tokens uniform in 1 to L and over which l of
the L tokens they are, of L / l times the sum of their log-probabilities given all others (LLaDA, arXiv 2502.09992,
appendix A). Numbers of masked tokens are spread evenly from a random one, as LLaDA's evaluation does: less variance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Score:
    """An estimate of a completion's log-likelihood, in nats."""

    log_likelihood: float
    """The mean of the samples."""

    standard_error: float
    """Of the mean, as if samples were independent: they are spread evenly, so that it is less. NaN of one sample."""

    samples: list[float]
    """What each sample says alone."""


def masked_sets(length: int, samples: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Of each sample the offsets in [0, length) that are masked, ascending: at least one."""
    random = np.random.default_rng(seed)
    first = int(random.integers(length))
    counts = [1 + (first + round(index * length / samples)) % length for index in range(samples)]
    return [np.sort(random.choice(length, count, replace=False)) for count in counts]


def score(samples: Sequence[float]) -> Score:
    """The mean of samples, with its error."""
    error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Score(float(np.mean(samples)), error, list(samples))
