"""The engine: an artifact's program over memory that it owns, decoding any number of requests in packed steps."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.errors import BudgetError, RequestError
from dllmc.runtime import batch, scheduler
from dllmc.runtime.executor import Executor
from dllmc.runtime.params import CachePolicy, Prompt, SamplingParams
from dllmc.runtime.request import GenerationResult, Request
from dllmc.runtime.snapshot import Snapshot, snapshot
from dllmc.runtime.tokenizer import load_tokenizer

T = TypeVar("T")
PromptLike = str | Sequence[int] | Prompt
OnStep = Callable[[tuple[Snapshot, ...]], object]


class Engine:
    """A loaded artifact. All memory that steps use is allocated here, once: `artifact.memory["total"]` bytes.

    `steps` counts the steps run so far; `tokenizer` is None where the artifact has none.
    """

    def __init__(self, loaded: Artifact) -> None:
        self.artifact = loaded
        self.spec = loaded.spec
        self.tokenizer = load_tokenizer(loaded.path) if loaded.manifest["tokenizer"] else None
        self.steps = 0
        self._executor = Executor(loaded.programs["dense"], loaded.load_weights())

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        cache: CachePolicy | Sequence[CachePolicy] | None = None,
        on_step: OnStep | None = None,
    ) -> list[GenerationResult]:
        """Decode prompts together, each as it would be decoded alone; results in the order of the prompts.

        A prompt is text, token ids, or a `Prompt`; one prompt may be given without a list around it. `params` and
        `cache` hold for all prompts, or are one for each. Raises `RequestError` before anything runs.

        `on_step` is called after each step with a `Snapshot` of every request that was in it, in the order in which
        they joined; decoding waits until it returns, and what it raises ends the call.
        """
        listed = _as_list(prompts)
        every = _one_each(params or SamplingParams(), len(listed), SamplingParams, "params")
        _one_each(cache or CachePolicy(), len(listed), CachePolicy, "cache")
        requests = [self._request(p, s, index) for index, (p, s) in enumerate(zip(listed, every, strict=True))]
        self._decode(requests, on_step)
        return [self._result(request) for request in requests]

    def _request(self, prompt: PromptLike, params: SamplingParams, index: int) -> Request:
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        where = f"prompt {index}"
        try:
            request = Request(self._token_ids(given.content), params, self.spec, given.infill, given.reference)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        scheduler.require_admissible(request, self._executor.program.maxima, where)
        return request

    def _token_ids(self, content: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(content, str):
            return content
        if self.tokenizer is None:
            raise RequestError("the prompt is text, but the artifact has no tokenizer; give token ids")
        return self.tokenizer.encode(content)

    def _decode(self, requests: Sequence[Request], on_step: OnStep | None) -> None:
        limits = self._executor.program.maxima
        index_of = {request: index for index, request in enumerate(requests)}
        waiting = deque(request for request in requests if not request.finished)
        running: list[Request] = []
        while waiting or running:
            joining = scheduler.admitted(waiting, running, limits)
            running += [waiting.popleft() for _ in range(joining)]
            step = batch.compose(running, limits["rows"])
            step.commit(**self._executor.run(step.sizes, step.inputs))
            self.steps += 1
            if on_step is not None:
                on_step(tuple(snapshot(index_of[request], request) for request in running))
            running = [request for request in running if not request.finished]

    def _result(self, request: Request) -> GenerationResult:
        result = request.result()
        return result if self.tokenizer is None else replace(result, text=self.tokenizer.decode(result.token_ids))


def load(path: str | Path, memory_budget: int | None = None) -> Engine:
    """Open an artifact and allocate what its plan says: `artifact.memory["total"]` bytes, whatever the budget.

    `memory_budget`: the most bytes that may be. Raises `ArtifactError`, or `BudgetError` where the plan takes more.
    """
    opened = artifact.read(path)
    if memory_budget is not None and opened.memory["total"] > memory_budget:
        parts = ", ".join(f"{name} {opened.memory[name]}" for name in ("weights", "arena", "kv_pool", "state"))
        raise BudgetError(
            f"{path}: expected a memory budget of {opened.memory['total']} bytes or more ({parts}), found "
            f"{memory_budget}; compile with a memory budget to have a smaller arena"
        )
    return Engine(opened)


def _as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    if isinstance(prompts, str | Prompt):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed


def _one_each(given: T | Sequence[T], count: int, kind: type[T], what: str) -> list[T]:
    listed = [given] * count if isinstance(given, kind) else list(given) if isinstance(given, Sequence) else []
    if len(listed) != count or not all(isinstance(item, kind) for item in listed):
        raise RequestError(f"{what}: expected one {kind.__name__}, or {count} of them, one a prompt; found {given!r}")
    return listed
