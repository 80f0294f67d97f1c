"""Which candidates of a step are committed, for all of its requests at once (semantics.md, "Commit").

`decode_head` gives each row of the head a token and a confidence; a row belongs to one request, its segment.
Every decision is a sort and a few gathers over rows: no loop over requests, no dependence between segments.
"""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


def select_commits(
    segment: IntArray,
    confidence: FloatArray,
    deferred: BoolArray,
    count: IntArray,
    threshold: FloatArray,
) -> BoolArray:
    """Select the rows to commit: [rows] bool. A segment's rows come by ascending position.

    Rows of a segment rank by descending confidence, NaN last; ties by ascending position. A segment whose
    threshold is +inf commits its `count` best rows; any other commits each row with confidence >= threshold, and
    always its best one. Deferred rows count as confidence -inf, unless all rows of their segment are deferred.

    segment: [rows] in [0, segments). confidence: [rows]. deferred: [rows], from `deferred_choices`.
    count, threshold: [segments].
    """
    rows = np.bincount(segment, minlength=count.size)
    if deferred.any():
        undeferred = np.bincount(segment[~deferred], minlength=count.size)
        confidence = np.where(deferred & (undeferred[segment] > 0), np.float32(-np.inf), confidence)

    order = np.argsort(_keys(segment, confidence), kind="stable")
    first = np.cumsum(rows) - rows
    rank = np.empty(segment.size, np.int64)
    rank[order] = np.arange(segment.size) - first[segment[order]]

    fixed = np.isposinf(threshold)[segment]
    confident = (confidence >= threshold[segment]) | (rank == 0)
    return np.where(fixed, rank < count[segment], confident)


def _keys(segment: IntArray, confidence: FloatArray) -> IntArray:
    """One integer a row, [rows]: ascending by segment, then by descending confidence, NaN last.

    A float32's bits, as an integer, are in its order once those of negative numbers are turned round (IEEE 754).
    """
    descending = np.float32(0) - confidence  # and not -confidence, which is -0.0 for 0.0
    bits = descending.view(np.int32).astype(np.int64)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    bits[np.isnan(confidence)] = 0x7FFFFFFF
    keys: IntArray = (segment << 32) + bits
    return keys


def deferred_choices(segment: IntArray, token: IntArray, defer_tokens: IntArray) -> BoolArray:
    """Mark the rows whose chosen token their own request defers: [rows] bool.

    segment: [rows]. token: [rows], ids >= 0. defer_tokens: [segments, most], ids, -1 where there are fewer.
    """
    found = np.zeros(segment.size, np.bool_)
    if (defer_tokens >= 0).any():
        found[:] = (token[:, None] == defer_tokens[segment]).any(axis=1)
    return found
