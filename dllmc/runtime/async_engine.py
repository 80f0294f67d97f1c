"""The engine for asyncio: one thread of its own runs steps, coroutines wait for what they want of them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from dllmc.runtime.engine import Engine, PromptLike
from dllmc.runtime.handle import Progress, Update
from dllmc.runtime.params import CachePolicy, SamplingParams
from dllmc.runtime.request import GenerationResult


class AsyncEngine:
    """An engine whose steps run in a thread while there are requests. Used in one event loop, as `async with`.

    Leaving it closes the engine too: requests that are not done end with `CancelledError`, and no step runs any more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stepped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dllmc steps", daemon=True)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all requests, and wait for the step that runs."""
        self.engine.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def generate(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        cache: CachePolicy | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> GenerationResult:
        """Decode one prompt; see `Engine.submit`. A coroutine that is cancelled cancels its request."""
        request = self.engine.submit(prompt, params, cache, priority=priority, deadline=deadline)
        try:
            while not request.done:
                await self._next_step()
            return request.result()
        finally:
            request.cancel()

    async def stream(
        self,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        cache: CachePolicy | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> AsyncIterator[Update]:
        """Yield one prompt's tokens as they are committed; see `Request.stream`. Leaving it cancels the request."""
        request = self.engine.submit(prompt, params, cache, priority=priority, deadline=deadline)
        progress = Progress(request)
        try:
            while True:
                while not progress.has_more():
                    await self._next_step()
                yield (update := progress.update())
                if update.finished:
                    return
        finally:
            request.cancel()

    async def _next_step(self) -> None:
        """Until a step is over. What was missed between two calls is seen by the caller, who looks before it waits."""
        self._stepped.clear()
        await self._stepped.wait()

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self.engine.closed:
                if not self.engine.step():
                    self.engine.wait_for_requests()
                self._loop.call_soon_threadsafe(self._stepped.set)
        finally:  # nobody waits for a thread that is no more
            self.engine.close()
            self._loop.call_soon_threadsafe(self._stepped.set)
