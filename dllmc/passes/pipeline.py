"""Pipelines: text to passes and back, and running them with their claims checked.

After a pass that modified the graph, dead code goes, the graph is linted, what has changed is recomputed on fake
tensors, and the facts that hold so far are checked again.
"""

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from importlib.metadata import entry_points
from typing import Any

from dllmc.errors import BudgetError, CaptureError, PassError
from dllmc.ir.step_graph import StepGraph, loop_of
from dllmc.passes import order
from dllmc.passes.base import LogEntry, Observer, Pass
from dllmc.passes.facts import FACTS

REGISTRY = {
    "inline-regions": "InlineRegions",
    "remove-noops": "RemoveNoops",
    "fold-constants": "FoldConstants",
    "respell-linears": "RespellLinears",
    "cse": "CommonSubexpressions",
    "classify-masks": "ClassifyMasks",
    "lift-positions": "LiftPositions",
    "pack-tokens": "PackTokens",
    "select-logit-rows": "SelectLogitRows",
    "cache-kv": "CacheKV",
    "fuse-head": "FuseHead",
    "chunk-activations": "ChunkActivations",
    "fuse-projections": "FuseProjections",
    "fuse-norm": "FuseNorm",
    "fuse-rope": "FuseRope",
    "fuse-glu": "FuseGLU",
    "lower": "Lower",
    "reuse-in-place": "ReuseInPlace",
    "fit-budget": "FitBudget",
    "plan-memory": "PlanMemory",
    "specialize-phase": "SpecializePhase",
}
"""Pass name -> class name; the module is the name with underscores, imported on first use."""

DEFAULT_PIPELINE = ",".join(REGISTRY)

ENTRY_POINTS = "dllmc.passes"
"""The group in which an installed package announces passes of its own, by name."""


def lookup(name: str) -> type[Pass]:
    """The pass of that name, from here or from an installed package. Raises `PassError` listing the choices."""
    announced = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in (*REGISTRY, *announced):
        raise PassError(f"no pass is named {name!r}; choose from: {', '.join((*REGISTRY, *announced))}")
    found: type[Pass]
    if name in REGISTRY:
        found = getattr(importlib.import_module(f"dllmc.passes.{name.replace('-', '_')}"), REGISTRY[name])
    else:
        found = announced[name].load()
    return found


def parse(text: str) -> tuple[Pass, ...]:
    """Passes from text such as `cse,lower` or `name{option=2}`. Raises `PassError` naming the part that is wrong."""
    passes = []
    for part in re.split(r",(?![^{}]*\})", text) if text.strip() else ():
        match = re.fullmatch(r"\s*([\w-]+)\s*(?:\{([^}]*)\})?\s*", part)
        if match is None:
            raise PassError(f"pipeline {text!r}: expected NAME or NAME{{OPTION=VALUE,...}}, found {part!r}")
        passes.append(_with_options(lookup(match[1]), match[2] or ""))
    return tuple(passes)


def text_of(passes: Sequence[Pass]) -> str:
    """Pipeline text that `parse` reads back equal."""
    return ",".join(map(str, passes))


def up_to(passes: Sequence[Pass], name: str) -> tuple[Pass, ...]:
    """The passes until the last one of that name, it included. Raises `PassError` where there is none."""
    names = [p.name for p in passes]
    if name not in names:
        raise PassError(f"no pass {name!r} to stop after in this pipeline; choose from: {', '.join(names)}")
    return tuple(passes[: len(names) - names[::-1].index(name)])


def run(step: StepGraph, passes: Sequence[Pass], *observers: Observer) -> tuple[LogEntry, ...]:
    """Run the passes on the step in place and return what each did. Raises `PassError` naming the pass."""
    order.check([type(p) for p in passes], [lookup(name) for name in REGISTRY])
    log: list[LogEntry] = []
    facts: set[str] = set()
    for current in passes:
        for observer in observers:
            observer.before(current, step)
        facts |= set(current.ensures)
        log.append(_run_one(step, current, facts))
        for observer in observers:
            observer.after(current, step, log[-1])
    return tuple(log)


def _run_one(step: StepGraph, current: Pass, facts: set[str]) -> LogEntry:
    """Run a pass and check what it claims; `facts` are to hold behind it."""
    before = _contents(step)
    began = time.perf_counter()
    try:
        result = current.run(step)
    except CaptureError as error:
        raise CaptureError(f"pass {current.name!r}: {error}") from error
    except (PassError, BudgetError):
        raise
    except Exception as error:
        raise PassError(f"pass {current.name!r} failed: {type(error).__name__}: {error}") from error
    ran = time.perf_counter()
    if result.modified != (changed := _contents(step) != before):
        did = "changed" if changed else "did not change"
        raise PassError(f"pass {current.name!r} {did} the graph but reports modified={result.modified}")
    if result.modified:
        _settle(step, current)
    if (size := step.fixed_size()) is not None:
        raise PassError(f"pass {current.name!r} asked for the value of the size {size!r}, which a step alone knows")
    for fact in sorted(facts if result.modified else current.ensures):
        if (problem := FACTS[fact](step)) is not None:
            claim = f"ensures {fact!r}, but" if fact in current.ensures else f"broke {fact!r}:"
            raise PassError(f"pass {current.name!r} {claim} {problem}")
    checked = time.perf_counter()
    return LogEntry(
        str(current),
        result.modified,
        dict(result.stats),
        result.notes,
        seconds=ran - began,
        check_seconds=checked - ran,
    )


def _contents(step: StepGraph) -> list[tuple[object, ...]]:
    """The graph's nodes, what each computes from what, and in which loop: equal where a pass changed nothing."""
    return [(node, node.target, node.args, node.kwargs, loop_of(node)) for node in step.graph.nodes]


def _settle(step: StepGraph, after: Pass) -> None:
    """Bring a modified graph into a valid state, or say which pass left it in none."""
    try:
        step.graph.eliminate_dead_code()
        step.graph.lint()
        step.propagate()
    except CaptureError:
        raise
    except Exception as error:
        raise PassError(f"pass {after.name!r} left a graph that does not run: {error}") from error


_READERS: Mapping[type, tuple[str, str, Callable[[str], Any]]] = {
    bool: ("true|false", "true or false", lambda text: text == "true"),
    int: (r"\d+", "an integer", int),
    float: (r"\d+(\.\d+)?(e-?\d+)?", "a number", float),
    str: (r"[\w.-]+", "a word", str),
}
"""What an option of each type looks like, what it is called, and how it is read."""


def _with_options(cls: type[Pass], text: str) -> Pass:
    known = {f.name.replace("_", "-"): f for f in fields(cls)}
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in known:
            choices = ", ".join(known) or "none"
            raise PassError(f"pass {cls.name!r} has no option {key!r}; its options: {choices}")
        options[known[key].name] = _read(cls, known[key], value)
    return cls(**options)


def _read(cls: type[Pass], option: Field[Any], value: str) -> Any:
    assert isinstance(option.type, type)
    pattern, what, read = _READERS[option.type]
    if not re.fullmatch(pattern, value):
        name = option.name.replace("_", "-")
        raise PassError(f"option {name!r} of pass {cls.name!r}: expected {what}, found {value!r}")
    return read(value)
