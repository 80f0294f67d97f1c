"""How well and how fast an engine does a task, on examples that the bundled checkpoints never saw."""

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

from dllmc.errors import TaskError
from dllmc.runtime.engine import Engine
from dllmc.runtime.params import Prompt, SamplingParams
from dllmc.runtime.request import GenerationResult
from dllmc.tasks import jsonl, python_source
from dllmc.tasks.base import Task

TASKS = {"sudoku": "dllmc.tasks.sudoku", "add": "dllmc.tasks.addition"}
INFILLING = "code"
WINDOW, GAP = 768, 32
Z = 1.959964
"""Half the width of a 95 % interval, in standard errors."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What an evaluation measured.

    accuracy: share of examples answered, or for `code` of missing tokens found; interval: its 95 % interval.
    forward_passes: of all examples added up; tokens: of their completions, or missing ones; seconds: wall time.
    nll: nats a missing token under teacher forcing, `code` only, with its 95 % interval.
    scores, nlls: of each example, what accuracy and nll are the means of.
    """

    task: str
    examples: int
    accuracy: float
    interval: Interval
    forward_passes: int
    tokens: int
    seconds: float
    nll: float | None = None
    nll_interval: Interval | None = None
    scores: tuple[float, ...] = field(default=(), repr=False)
    nlls: tuple[float, ...] | None = field(default=None, repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Difference:
    """One report minus another of the same examples; the 95 % intervals are those of paired differences."""

    accuracy: float
    interval: Interval
    nll: float | None = None
    nll_interval: Interval | None = None

    @classmethod
    def of(cls, report: Report, base: Report) -> "Difference":
        scores = paired(report.scores, base.scores)
        if report.nlls is None or base.nlls is None:
            return cls(fmean(scores), normal(scores))
        nlls = paired(report.nlls, base.nlls)
        return cls(fmean(scores), normal(scores), fmean(nlls), normal(nlls))


def evaluate(
    engine: Engine,
    task: str,
    count: int = 200,
    seed: int = 0,
    sampling: Mapping[str, Any] = MappingProxyType({}),
    **generate: Any,
) -> Report:
    """Run `count` examples of a task: sudoku, add, code, or a file of examples (`dllmc.tasks.jsonl`).

    `sampling` holds fields of `SamplingParams` that differ from the task's own: greedy, a token a forward pass, one
    block as long as completions are. For `code`, `steps` are those of a gap, and lengths are fixed. `generate` goes
    to `Engine.generate`. Raises `TaskError`, and `RequestError` for sampling that is impossible.
    """
    if count < 1:
        raise TaskError(f"{count} examples; expected at least 1")
    if engine.tokenizer is None:
        raise TaskError("the artifact has no tokenizer, and tasks are texts; compile a checkpoint that has one")
    if task == INFILLING:
        return _infilling(engine, count, seed, sampling, **generate)
    chosen = _task(task)
    examples = chosen.examples(count, seed)
    length = {} if chosen.gen_length is None else {"gen_length": chosen.gen_length, "block_length": chosen.gen_length}
    params = SamplingParams(**{**length, **sampling})
    results, seconds = _timed(lambda: engine.generate([e.input for e in examples], params, **generate))
    right = tuple(chosen.is_right(e, str(r.text)) for e, r in zip(examples, results, strict=True))
    return Report(
        task=chosen.name,
        examples=len(right),
        accuracy=fmean(right),
        interval=wilson(sum(right), len(right)),
        forward_passes=sum(r.forward_passes for r in results),
        tokens=sum(len(r.token_ids) for r in results),
        seconds=seconds,
        scores=tuple(map(float, right)),
    )


def _task(name: str) -> Task:
    if name in TASKS:
        task: Task = importlib.import_module(TASKS[name]).TASK
        return task
    if name.endswith(".jsonl"):
        return jsonl.task_of(Path(name))
    raise TaskError(f"unknown task {name!r}; expected {', '.join(TASKS)}, {INFILLING} or a file that ends in .jsonl")


def _infilling(engine: Engine, count: int, seed: int, sampling: Mapping[str, Any], **generate: Any) -> Report:
    """Gaps of 32 tokens in held-out Python source: decoded freely for accuracy, teacher-forced for the NLL."""
    gaps = _gaps(engine, count, seed, sampling)
    prompts, params = [_prompt(gap) for gap in gaps], [_params(gap, sampling) for gap in gaps]
    results, seconds = _timed(lambda: engine.generate(prompts, params, **generate))
    found = tuple(
        fmean(token == gap.window[gap.start + i] for i, token in enumerate(result.token_ids[: gap.length]))
        for gap, result in zip(gaps, results, strict=True)
    )
    nlls = _forced_nlls(engine, gaps, sampling, **generate)
    return Report(
        task=INFILLING,
        examples=count,
        accuracy=fmean(found),
        interval=normal(found),
        forward_passes=sum(r.forward_passes for r in results),
        tokens=count * GAP,
        seconds=seconds,
        nll=fmean(nlls),
        nll_interval=normal(nlls),
        scores=found,
        nlls=nlls,
    )


def infilling_nlls(engine: Engine, count: int, seed: int, **generate: Any) -> tuple[float, ...]:
    """Nats a missing token of each of `count` gaps of `code`, teacher-forced; the second half of what it evaluates."""
    return _forced_nlls(engine, _gaps(engine, count, seed, {}), {}, **generate)


def _gaps(engine: Engine, count: int, seed: int, sampling: Mapping[str, Any]) -> list[python_source.Gap]:
    if not engine.spec.end_ids:
        raise TaskError("the model has no end token, which separates modules")
    if fixed := sampling.keys() & {"gen_length", "block_length", "ignore_eos"}:
        raise TaskError(f"task {INFILLING!r}: {', '.join(sorted(fixed))} cannot be chosen; gaps have {GAP} tokens")
    assert engine.tokenizer is not None
    window = min(WINDOW, engine.spec.max_positions)
    return python_source.gaps(engine.tokenizer.encode, engine.spec.end_ids[0], count, seed, window, GAP)


def _forced_nlls(
    engine: Engine, gaps: Sequence[python_source.Gap], sampling: Mapping[str, Any], **generate: Any
) -> tuple[float, ...]:
    prompts = [replace(_prompt(gap), reference=gap.window[gap.start :]) for gap in gaps]
    params = [replace(_params(gap, sampling), logprobs=True) for gap in gaps]
    results = engine.generate(prompts, params, **generate)
    return tuple(-fmean((result.logprobs or [])[:GAP]) for result in results)


def _params(gap: python_source.Gap, sampling: Mapping[str, Any]) -> SamplingParams:
    """A window's blocks are of a gap's length: the first is the gap, and the others, given, take no step."""
    params = SamplingParams(gen_length=len(gap.window) - gap.start, block_length=gap.length, ignore_eos=True)
    steps = {"steps": sampling["steps"] * params.blocks} if sampling.get("steps") else {}
    return replace(params, **{**sampling, **steps})


def _prompt(gap: python_source.Gap) -> Prompt:
    given = range(gap.start + gap.length, len(gap.window))
    return Prompt(gap.window[: gap.start], {at - gap.start: gap.window[at] for at in given})


def _timed(run: Callable[[], list[GenerationResult]]) -> tuple[list[GenerationResult], float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def wilson(right: int, count: int) -> Interval:
    """95 % interval of a share (Wilson, 1927): holds near 0 and 1, where the normal one does not."""
    share, spread = right / count, Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Differences of what two ways make of the same examples."""
    return [value - of_base for value, of_base in zip(values, base, strict=True)]


def normal(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of independent values, from their standard error; the whole line for a single one."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = Z * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half
