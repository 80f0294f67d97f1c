"""Patterns of calls, and rules that replace what fits one by a single call.

A pattern is a `Call`, a `Var`, a `OneOf`, a list of patterns, or a constant that must be equal. `matches` yields every
way in which a value fits, as what each variable stands for; a variable that occurs twice stands for one thing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dllmc.ir.provenance import describe
from dllmc.ir.step_graph import StepGraph, loop_of
from dllmc.ops.facts import argument
from dllmc.passes.base import PassResult

Found = Mapping[str, Any]


def is_tensor(value: Any) -> bool:
    """Whether an argument is a tensor that is computed or given, not one of several results, nor a size."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Var:
    """Anything that passes the test, a tensor if none is given, under a name."""

    name: str
    test: Callable[[Any], bool] = is_tensor


class OneOf:
    """What any of the patterns fits, tried in order."""

    def __init__(self, *patterns: Any) -> None:
        self.patterns = patterns


class Call:
    """A call of any of the operators, with these leading arguments and no other but defaults.

    `commutes`: the first two arguments may be in either order.
    """

    def __init__(self, targets: object, *args: Any, commutes: bool = False) -> None:
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.args = args
        self.commutes = commutes


class Rule:
    """What to replace by what. `name` is what the pass log counts replacements under."""

    name: str
    pattern: Any

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        """Why a value that fits the pattern is to be left as it is; None if it is not."""
        return None

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        """Replace `root`. Calls are inserted before it unless told otherwise."""
        raise NotImplementedError


def apply(step: StepGraph, rules: Sequence[Rule]) -> PassResult:
    """Replace what fits one of the rules, the first that does, beginning at the end of the graph.

    So the largest of nested matches wins. What fits but is refused by every rule is noted with the reason.
    """
    counts = Counter({rule.name: 0 for rule in rules})
    notes = []
    for root in reversed(list(step.calls())):
        refusals: list[str] = []
        chosen = _choose(rules, root, refusals) if root.users else None  # without users it went with another match
        if chosen is not None:
            rule, found = chosen
            with step.graph.inserting_before(root):
                rule.rewrite(step, root, found)
            counts[rule.name] += 1
        elif refusals:
            notes.append(f"{describe(root)} stays: {refusals[0]}")
    return PassResult(counts.total() > 0, dict(counts), tuple(reversed(notes)))


def _choose(rules: Sequence[Rule], root: fx.Node, refusals: list[str]) -> tuple[Rule, Found] | None:
    for rule in rules:
        for found in matches(rule.pattern, root):
            if (reason := rule.refuses(root, found)) is None:
                return rule, found
            refusals.append(reason)
    return None


def is_number(value: Any) -> bool:
    """Whether an argument is a number that is known when compiling."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_float(value: Any) -> bool:
    """Whether an argument is a dtype of floating-point numbers: a conversion to it rounds at most."""
    return isinstance(value, torch.dtype) and value.is_floating_point


def matches(pattern: Any, value: Any, found: Found | None = None, user: fx.Node | None = None) -> Iterator[Found]:
    """Every way in which `pattern` fits the value, given what was found already and the call that reads it.

    Calls of one match are in one loop: there alone are they made together.
    """
    found = found or {}
    if isinstance(pattern, Var):
        if pattern.name not in found:
            if pattern.test(value):
                yield {**found, pattern.name: value}
        elif _equal(found[pattern.name], value):
            yield found
    elif isinstance(pattern, OneOf):
        for choice in pattern.patterns:
            yield from matches(choice, value, found, user)
    elif isinstance(pattern, Call):
        if user is None or not isinstance(value, fx.Node) or loop_of(value) == loop_of(user):
            yield from _calls(pattern, value, found)
    elif isinstance(pattern, list):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _all(pattern, list(value), found, user)
    elif _equal(pattern, value):
        yield found


def _calls(pattern: Call, value: Any, found: Found) -> Iterator[Found]:
    if not isinstance(value, fx.Node) or value.target not in pattern.targets:
        return
    schema = getattr(value.target, "_schema", None)
    given = list(value.args) if schema is None else [argument(value, i) for i in range(len(schema.arguments))]
    wanted = list(pattern.args)
    rest = [] if schema is None else schema.arguments[len(wanted) :]
    others = zip(rest, given[len(wanted) :], strict=schema is not None)
    if any(not p.has_default_value() or other != p.default_value for p, other in others):
        return
    yield from _all(wanted, given[: len(wanted)], found, value)
    if pattern.commutes:
        yield from _all([wanted[1], wanted[0], *wanted[2:]], given[: len(wanted)], found, value)


def _all(patterns: list[Any], values: list[Any], found: Found, user: fx.Node | None) -> Iterator[Found]:
    if not patterns:
        yield found
        return
    for one in matches(patterns[0], values[0], found, user):
        yield from _all(patterns[1:], values[1:], one, user)


def _equal(a: Any, b: Any) -> bool:
    """Nodes are themselves alone; True and 1 are told apart, 2 and 2.0 are not."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
