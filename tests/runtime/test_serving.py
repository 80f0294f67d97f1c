"""Requests that come and go: handles, streams, stop strings, cancels, deadlines, failures, threads, asyncio."""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dllmc
from dllmc.errors import CancelledError, DeadlineError, QueueFullError, RequestError, StepError
from dllmc.runtime.executor import Executor
from tests.golden.cases import ROOT

FOLDER = "llada-mha"
SUDOKU = "sudoku:\n1003\n0300\n3210\n4132\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with room for few requests at once."""
    options = dllmc.CompileOptions(max_tokens_per_step=180, max_requests=4, max_logit_rows=14)
    return dllmc.compile(ROOT / FOLDER, tmp_path_factory.mktemp("serving") / "small", options).path


@pytest.fixture
def engine(small: Path) -> Iterator[dllmc.Engine]:
    """A fresh one; whatever a test did to it, all pages are free in the end."""
    with dllmc.load(small) as engine:
        yield engine
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_in_use) == (0, 0, 0)


def params(**values: Any) -> dllmc.SamplingParams:
    return dllmc.SamplingParams(**{"gen_length": 18, "block_length": 6, "ignore_eos": True, **values})


def prompt(index: int) -> list[int]:
    return [(7 * index + 13 * j) % 480 for j in range(1 + 5 * index % 40)]


CACHE = dllmc.CachePolicy()


def test_a_request_is_decoded_while_its_result_is_waited_for(engine: dllmc.Engine) -> None:
    request = engine.submit(prompt(3), params(), CACHE)
    assert (request.status, request.done) == ("waiting", False)
    assert engine.step()
    assert request.status == "running"
    [expected] = engine.generate(prompt(3), params(), CACHE)
    assert request.result() == expected
    assert (request.status, request.done) == ("finished", True)
    assert not engine.step()


def test_waiting_for_one_runs_the_others(engine: dllmc.Engine) -> None:
    requests = [engine.submit(prompt(index), params(seed=index, temperature=1.0)) for index in range(9)]
    requests[8].result()
    assert sum(request.done for request in requests) >= 6
    expected = [engine.generate(prompt(index), params(seed=index, temperature=1.0))[0] for index in range(9)]
    assert [request.result() for request in requests] == expected


def test_result_gives_up_after_its_timeout_and_the_request_goes_on(engine: dllmc.Engine) -> None:
    request = engine.submit(prompt(3), params())
    with pytest.raises(TimeoutError, match=r"not done within 0\.0 s"):
        request.result(timeout=0.0)
    assert request.result(timeout=60).token_ids


def test_a_stream_has_every_token_once_and_texts_add_up(tiny_llada: Path) -> None:
    engine = dllmc.load(tiny_llada)
    asked = dllmc.SamplingParams(gen_length=24, block_length=8, steps=9, ignore_eos=True, logprobs=True)
    given = dllmc.Prompt(SUDOKU, infill={3: 5})
    updates = list(engine.submit(given, asked).stream())
    [result] = engine.generate(given, asked)
    found = {p: (t, q) for u in updates for p, t, q in zip(u.positions, u.token_ids, u.logprobs or [], strict=True)}
    assert result.logprobs is not None
    expected = dict(enumerate(zip(result.token_ids, result.logprobs, strict=True)))
    del expected[3]
    assert found == expected
    assert sum(len(update.positions) for update in updates) == 23
    assert [update.finished for update in updates] == [False] * 8 + [True]
    assert [bool(update.text) for update in updates] == [False, False, True] * 3
    assert "".join(update.text for update in updates) == result.text


def test_a_stream_that_begins_late_begins_with_the_first_token(engine: dllmc.Engine) -> None:
    request = engine.submit(prompt(3), params())
    while engine.step():
        pass
    [update] = request.stream()
    assert update.token_ids == request.result().token_ids
    assert update.positions == list(range(18))


def test_what_a_stop_token_cuts_off_is_not_in_the_last_update(engine: dllmc.Engine) -> None:
    [free] = engine.generate(prompt(3), params())
    asked = params(stop_token_ids=[free.token_ids[8]])
    updates = list(engine.submit(prompt(3), asked).stream())
    assert (
        engine.generate(prompt(3), asked)[0].token_ids == free.token_ids[: free.token_ids.index(free.token_ids[8]) + 1]
    )
    assert max(updates[-1].positions, default=0) <= 8


