"""The engine: an artifact's program over memory that it owns, decoding any number of requests in packed steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.errors import BudgetError, RequestError
from dllmc.ir.program import PAGES
from dllmc.runtime import batch, scheduler
from dllmc.runtime.arena import Memory
from dllmc.runtime.executor import Executor
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.params import DENSE, CachePolicy, Prompt, SamplingParams
from dllmc.runtime.request import GenerationResult, Request
from dllmc.runtime.snapshot import Snapshot, snapshot
from dllmc.runtime.tokenizer import load_tokenizer

T = TypeVar("T")
PromptLike = str | Sequence[int] | Prompt
OnStep = Callable[[tuple[Snapshot, ...]], object]


class Engine:
    """A loaded artifact. All memory that steps use is allocated here, once: `artifact.memory["total"]` bytes.

    `steps` counts the steps run so far; `tokenizer` is None where the artifact has none. `pool` is None where it was
    compiled without caches: then every step is dense.
    """

    def __init__(self, loaded: Artifact) -> None:
        self.artifact = loaded
        self.spec = loaded.spec
        self.tokenizer = load_tokenizer(loaded.path) if loaded.manifest["tokenizer"] else None
        self.steps = 0
        self._program = program = loaded.program
        self.pool: KVPool | None = None
        self._table_width = 0
        if program.caches:
            self.pool = KVPool(program.maxima[PAGES], program.page_tokens)
            self._table_width = program.inputs["page_table"].shape[1].constant
        self.memory = Memory(list(loaded.programs.values()), loaded.load_weights())
        self._executors = {name: Executor(each, self.memory) for name, each in loaded.programs.items()}

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        cache: CachePolicy | Sequence[CachePolicy] | None = None,
        on_step: OnStep | None = None,
    ) -> list[GenerationResult]:
        """Decode prompts together, each as it would be decoded alone; results in the order of the prompts.

        A prompt is text, token ids, or a `Prompt`; one prompt may be given without a list around it. `params` and
        `cache` hold for all prompts, or are one for each; without `cache` every step is dense. Raises `RequestError`
        before anything runs.

        `on_step` is called after each step with a `Snapshot` of every request that was in it, in the order in which
        they joined; decoding waits until it returns, and what it raises ends the call.
        """
        listed = _as_list(prompts)
        every = _one_each(params or SamplingParams(), len(listed), SamplingParams, "params")
        policies = _one_each(cache or DENSE, len(listed), CachePolicy, "cache")
        together = enumerate(zip(listed, every, policies, strict=True))
        requests = [self._request(*given, index) for index, given in together]
        self._decode(requests, on_step)
        return [self._result(request) for request in requests]

    def _request(self, prompt: PromptLike, params: SamplingParams, cache: CachePolicy, index: int) -> Request:
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        where = f"prompt {index}"
        try:
            request = Request(self._token_ids(given.content), params, self.spec, given.infill, given.reference, cache)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        scheduler.require_admissible(request, self._program.maxima, self.pool, where)
        return request

    def _token_ids(self, content: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(content, str):
            return content
        if self.tokenizer is None:
            raise RequestError("the prompt is text, but the artifact has no tokenizer; give token ids")
        return self.tokenizer.encode(content)

    def _decode(self, requests: Sequence[Request], on_step: OnStep | None) -> None:
        index_of = {request: index for index, request in enumerate(requests)}
        unfinished = [request for request in requests if not request.finished]
        try:
            while unfinished:
                together = scheduler.next_step(unfinished, self._program.maxima, self.pool)
                self._step(together)
                if on_step is not None:
                    on_step(tuple(snapshot(index_of[request], request) for request in together))
                unfinished = [request for request in unfinished if not request.finished]
        finally:
            for request in unfinished:
                self._release(request)

    def _step(self, requests: Sequence[Request]) -> None:
        step = batch.compose(requests, self._program.maxima["rows"], self.pool, self._table_width)
        executor = self._executors.get(step.phase) or self._executors[self._program.name]
        step.commit(**executor.run(step.sizes, step.inputs))
        self.steps += 1
        for request in requests:
            if request.finished or not request.step_in_block:  # a cache serves one block
                self._release(request)

    def _release(self, request: Request) -> None:
        for side in range(request.sides):
            if self.pool is not None:
                self.pool.release((request, side))

    def _result(self, request: Request) -> GenerationResult:
        result = request.result()
        return result if self.tokenizer is None else replace(result, text=self.tokenizer.decode(result.token_ids))


def load(path: str | Path, memory_budget: int | None = None) -> Engine:
    """Open an artifact and allocate what its plan says: `artifact.memory["total"]` bytes.

    `memory_budget`: the most bytes that may be; the KV pool has what weights, arena and state leave of it. None: the
    pool is as large as it was compiled. Raises `ArtifactError`, or `BudgetError` where not a page is left.
    """
    opened = artifact.read(path)
    if memory_budget is None:
        return Engine(opened)
    fixed = opened.memory["total"] - opened.memory["kv_pool"]
    page = max(program.page_bytes for program in opened.programs.values())
    if fixed + page > memory_budget:
        parts = ", ".join(f"{name} {opened.memory[name]}" for name in ("weights", "arena", "state"))
        raise BudgetError(
            f"{path}: expected a memory budget of {fixed + page} bytes or more ({parts}, a page of the KV pool "
            f"{page}), found {memory_budget}; compile with a memory budget to have a smaller arena"
        )
    return Engine(opened.with_pages((memory_budget - fixed) // page) if page else opened)


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
