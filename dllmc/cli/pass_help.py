"""What the passes are: their names, what they do, what they require and ensure, their options."""

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields

WIDTH, INDENT = 100, 20


@dataclass(frozen=True)
class PassHelp:
    """A pass for people and for JSON. `description` is its docstring, `summary` the first sentence of it."""

    name: str
    summary: str
    description: str
    requires: list[str]
    ensures: list[str]
    options: list[dict[str, object]]


def known() -> list[PassHelp]:
    """Every pass: those of the default pipeline in its order, then those of installed packages."""
    from importlib.metadata import entry_points

    from dllmc.passes.pipeline import ENTRY_POINTS, REGISTRY

    return [described(name) for name in (*REGISTRY, *(point.name for point in entry_points(group=ENTRY_POINTS)))]


def described(name: str) -> PassHelp:
    """One pass. Raises `PassError` listing the choices."""
    from dllmc.passes.pipeline import lookup

    cls = lookup(name)
    options = [
        {"name": f.name.replace("_", "-"), "type": getattr(f.type, "__name__", str(f.type)), "default": f.default}
        for f in fields(cls)
    ]
    return PassHelp(
        name, cls.summary(), inspect.cleandoc(cls.__doc__ or ""), list(cls.requires), list(cls.ensures), options
    )


def lines(described: PassHelp) -> Iterator[str]:
    """A line or two of what it does, one of its facts, one an option."""
    wrapped = textwrap.wrap(described.summary, WIDTH - INDENT)
    yield f"{described.name:<{INDENT - 1}} {wrapped[0]}"
    for line in (*wrapped[1:], *_facts(described), *_options(described)):
        yield " " * INDENT + line


def full_lines(described: PassHelp) -> Iterator[str]:
    """All there is to say."""
    yield described.name
    yield from textwrap.indent(described.description, "  ").splitlines()
    for line in (*_facts(described), *_options(described)):
        yield f"  {line}"


def _facts(described: PassHelp) -> Iterator[str]:
    parts = (("requires", described.requires), ("ensures", described.ensures))
    if told := [f"{verb} {', '.join(facts)}" for verb, facts in parts if facts]:
        yield "; ".join(told)


def _options(described: PassHelp) -> Iterator[str]:
    for option in described.options:
        yield f"option {option['name']}={option['default']} ({option['type']})".lower()