def test_stop_strings_end_decoding_with_their_block(tiny_llada: Path) -> None:
    """Text is cut before the first of them, tokens behind the one that completes it; streams never show one."""
    engine = dllmc.load(tiny_llada)
    asked = {"gen_length": 24, "block_length": 4, "ignore_eos": True}
    [free] = engine.generate(SUDOKU, dllmc.SamplingParams(**asked))  # type: ignore[arg-type]
    assert free.text is not None
    for begin, length in itertools.product((1, 4, 6, 9, 13), (1, 3, 5)):
        stop = free.text[begin : begin + length]
        at = free.text.index(stop)
        asked_too = dllmc.SamplingParams(**asked, stop=["never", stop])  # type: ignore[arg-type]
        [result] = engine.generate(SUDOKU, asked_too)
        assert result.text == free.text[:at]
        assert result.finish_reason == "stop"
        assert result.token_ids == free.token_ids[: at + len(stop)]  # a character a token
        assert result.forward_passes == -(-(at + len(stop)) // 4) * 4
        assert "".join(update.text for update in engine.submit(SUDOKU, asked_too).stream()) == result.text


def test_a_stop_string_needs_a_tokenizer(engine: dllmc.Engine) -> None:
    assert params(stop="x").stop == ("x",)
    with pytest.raises(RequestError, match=r"stop is \('x',\), but the artifact has no tokenizer; give stop_token_ids"):
        engine.submit(prompt(1), params(stop="x"))
    with pytest.raises(RequestError, match=r"SamplingParams\.stop is \[''\]; expected a text, or a list of texts"):
        params(stop=[""])


def test_cancelling_frees_a_place_and_its_pages_at_once(engine: dllmc.Engine) -> None:
    requests = [engine.submit(prompt(index), params(), CACHE) for index in range(6)]
    for _ in range(3):
        engine.step()
    before = engine.stats()
    assert (before.running, before.waiting) == (4, 2)
    requests[1].cancel()
    requests[5].cancel()
    requests[5].cancel()
    after = engine.stats()
    assert (after.running, after.waiting, after.cancelled) == (3, 1, 2)
    assert after.pages_in_use < before.pages_in_use
    with pytest.raises(CancelledError, match="cancelled"):
        requests[1].result()
    with pytest.raises(CancelledError):
        list(requests[5].stream())
    assert requests[1].status == "cancelled"
    for index in (0, 2, 3, 4):
        assert [requests[index].result()] == engine.generate(prompt(index), params(), CACHE)
    requests[0].cancel()
    assert requests[0].status == "finished"


def test_a_deadline_that_passes_ends_a_request(engine: dllmc.Engine) -> None:
    late = engine.submit(prompt(3), params(), deadline=1e-4)
    other = engine.submit(prompt(4), params(), deadline=600)
    time.sleep(0.01)
    with pytest.raises(DeadlineError, match="deadline passed with 18 positions masked, after 0 forward passes"):
        late.result()
    assert [other.result()] == engine.generate(prompt(4), params())
    for bad in (0, -1.0, math.nan):
        with pytest.raises(RequestError, match="deadline is"):
            engine.submit(prompt(3), params(), deadline=bad)


def test_a_full_line_takes_no_more(small: Path) -> None:
    engine = dllmc.load(small, max_queue=3)
    requests = [engine.submit(prompt(1), params()) for _ in range(3)]
    with pytest.raises(QueueFullError, match=r"3 requests are in line and 0 running; expected less than max_queue = 3"):
        engine.submit(prompt(1), params())
    engine.step()
    requests += [engine.submit(prompt(1), params()) for _ in range(3)]
    assert len({tuple(request.result().token_ids) for request in requests}) == 1
    assert engine.stats().refused == 1


def test_what_can_never_run_is_refused_when_it_is_submitted(engine: dllmc.Engine) -> None:
    with pytest.raises(RequestError, match=r"the request: needs 188 tokens a step, .* 180;"):
        engine.submit([1] * 170, params())
    with pytest.raises(RequestError, match="priority is 'high'; expected an integer"):
        engine.submit([1], params(), priority="high")  # type: ignore[arg-type]
    assert engine.stats().refused == 1


def test_a_more_urgent_request_takes_a_place(engine: dllmc.Engine) -> None:
    """And whoever had it is decoded to the same tokens."""
    requests = [engine.submit(prompt(index), params(), CACHE) for index in range(4)]
    for _ in range(5):
        engine.step()
    urgent = engine.submit(prompt(9), params(), CACHE, priority=2)
    engine.step()
    assert urgent.status == "running"
    assert sum(request.status == "waiting" for request in requests) == 1
    assert engine.stats().preemptions == 1
    results = [request.result() for request in (*requests, urgent)]
    assert results == [engine.generate(prompt(index), params(), CACHE)[0] for index in (0, 1, 2, 3, 9)]


def test_a_failing_request_fails_alone(engine: dllmc.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Callable[..., Any] = Executor.run
    poison = 479

    def failing(self: Executor, sizes: Any, inputs: Any) -> Any:
        if (inputs["token_ids"] == poison).any():
            raise FloatingPointError("a poisoned token")
        return run(self, sizes, inputs)

    expected = engine.generate([prompt(index) for index in range(3)], params(), CACHE)
    monkeypatch.setattr(Executor, "run", failing)
    good = [engine.submit(prompt(index), params(), CACHE) for index in range(3)]
    bad = engine.submit([poison], params(), CACHE)
    with pytest.raises(StepError, match=r"the request's step 0 failed: FloatingPointError: a poisoned token") as raised:
        bad.result()
    assert isinstance(raised.value.__cause__, FloatingPointError)
    assert bad.status == "failed"
    assert [request.result() for request in good] == expected
    assert engine.stats().failed == 1
    with pytest.raises(StepError):
        engine.generate([prompt(0), [poison]], params())


def test_threads_share_an_engine(engine: dllmc.Engine) -> None:
    found: dict[int, dllmc.GenerationResult] = {}

    def work(index: int) -> None:
        if index % 3 == 0:
            [found[index]] = engine.generate(prompt(index), params(seed=index))
        elif index % 3 == 1:
            found[index] = engine.submit(prompt(index), params(seed=index)).result()
        else:
            request = engine.submit(prompt(index), params(seed=index))
            assert sum(len(update.token_ids) for update in request.stream()) == 18
            found[index] = request.result()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {index: engine.generate(prompt(index), params(seed=index))[0] for index in range(12)}


def test_closing_ends_all_requests(small: Path) -> None:
    engine = dllmc.load(small)
    requests = [engine.submit(prompt(index), params()) for index in range(6)]
    engine.step()
    engine.close()
    assert {request.status for request in requests} == {"cancelled"}
    with pytest.raises(CancelledError, match="the engine is closed"):
        engine.submit(prompt(0), params())


def test_an_unknown_scheduler_is_refused(small: Path) -> None:
    with pytest.raises(RequestError, match="scheduler is 'lifo'; expected one of multiplexed, fcfs, static"):
        dllmc.load(small, scheduler="lifo")


@pytest.mark.parametrize("scheduler", ["multiplexed", "fcfs", "static"])
def test_every_scheduler_decodes_the_same_tokens(small: Path, scheduler: str, engine: dllmc.Engine) -> None:
    listed = [prompt(index) for index in range(10)]
    policies = [CACHE if index % 2 else dllmc.CachePolicy(mode="none") for index in range(10)]
    other = dllmc.load(small, scheduler=scheduler)
    together = other.generate(listed, params(temperature=0.7), policies)
    alone = [engine.generate(p, params(temperature=0.7), c)[0] for p, c in zip(listed, policies, strict=True)]
    assert together == alone


def test_stats_count_what_was_done(engine: dllmc.Engine) -> None:
    assert engine.stats().steps == 0
    assert engine.stats().tokens_per_s == 0
    before = engine.stats()
    engine.generate([prompt(1), prompt(2)], params(), CACHE)
    engine.generate(prompt(2), params())
    stats = engine.stats().since(before)
    assert (stats.finished, stats.tokens, stats.steps) == (3, 54, engine.steps)
    assert stats.phases["dense"].steps == 18
    assert {"dense", "refresh", "reuse"} <= set(stats.phases) <= {"dense", "refresh", "reuse", "mixed"}
    assert sum(phase.steps for phase in stats.phases.values()) == stats.steps
    assert stats.tokens_per_s == pytest.approx(54 / stats.seconds)
    assert stats.pages > 0


def run_async(engine: dllmc.Engine, work: Callable[[dllmc.AsyncEngine], Any]) -> Any:
    async def main() -> Any:
        async with dllmc.AsyncEngine(engine) as running:
            return await asyncio.wait_for(work(running), 120)

    return asyncio.run(main())


def test_coroutines_share_an_engine(small: Path, engine: dllmc.Engine) -> None:
    async def work(running: dllmc.AsyncEngine) -> tuple[list[dllmc.GenerationResult], list[dllmc.Update]]:
        async def updates() -> list[dllmc.Update]:
            return [update async for update in running.stream(prompt(7), params(), CACHE)]

        both = await asyncio.gather(
            asyncio.gather(*(running.generate(prompt(index), params(), CACHE) for index in range(7))), updates()
        )
        return list(both[0]), both[1]

    results, streamed = run_async(dllmc.load(small), work)
    assert results == [engine.generate(prompt(index), params(), CACHE)[0] for index in range(7)]
    [expected] = engine.generate(prompt(7), params(), CACHE)
    found = {p: t for update in streamed for p, t in zip(update.positions, update.token_ids, strict=True)}
    assert [found[position] for position in range(18)] == expected.token_ids


def test_a_coroutine_that_goes_away_cancels_its_request(small: Path) -> None:
    engine = dllmc.load(small)

    async def work(running: dllmc.AsyncEngine) -> None:
        stream = running.stream(prompt(3), params(gen_length=120, block_length=6))
        assert (await anext(stream)).token_ids
        await stream.aclose()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(running.generate(prompt(3), params(gen_length=120, block_length=6)), 0.01)
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.01)

    run_async(engine, work)
    assert engine.stats().cancelled == 2


def test_closing_an_async_engine_ends_those_who_wait(small: Path) -> None:
    engine = dllmc.load(small)

    async def main() -> None:
        running = dllmc.AsyncEngine(engine)
        async with running:
            task = asyncio.create_task(running.generate(prompt(3), params(gen_length=120, block_length=6)))
            await asyncio.sleep(0.05)
        with pytest.raises(CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 60))
    assert engine.closed
    assert not any(thread.name == "dllmc steps" for thread in threading.enumerate())


