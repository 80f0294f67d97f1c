"""What a viewer sees of a request after a step: copied facts, so that a viewer can keep them and change nothing."""

from dataclasses import dataclass

from dllmc.runtime.request import RequestState


@dataclass(frozen=True)
class Snapshot:
    """A request after a step. Its lists have an entry for each position of the generation region.

    Once it is finished they have one for each token of the completion, which a stop token may have made shorter.
    """

    index: int
    """Which of the prompts of the call it decodes, from 0."""

    token_ids: list[int]
    """Token ids; the model's mask where nothing is committed yet."""

    masked: list[bool]
    """Where nothing is committed yet. Positions say it: a committed token may be the mask token."""

    logprobs: list[float] | None
    """Natural log of each committed token's probability, 0.0 elsewhere; None unless the params ask for `logprobs`."""

    block: tuple[int, int]
    """The current block, half-open, from 0 at the first position of the generation region."""

    forward_passes: int
    """Steps that the request has taken."""

    finished: bool
    """Whether this step was its last."""


def snapshot(index: int, request: RequestState) -> Snapshot:
    """The request as it is now; it may be finished. `index`: of its prompt in the call."""
    start = request.prompt_length
    block = request.start - start, request.end - start
    if request.finished:
        result = request.result()
        none_masked = [False] * len(result.token_ids)
        return Snapshot(index, result.token_ids, none_masked, result.logprobs, block, request.step, True)
    logprobs = request.logprobs
    return Snapshot(
        index=index,
        token_ids=request.token_ids[start:].tolist(),
        masked=request.masked[start:].tolist(),
        logprobs=None if logprobs is None else logprobs[start:].tolist(),
        block=block,
        forward_passes=request.step,
        finished=False,
    )
