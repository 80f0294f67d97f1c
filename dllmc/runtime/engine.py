"""The engine: an artifact's programs over memory that it owns, decoding any number of requests in packed steps.

Between two steps requests come, go, and take each other's places (`dllmc.runtime.roster`); a step is composed of those
that run together, run, and committed. On a GPU the next step is composed while one runs, where nobody comes or goes and
no block ends, and begins behind it. Any thread may submit, wait, follow and cancel: one of those that wait runs the
next step, all others sleep until it is over.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from dllmc.artifact import Artifact
from dllmc.errors import CancelledError, DeadlineError, QueueFullError, RequestError, StepError
from dllmc.ir.program import PAGES
from dllmc.runtime import batch, likelihood, scheduler, warm_up
from dllmc.runtime.arena import Memory, require_weights
from dllmc.runtime.batch import Batch
from dllmc.runtime.buckets import Buckets
from dllmc.runtime.device import resolve
from dllmc.runtime.graphs import GraphExecutor, executors
from dllmc.runtime.handle import Request
from dllmc.runtime.kv_pool import KVPool
from dllmc.runtime.launch import Running, launch
from dllmc.runtime.likelihood import Score
from dllmc.runtime.metrics import Metrics, Stats
from dllmc.runtime.params import DENSE, CachePolicy, Prompt, SamplingParams, is_integer
from dllmc.runtime.request import GenerationResult, RequestState
from dllmc.runtime.roster import Entry, Roster
from dllmc.runtime.snapshot import Snapshot, snapshot
from dllmc.runtime.table import IntArray, Table
from dllmc.runtime.threads import Threads
from dllmc.runtime.tokenizer import load_tokenizer

T = TypeVar("T")
PromptLike = str | Sequence[int] | Prompt
OnStep = Callable[[tuple[Snapshot, ...]], object]

MAX_QUEUE = 1024
"""Requests that may wait in line, unless `load(max_queue=...)` says otherwise."""


class Engine:
    """A loaded artifact. All memory that steps use is allocated here, once: `artifact.memory["total"]` bytes.

    `tokenizer` is None where the artifact has none, or without transformers. `pool` is None where it was
    compiled without caches: then every step is dense. `lock` is held while requests change, never while a step runs.
    """

    def __init__(
        self,
        loaded: Artifact,
        scheduling: str = "multiplexed",
        max_queue: int = MAX_QUEUE,
        device: str | torch.device | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        buckets: bool | None = None,
        threads: int | str | None = None,
    ) -> None:
        """`dllmc.load` makes one, and says what `scheduling`, `max_queue`, `device` and `threads` are.

        weights: instead of the artifact's, by name, of their dtypes and shapes, dense and on that device. buckets:
        whether steps are padded to `dllmc.runtime.buckets`, which changes no token; None: on a GPU, which records them.
        """
        if scheduling not in scheduler.POLICIES:
            raise RequestError(f"scheduler is {scheduling!r}; expected one of {', '.join(scheduler.POLICIES)}")
        self._threads = Threads(threads)
        self.artifact = loaded
        self.spec = loaded.spec
        self.tokenizer = load_tokenizer(loaded.path, loaded.manifest["tokenizer"])
        self.max_queue = max_queue
        self.lock = threading.RLock()
        self._program = program = loaded.program
        self.pool: KVPool | None = None
        width = 0
        if program.caches:
            self.pool = KVPool(program.maxima[PAGES], program.page_tokens)
            width = program.inputs["page_table"].shape[1].constant
        self.device = resolve(device, loaded.device, str(loaded.path))
        programs = list(loaded.programs.values())
        if weights is None:
            weights = loaded.load_weights(self.device)
        require_weights(programs, weights, self.device)
        self.memory = Memory(programs, weights, self.device)
        self._executors = executors(loaded.programs, self.memory, self.spec.mask_id)
        padded = self.device.type != "cpu" if buckets is None else buckets
        self._buckets = Buckets.of(program.maxima) if padded else None
        positions = min(self.spec.max_positions, program.maxima["tokens"])
        self._table = Table(program.maxima["segments"], positions, width)
        self._roster = Roster(self._table, program.maxima, self.pool, scheduler.POLICIES[scheduling])
        self._metrics = Metrics()
        self._requests: dict[Entry, Request] = {}  # all that are not done
        self._cancelled: list[Request] = []  # during the step that runs
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._order = count()
        self._goes_ahead = any(isinstance(executor, GraphExecutor) for executor in self._executors.values())
        self._line: deque[Running] = deque()  # steps under way: the first runs, on a GPU another may be behind it
        self._last_end = 0.0
        self._driving = threading.Lock()  # held by the thread that runs a step
        self._changed = threading.Condition()  # told of each step, and of each request that comes
        self._changes = 0
        self._closed = False

    @property
    def steps(self) -> int:
        """Steps run so far."""
        return self._metrics.steps

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

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
        before anything runs, and `StepError` once the others are done. The line's limit does not hold here.

        `on_step` is called after each step with a `Snapshot` of every prompt that got on, in their order; decoding
        waits until it returns, and what it raises ends the call.
        """
        listed = _as_list(prompts)
        every = _one_each(params or SamplingParams(), len(listed), SamplingParams, "params")
        policies = _one_each(cache or DENSE, len(listed), CachePolicy, "cache")
        together = enumerate(zip(listed, every, policies, strict=True))
        states = [self._state(*given, f"prompt {index}") for index, given in together]
        requests = [self._enqueue(state, 0, None) for state in states]
        seen = [0] * len(requests)
        unfinished = list(range(len(requests)))
        try:
            while unfinished := [index for index in unfinished if not requests[index].done]:
                self._advance()
                if on_step is not None:
                    with self.lock:
                        on = [index for index in unfinished if states[index].step > seen[index]]
                        shown = tuple(snapshot(index, states[index]) for index in on)
                    for index in on:
                        seen[index] = states[index].step
                    if shown:
                        on_step(shown)
        finally:
            for index in unfinished:
                requests[index].cancel()
        return [request.result() for request in requests]

    def submit(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        cache: CachePolicy | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        """Put a request in line and return at once; it is decoded as it would be alone.

        Its steps are run by whoever waits for a result or an update, by `step`, or by an `AsyncEngine`. priority:
        requests of a higher one go first, and may take a place from others (`scheduler.LATENCY`). deadline: seconds
        from now, after which it ends with `DeadlineError` unless it is done.

        Raises `RequestError` where it can never be served, and `QueueFullError` where `max_queue` requests wait.
        """
        params, cache = params or SamplingParams(), cache or DENSE
        if not is_integer(priority):
            raise RequestError(f"priority is {priority!r}; expected an integer")
        if deadline is not None and not deadline > 0:
            raise RequestError(f"deadline is {deadline!r}; expected seconds from now, > 0, or None")
        state = self._state(prompt, params, cache, "the request")
        with self.lock:
            if self._roster.waiting >= self.max_queue:
                self._metrics.refused += 1
                raise QueueFullError(
                    f"{self._roster.waiting} requests are in line and {self._roster.running} running; expected less "
                    f"than max_queue = {self.max_queue} in line: wait for some, or load with a larger max_queue"
                )
            return self._enqueue(state, priority, deadline)

    def step(self) -> bool:
        """Run one step, or wait for the one that another thread runs. False if there is no request."""
        with self.lock:
            if not self._requests:
                return False
        self._advance()
        return True

    def warm_up(
        self, prompt_tokens: int = 512, params: SamplingParams | None = None, cache: CachePolicy | None = None
    ) -> int:
        """Record what a GPU runs for requests like this one, so that their first steps are as fast as later ones.

        As many as fit a step, and any number below, all in one phase; other steps are recorded when they have come
        twice. Takes about a second a shape, and changes no result. Returns how many were recorded: 0 on a CPU, which
        records nothing. Raises `RequestError` for a request that cannot be served.
        """
        prompt = Prompt([self.spec.mask_id] * prompt_tokens)
        like = self._state(prompt, params or SamplingParams(), cache or DENSE, "the request")
        if self._buckets is None:
            return 0
        recorded = 0
        try:
            with self._driving:
                for phase, sizes in warm_up.shapes(like, self._executors.keys(), self._program.name, self._buckets):
                    executor = self._executors[phase]
                    recorded += isinstance(executor, GraphExecutor) and executor.record(sizes)
        finally:
            self._tell()  # those who wait for a step, which this kept from running
        return recorded

    def stats(self) -> Stats:
        """What is in the engine now, and what it has done since it was loaded."""
        with self.lock:
            pages = self.pool.pages if self.pool is not None else 0
            used = pages - self.pool.free if self.pool is not None else 0
            roster = self._roster
            return self._metrics.snapshot(roster.waiting, roster.running, used, pages, roster.preemptions)

    def score(
        self,
        prompt: str | Sequence[int],
        completion: str | Sequence[int],
        samples: int = 128,
        seed: int = 0,
        cfg_scale: float = 0.0,
    ) -> Score:
        """Estimate the log-likelihood of a completion, in nats (`dllmc.runtime.likelihood`).

        Each sample is one forward pass with a random part of the completion masked; steps hold as many as fit. A
        completion may have as many tokens as a step has rows. Raises `RequestError`.
        """
        if samples < 1:
            raise RequestError(f"samples is {samples}; expected at least 1")
        given, ids = self._token_ids(prompt), self._token_ids(completion)
        if not ids:
            raise RequestError("the completion is empty (0 tokens); expected at least 1 token")
        length = len(ids)
        params = SamplingParams(
            gen_length=length, block_length=length, steps=1, ignore_eos=True, logprobs=True, cfg_scale=cfg_scale
        )
        masked = likelihood.masked_sets(length, samples, seed)
        prompts = []
        for offsets in masked:
            hidden = set(offsets.tolist())
            prompts.append(Prompt(given, {at: ids[at] for at in range(length) if at not in hidden}, ids))
        sums = [sum(result.logprobs or ()) for result in self.generate(prompts, params)]
        return likelihood.score([total * length / len(offsets) for total, offsets in zip(sums, masked, strict=True)])

    def close(self) -> None:
        """Cancel all requests and take no more."""
        with self.lock:
            self._closed = True
            requests = list(self._requests.values())
        for request in requests:
            self.cancel(request)
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self, request: Request) -> None:
        """See `Request.cancel`."""
        with self.lock:
            if request.done:
                return
            self._cancelled.append(request)
        if self._driving.acquire(blocking=False):  # else who runs a step does it, behind the step
            try:
                self._let_go()
            finally:
                self._driving.release()
            self._tell()

    def run_until(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        """Run steps, or let another thread, until something holds. Raises `TimeoutError` after so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"not done within {timeout} s")
            self._advance(left)

    def wait_for_requests(self, timeout: float | None = None) -> None:
        """Sleep until there is a request that is not done, or the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed, timeout)

    def _state(self, prompt: PromptLike, params: SamplingParams, cache: CachePolicy, where: str) -> RequestState:
        given = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        decode = None if self.tokenizer is None else self.tokenizer.decode
        try:
            ids = self._token_ids(given.content)
            state = RequestState(ids, params, self.spec, given.infill, given.reference, cache, decode)
            scheduler.require_admissible(state, self._program.maxima, self.pool, where)
        except RequestError as error:
            self._metrics.refused += 1
            message = str(error)
            raise RequestError(message if message.startswith(where) else f"{where}: {message}") from None
        return state

    def _token_ids(self, content: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(content, str):
            return content
        if self.tokenizer is None:
            raise RequestError(
                "the prompt is text, but there is no tokenizer (or transformers is not installed); give token ids"
            )
        return self.tokenizer.encode(content)

    def _enqueue(self, state: RequestState, priority: int, deadline: float | None) -> Request:
        now = time.monotonic()
        entry = Entry(state, scheduler.due(now, priority, deadline))
        request = Request(self, entry)
        with self.lock:
            if self._closed:
                raise CancelledError("the engine is closed; load the artifact again")
            if state.finished:  # nothing is masked
                self._finish(request)
                return request
            self._requests[entry] = request
            self._roster.add(entry)
            if deadline is not None:
                heapq.heappush(self._deadlines, (now + deadline, next(self._order), request))
                if len(self._deadlines) > 2 * len(self._requests) + MAX_QUEUE:
                    self._deadlines = sorted(each for each in self._deadlines if not each[2].done)
        self._tell()
        return request

    def _advance(self, timeout: float | None = None) -> None:
        """Run a step, or sleep until another thread has run one."""
        seen = self._changes
        if self._driving.acquire(blocking=False):
            try:
                self._run_next()
            finally:
                self._driving.release()
                self._tell()
        else:
            with self._changed:
                self._changed.wait_for(lambda: self._changes != seen, timeout)

    def _tell(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def _run_next(self) -> None:
        self._let_go()
        with self.lock:
            rows = self._roster.next(time.monotonic()) if not self._line else self._line[0].step.rows
        if rows.size:
            self._run(rows)
        self._let_go()

    def _run(self, rows: IntArray, alone: bool = False) -> None:
        """Run a step of these rows, or end the first in line, which is theirs.

        If it fails to begin, each row runs alone, so that only those are lost that fail. Interrupted, it stays in line.
        """
        start = time.perf_counter()
        if not self._line:
            try:
                self._line.append(self._launch(self._compose(rows)))
            except Exception as error:
                if rows.size == 1:
                    self._fail(rows, error)
                else:
                    for row in rows:
                        self._run(rows[rows == row], alone=True)
                return
        running = self._line[0]
        step = running.step
        ahead = self._ahead_of(step) if self._goes_ahead and not alone and len(self._line) == 1 else None
        if step.certain:
            self._launch_ahead(ahead)
        try:
            commits = running.wait()
        except Exception as error:
            self._give_up()
            self._fail(rows, error)
            return
        with self.lock:
            full = step.commit(commits)
            self._line.popleft()
        if ahead is not None and not step.certain and not full.size:
            self._launch_ahead(ahead.renewed())
        now = time.perf_counter()
        with self.lock:
            self._metrics.stepped(step.phase, now - max(start, self._last_end), commits.token.size)
            self._last_end = now
            for entry in self._roster.at(full):
                entry.state.leave_full_blocks()
                if entry.state.finished:
                    self._finish(self._requests[entry])

    def _compose(self, rows: IntArray) -> Batch:
        most, has_cache = self._program.maxima["rows"], self.pool is not None
        return batch.compose(self._table, rows, most, self.spec.mask_id, has_cache, self._buckets)

    def _launch(self, step: Batch) -> Running:
        self._threads.before_step()
        try:
            return launch(step, self._executors.get(step.phase) or self._executors[self._program.name])
        except BaseException:
            self._table.fresh[step.rows] = True  # a GPU may have got as far as to commit
            raise

    def _ahead_of(self, step: Batch) -> Batch | None:
        """The step behind one that runs on a GPU; None where it is open: a block ends, or someone came or went.

        Nor is there one of requests of which the GPU is to be told, since the host does not know yet what that one
        commits. If composing it fails, that is left to be found when it is due.
        """
        with self.lock, step.foreseen(), suppress(Exception):
            rows = self._roster.ahead()
            if rows.size and self._table.left[step.rows].all() and not self._table.fresh[rows].any():
                return self._compose(rows)
        return None

    def _launch_ahead(self, step: Batch | None) -> None:
        """Begin a step behind one that runs; if it fails, that too is left."""
        if step is not None:
            with suppress(Exception):
                self._line.append(self._launch(step))
                self._roster.ran(step.rows)

    def _give_up(self) -> None:
        """Wait for what is in line, whose commits are lost."""
        while self._line:
            with suppress(Exception):
                self._line.popleft().wait()
        self._table.fresh[:] = True

    def _let_go(self) -> None:
        """Take out who was cancelled or is late, and wait for steps that are nobody's any more. None is being run."""
        with self.lock:
            self._drop_cancelled()
            self._drop_late(time.monotonic())
        while self._line and not self._roster.at(self._line[0].step.rows):
            with suppress(Exception):  # which no request is there to be told of
                self._line.popleft().wait()

    def _fail(self, rows: IntArray, error: Exception) -> None:
        """End the requests at these rows, whose step failed."""
        with self.lock:
            for entry in self._roster.at(rows):
                failed = StepError(f"the request's step {entry.state.step} failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                self._metrics.failed += 1
                self._end(self._requests[entry], failed)

    def _finish(self, request: Request) -> None:
        self._metrics.finished += 1
        self._end(request, None)

    def _end(self, request: Request, error: Exception | None) -> None:
        """Take a request out, done: with an error, or with its result."""
        entry = request.entry
        if self._requests.pop(entry, None) is not None:
            self._roster.remove(entry)
        request.end(entry.state.result() if error is None else error)

    def _drop_cancelled(self) -> None:
        for request in self._cancelled:
            if not request.done:
                self._metrics.cancelled += 1
                self._end(request, CancelledError("the request was cancelled"))
        self._cancelled.clear()

    def _drop_late(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if not request.done:
                state = request.entry.state
                self._metrics.cancelled += 1
                masked = int(state.masked.sum())
                self._end(
                    request,
                    DeadlineError(
                        f"the deadline passed with {masked} positions masked, after {state.step} forward passes; "
                        "give it more time or a higher priority"
                    ),
                )


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