def exact(model: torch.nn.Module, given: list[int], ids: list[int], mask_id: int) -> list[list[float]]:
    """Of each number of masked tokens, what each set of so many says of the log-likelihood, in float64."""
    said: list[list[float]] = []
    for count in range(1, len(ids) + 1):
        said.append([])
        for hidden in itertools.combinations(range(len(ids)), count):
            shown = [mask_id if at in hidden else token for at, token in enumerate(ids)]
            with torch.inference_mode():
                logits = model(torch.tensor([given + shown])).double()[0, len(given) :]
            logprobs = logits.log_softmax(-1)
            said[-1].append(len(ids) / count * sum(float(logprobs[at, ids[at]]) for at in hidden))
    return said


def test_scores_are_likelihoods(golden_engine: Callable[[str], dllmc.Engine]) -> None:
    """Against the reference model in float64, over all sets of masked tokens."""
    engine = golden_engine(FOLDER)
    model = dllmc.load_model(ROOT / FOLDER).double()
    given, ids = prompt(3), [11, 300, 42]
    said = exact(model, given, ids, engine.spec.mask_id)
    every = [value for values in said for value in values]
    score = engine.score(given, ids, samples=300, seed=5)
    for sample in score.samples:
        assert min(abs(sample - value) for value in every) < 1e-3
    expected = sum(sum(values) / len(values) for values in said) / len(said)
    assert score.log_likelihood == pytest.approx(sum(score.samples) / 300)
    assert abs(score.log_likelihood - expected) < 4 * score.standard_error
    assert score.standard_error < 0.1 * abs(expected)
    assert engine.score(given, ids, samples=300, seed=5) == score
    assert engine.score(given, ids, samples=300, seed=6) != score
    [[one]] = exact(model, given, ids[:1], engine.spec.mask_id)
    single = engine.score(given, ids[:1], samples=1)
    assert single.log_likelihood == pytest.approx(one, abs=1e-4)
    assert math.isnan(single.standard_error)


def test_sets_of_masked_tokens_are_spread_evenly(golden_engine: Callable[[str], dllmc.Engine]) -> None:
    """As many samples as tokens: each number of masked tokens once."""
    from dllmc.runtime.likelihood import masked_sets

    for seed in range(5):
        sets = masked_sets(7, 7, seed)
        assert sorted(len(offsets) for offsets in sets) == [1, 2, 3, 4, 5, 6, 7]
        assert all(len(set(offsets.tolist())) == len(offsets) and offsets.max() < 7 for offsets in sets)


def test_what_cannot_be_scored_is_refused(engine: dllmc.Engine) -> None:
    with pytest.raises(RequestError, match="the completion is empty"):
        engine.score([1], [])
    with pytest.raises(RequestError, match="samples is 0; expected at least 1"):
        engine.score([1], [2], samples=0)
    with pytest.raises(RequestError, match=r"needs 20 rows a step, .*max_logit_rows >= 20"):
        engine.score([1], [2] * 20, samples=1)
