"""Which passes must come before which: a graph whose edges are facts, from who ensures one to who requires it."""

from collections.abc import Iterable, Sequence

import networkx as nx

from dllmc.errors import PassError
from dllmc.passes.base import Pass

Passes = Sequence[type[Pass]]


def dependencies(passes: Iterable[type[Pass]]) -> "nx.DiGraph[type[Pass]]":
    """An edge from each pass to those that require a fact it ensures, with those facts as `facts`.

    Raises `PassError` where passes wait for each other.
    """
    graph: nx.DiGraph[type[Pass]] = nx.DiGraph()
    graph.add_nodes_from(passes)
    for first in graph:
        for then in graph:
            if shared := set(first.ensures) & set(then.requires):
                graph.add_edge(first, then, facts=sorted(shared))
    if not nx.is_directed_acyclic_graph(graph):
        around = " -> ".join(first.name for first, *_ in nx.find_cycle(graph))
        raise PassError(f"passes require facts of each other in a circle: {around}")
    return graph


def check(pipeline: Passes, known: Passes) -> None:
    """Raise `PassError` unless every pass finds the facts it requires ensured before it.

    The error says which, and an order of these passes, completed from those `known`, that would do.
    """
    facts: set[str] = set()
    for current in pipeline:
        if missing := [fact for fact in current.requires if fact not in facts]:
            raise PassError(
                f"pass {current.name!r} requires {', '.join(missing)}, which nothing before it ensures; "
                f"{_suggestion(pipeline, known, missing)}"
            )
        facts |= set(current.ensures)


def _suggestion(pipeline: Passes, known: Passes, missing: Iterable[str]) -> str:
    every = [*known, *(p for p in pipeline if p not in known)]
    graph = dependencies(every)
    if lost := [fact for fact in missing if not any(fact in p.ensures for p in every)]:
        return f"no pass ensures {', '.join(lost)}"
    needed = set(pipeline).union(*(nx.ancestors(graph, p) for p in pipeline))
    ordered = nx.lexicographical_topological_sort(graph.subgraph(needed), key=every.index)
    return f"this order would do: {','.join(p.name for p in ordered)}"
