"""A back-off n-gram model, interpolated Kneser-Ney (Kneser & Ney, 1995; Chen & Goodman, 1999): the bar to clear."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


class KneserNey:
    """P(token | the order - 1 tokens before it), from a stream of token ids below `vocab`.

    The highest order counts occurrences; each lower one counts the distinct tokens that precede an n-gram. One
    discount an order, n1 / (n1 + 2 n2) from its own counts of counts; the lowest order is mixed with 1 / vocab.
    """

    def __init__(self, stream: Ids, order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        self._tables = [self._table(stream, n) for n in range(1, order + 1)]

    def probabilities(self, stream: Ids) -> Probabilities:
        """[len(stream) - order + 1]: of each token that has order - 1 tokens before it."""
        p = np.full(len(stream) - self.order + 1, 1 / self.vocab)
        for n, (grams, counts, contexts, totals, kinds, discount) in enumerate(self._tables, start=1):
            windows = _windows(stream, n)[self.order - n :]
            seen = _look_up(grams, _keys(windows, self.vocab), counts)
            context = _keys(windows[:, :-1], self.vocab)
            total, kind = _look_up(contexts, context, totals), _look_up(contexts, context, kinds)
            known = total > 0
            mixed = (np.maximum(seen - discount, 0) + discount * kind * p) / np.where(known, total, 1)
            p = np.where(known, mixed, p)
        return p

    def _table(self, stream: Ids, n: int) -> tuple[Ids, Ids, Ids, Ids, Ids, float]:
        """N-grams and their counts; contexts, the sums of their counts and how many tokens follow each; discount."""
        if n == self.order:
            windows = _windows(stream, n)
        else:  # what counts is how many different tokens precede
            longer = _windows(stream, n + 1)
            windows = longer[np.unique(_keys(longer, self.vocab), return_index=True)[1]][:, 1:]
        keys, first, counts = np.unique(_keys(windows, self.vocab), return_index=True, return_counts=True)
        contexts, inverse, kinds = np.unique(
            _keys(windows[first][:, :-1], self.vocab), return_inverse=True, return_counts=True
        )
        totals = np.bincount(inverse, weights=counts).astype(np.int64)
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        return keys, counts, contexts, totals, kinds, once / (once + 2 * twice)


def _windows(stream: Ids, n: int) -> Ids:
    return np.lib.stride_tricks.sliding_window_view(stream, n)


def _keys(grams: Ids, vocab: int) -> Ids:
    """One integer a row; exact while vocab ** n fits 63 bits."""
    keys = np.zeros(len(grams), np.int64)
    for column in range(grams.shape[1]):
        keys = keys * vocab + grams[:, column]
    return keys


def _look_up(keys: Ids, wanted: Ids, values: Ids) -> Ids:
    """`values` where a wanted key is among the sorted keys, else 0."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
