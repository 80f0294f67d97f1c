"""The order of passes: who needs whom, what is wrong with an order, and passes from other packages."""

from pathlib import Path

import networkx as nx
import pytest

from dllmc.errors import PassError
from dllmc.passes import order, pipeline
from dllmc.passes.base import Pass
from tests.graphs import step_of


def made(name: str, requires: str = "", ensures: str = "") -> type[Pass]:
    """A pass type with these facts, given as words."""
    attributes = {"name": name, "requires": tuple(requires.split()), "ensures": tuple(ensures.split())}
    return type(name, (Pass,), attributes)


FLATTEN, LIFT = made("flatten", "", "flat"), made("lift", "flat", "lifted known")
CLEAN, PACK = made("clean", "flat"), made("pack", "lifted known flat", "packed")
KNOWN = (FLATTEN, CLEAN, LIFT, PACK)


def test_edges_are_facts() -> None:
    """From who ensures a fact to all who require it, with the facts; no edge without one."""
    graph = order.dependencies(KNOWN)
    assert list(graph) == list(KNOWN)
    found = {(a.name, b.name): data["facts"] for a, b, data in graph.edges(data=True)}
    assert found == {
        ("flatten", "clean"): ["flat"],
        ("flatten", "lift"): ["flat"],
        ("flatten", "pack"): ["flat"],
        ("lift", "pack"): ["known", "lifted"],
    }


def test_several_may_ensure_a_fact() -> None:
    """Each of them comes before."""
    other = made("other", "", "flat")
    assert set(order.dependencies((CLEAN, FLATTEN, other)).predecessors(CLEAN)) == {FLATTEN, other}


def test_the_projects_own_passes() -> None:
    """Every pass but the first needs a flat graph; what lowers needs what fuses the head."""
    every = [pipeline.lookup(name) for name in pipeline.REGISTRY]
    graph = order.dependencies(every)
    of = {p.name: p for p in every}
    assert set(graph.successors(of["inline-regions"])) == {p for p in every if "flat" in p.requires}
    assert nx.has_path(graph, of["lift-positions"], of["plan-memory"])
    assert not nx.has_path(graph, of["cse"], of["plan-memory"])
    assert graph.edges[of["fuse-head"], of["lower"]]["facts"] == ["head-fused"]


def test_passes_that_wait_for_each_other() -> None:
    """The circle is named."""
    passes = made("a", "z", "x"), made("b", "x", "y"), made("c", "y", "z"), made("d", "x")
    with pytest.raises(PassError) as error:
        order.dependencies(passes)
    said = str(error.value).partition("passes require facts of each other in a circle: ")[2]
    assert said in ("a -> b -> c", "b -> c -> a", "c -> a -> b")


def test_a_pass_that_waits_for_itself() -> None:
    """Requiring what it ensures, it could never be the first."""
    with pytest.raises(PassError, match=r"in a circle: a$"):
        order.dependencies([made("a", "x", "x")])


@pytest.mark.parametrize("passes", [(), (FLATTEN,), (FLATTEN, CLEAN, CLEAN, LIFT, CLEAN, PACK, FLATTEN)])
def test_an_order_that_does(passes: tuple[type[Pass], ...]) -> None:
    """Passes that ensure nothing may stand anywhere and often, behind what they require."""
    order.check(passes, KNOWN)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            (CLEAN,),
            "pass 'clean' requires flat, which nothing before it ensures; this order would do: flatten,clean",
        ),
        (
            (CLEAN, FLATTEN, LIFT),
            "pass 'clean' requires flat, which nothing before it ensures; this order would do: flatten,clean,lift",
        ),
        (
            (FLATTEN, PACK),
            "pass 'pack' requires lifted, known, which nothing before it ensures; "
            "this order would do: flatten,lift,pack",
        ),
    ],
)
def test_an_order_that_does_not(passes: tuple[type[Pass], ...], message: str) -> None:
    """The first pass that misses a fact is named, with an order of the same passes and of those that are missing."""
    with pytest.raises(PassError) as error:
        order.check(passes, KNOWN)
    assert str(error.value) == message


