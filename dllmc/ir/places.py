"""What a GPU is told of each request in a step, and what it keeps of requests from one step to the next.

With it a GPU picks a step's rows and commits what they predict, within the step (`dllmc.ops.kernels.commit`), so that
a next one can be composed, and even begun, before the host knows what this one committed.

    places     int64 [segments, WIDTH]: the step's segments, given with each step, before the program's inputs
    counts     int32 [segments]: candidates of each, found in the step
    committed  int32 [2, rows]: of each row its token if it is committed, else -1; and the bits of its float32 logprob
    sequences  int32 [segments, 2, tokens]: of each row of `dllmc.runtime.table.Table`, a request's, its token ids, -1
               where nothing is committed yet; and those of its reference, -1 where it has none
    unread     int64: room for an input that a program does without

All lie in the state of an engine, before the inputs of its programs.
"""

from collections.abc import Mapping

from dllmc.spec import MAX_DEFER_TOKENS

SIDES, ROW, START, END, ORIGIN, TWIN_ORIGIN, TWIN, COUNT, THRESHOLD, GUIDANCE, DEFERRED = range(11)
"""Columns of `places`:

SIDES        1, or 2 with guidance; 0 where there is no request, -1 of a request's second segment
ROW          the request's, in `sequences`
START, END   positions that may be committed, half-open; none in a step that commits nothing
ORIGIN       which packed token is the sequence's first, or would be; TWIN_ORIGIN: the same in the second segment
TWIN         the second segment
COUNT        how many tokens are committed, if THRESHOLD is +inf
THRESHOLD    bits of a float32: which confidence suffices, of one token at least
GUIDANCE     bits of a float32: the scale
DEFERRED     and all behind: tokens that are committed last, filled up with -1
"""

WIDTH = DEFERRED + MAX_DEFER_TOKENS


def shapes(maxima: Mapping[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each at its largest, in their order in memory: what is given comes last."""
    segments = maxima["segments"]
    return {
        "sequences": ("int32", (segments, 2, maxima["tokens"])),
        "committed": ("int32", (2, maxima["rows"])),
        "counts": ("int32", (segments,)),
        "unread": ("int64", (2 * segments + maxima["rows"] + maxima["guided"],)),
        "places": ("int64", (segments, WIDTH)),
    }
