"""Which waiting requests join the running ones: first come, first served, within the program's limits."""

from collections.abc import Mapping, Sequence

from dllmc.errors import RequestError
from dllmc.ir.program import SYMBOLS
from dllmc.runtime.request import Request

Demand = Mapping[str, int]


def demand(request: Request) -> Demand:
    """What a request may take of a step at most, in the program's symbols."""
    passes = 2 if request.params.cfg_scale else 1
    block = min(request.params.block_length, request.params.gen_length)
    tokens = len(request.token_ids) * passes
    return {"tokens": tokens, "rows": block, "guided": block * (passes - 1), "segments": passes}


def require_admissible(request: Request, limits: Demand, where: str) -> None:
    """Raise `RequestError`, with the numbers, for a request that no step of the program can hold."""
    wanted = demand(request)
    options = {
        "tokens": "max_tokens_per_step",
        "rows": "max_logit_rows",
        "guided": "max_logit_rows",
        "segments": "max_requests",
    }
    for symbol, option in options.items():
        if wanted[symbol] > limits[symbol]:
            raise RequestError(
                f"{where}: needs {wanted[symbol]} {symbol} a step, but the artifact was compiled for "
                f"{limits[symbol]}; shorten the request, or compile with {option} >= {wanted[symbol]}"
            )


def admitted(waiting: Sequence[Request], running: Sequence[Request], limits: Demand) -> int:
    """How many requests at the head of the queue fit into a step beside the running ones."""
    used = {symbol: sum(demand(r)[symbol] for r in running) for symbol in SYMBOLS}
    for index, request in enumerate(waiting):
        wanted = demand(request)
        used = {symbol: used[symbol] + wanted[symbol] for symbol in SYMBOLS}
        if any(used[symbol] > limits[symbol] for symbol in SYMBOLS):
            return index
    return len(waiting)