def test_what_is_suggested_keeps_to_the_known_order() -> None:
    """Of the orders that do, the one closest to that of the passes known, those of others at the end."""
    late = made("late", "flat")
    with pytest.raises(PassError, match=r"this order would do: flatten,clean,lift,late$"):
        order.check((late, CLEAN, LIFT), KNOWN)


def test_a_fact_that_no_one_ensures() -> None:
    """There is no order to suggest."""
    with pytest.raises(PassError) as error:
        order.check((FLATTEN, made("odd", "flat perfect")), KNOWN)
    assert str(error.value) == ("pass 'odd' requires perfect, which nothing before it ensures; no pass ensures perfect")


def test_a_pass_of_ones_own_that_ensures_what_another_needs() -> None:
    """Passes of the pipeline count, known or not."""
    own, needy = made("own", "flat", "perfect"), made("needy", "perfect")
    with pytest.raises(PassError, match=r"this order would do: flatten,own,needy$"):
        order.check((needy, FLATTEN, own), KNOWN)
    order.check((FLATTEN, own, needy), KNOWN)


def test_up_to_a_pass() -> None:
    """Until the last pass of that name, it included."""
    passes = pipeline.parse("inline-regions,cse,remove-noops,cse,fold-constants")
    assert pipeline.text_of(pipeline.up_to(passes, "inline-regions")) == "inline-regions"
    assert pipeline.text_of(pipeline.up_to(passes, "remove-noops")) == "inline-regions,cse,remove-noops"
    assert pipeline.text_of(pipeline.up_to(passes, "cse")) == "inline-regions,cse,remove-noops,cse"
    assert pipeline.up_to(passes, "fold-constants") == passes


def test_up_to_a_pass_that_is_not_there() -> None:
    """The choices are those of the pipeline."""
    with pytest.raises(PassError) as error:
        pipeline.up_to(pipeline.parse("inline-regions,cse"), "lower")
    assert str(error.value) == "no pass 'lower' to stop after in this pipeline; choose from: inline-regions, cse"


OTHERS = """
from dataclasses import dataclass

from dllmc.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Theirs(Pass):
    name = "theirs"
    requires = ("flat",)
    times: int = 1

    def run(self, step):
        return PassResult(False, {"times": self.times})
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that announces two passes, one by a name that is the project's."""
    (tmp_path / "their_passes.py").write_text(OTHERS)
    info = tmp_path / "their_passes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dllmc.passes]\ntheirs = their_passes:Theirs\ncse = their_passes:Theirs\n[console_scripts]\nodd = odd:main\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_pass_of_an_installed_package() -> None:
    """It is known by its name, has options, prints and runs as the project's own."""
    step = step_of(lambda m, x: x)
    passes = pipeline.parse("inline-regions,theirs{times=3}")
    assert pipeline.text_of(passes) == "inline-regions,theirs{times=3}"
    entry = pipeline.run(step, passes)[-1]
    assert (entry.text, entry.modified, entry.stats) == ("theirs{times=3}", False, {"times": 3})
    with pytest.raises(PassError, match=r"'theirs' requires flat, .* this order would do: inline-regions,theirs$"):
        pipeline.run(step, pipeline.parse("theirs"))


@pytest.mark.usefixtures("installed")
def test_what_is_announced_is_listed_and_hides_nothing() -> None:
    """The choices name it; the project's own names stay its own."""
    with pytest.raises(PassError, match=r"'odd'; choose from: inline-regions, .*, specialize-phase, theirs"):
        pipeline.lookup("odd")
    assert pipeline.lookup("cse").__module__ == "dllmc.passes.cse"


def test_without_the_package_there_is_no_such_pass() -> None:
    """Nothing is left behind of what was installed."""
    with pytest.raises(PassError, match="no pass is named 'theirs'"):
        pipeline.lookup("theirs")
