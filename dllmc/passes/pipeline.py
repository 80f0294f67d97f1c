"""Pipelines: text to passes and back, and running them with their claims checked.

After a pass that modified the graph, dead code goes, the graph is linted, every value is recomputed on fake
tensors, and the facts that hold so far are checked again.
"""

import importlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from dllmc.errors import CaptureError, PassError
from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import Pass
from dllmc.passes.facts import FACTS

REGISTRY = {
    "inline-regions": "InlineRegions",
    "remove-noops": "RemoveNoops",
    "fold-constants": "FoldConstants",
    "cse": "CommonSubexpressions",
    "lift-positions": "LiftPositions",
    "pack-tokens": "PackTokens",
    "select-logit-rows": "SelectLogitRows",
    "fuse-head": "FuseHead",
    "lower": "Lower",
    "plan-memory": "PlanMemory",
}
"""Pass name -> class name; the module is the name with underscores, imported on first use."""

DEFAULT_PIPELINE = ",".join(REGISTRY)


@dataclass(frozen=True)
class LogEntry:
    """What one pass did: its text, whether it modified the graph, its counts, and its time in seconds."""

    text: str
    modified: bool
    stats: dict[str, int]
    seconds: float


def lookup(name: str) -> type[Pass]:
    """The pass of that name. Raises `PassError` listing the choices."""
    if name not in REGISTRY:
        raise PassError(f"no pass is named {name!r}; choose from: {', '.join(REGISTRY)}")
    module = importlib.import_module(f"dllmc.passes.{name.replace('-', '_')}")
    found: type[Pass] = getattr(module, REGISTRY[name])
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


def run(
    step: StepGraph, passes: Sequence[Pass], on_pass: Callable[[Pass], object] | None = None
) -> tuple[LogEntry, ...]:
    """Run the passes on the step in place and return what each did. Raises `PassError` naming the pass.

    `on_pass` is called with each pass before it runs.
    """
    log, facts = [], set[str]()
    for current in passes:
        if on_pass is not None:
            on_pass(current)
        if missing := [fact for fact in current.requires if fact not in facts]:
            ensuring = [name for name in REGISTRY if set(lookup(name).ensures) & set(missing)]
            raise PassError(
                f"pass {current.name!r} requires {', '.join(missing)}, which nothing before it ensures; "
                f"put {' and '.join(ensuring)} before it in {text_of(passes)!r}"
            )
        began = time.perf_counter()
        before = _contents(step)
        result = current.run(step)
        facts |= set(current.ensures)
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
        log.append(LogEntry(str(current), result.modified, dict(result.stats), time.perf_counter() - began))
    return tuple(log)


def _contents(step: StepGraph) -> list[tuple[object, ...]]:
    """The graph's nodes and what each computes from what: equal before and after a pass that changed nothing."""
    return [(node, node.target, node.args, node.kwargs) for node in step.graph.nodes]


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


def _with_options(cls: type[Pass], text: str) -> Pass:
    known = {f.name.replace("_", "-"): f for f in fields(cls)}
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in known:
            choices = ", ".join(known) or "none"
            raise PassError(f"pass {cls.name!r} has no option {key!r}; its options: {choices}")
        if known[key].type is not int or not re.fullmatch(r"\d+", value):
            raise PassError(f"option {key!r} of pass {cls.name!r}: expected an integer, found {value!r}")
        options[known[key].name] = int(value)
    return cls(**options)
