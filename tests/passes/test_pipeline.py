"""Pipelines: their text, and the checks around every pass."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmc.errors import CaptureError, PassError
from dllmc.ir.step_graph import StepGraph
from dllmc.passes import pipeline
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.inline_regions import InlineRegions
from tests.graphs import Tiny, captured, step_of

aten = torch.ops.aten


@dataclass(frozen=True)
class WithOptions(Pass):
    """A pass that has options; it runs `rewrite`, where a test gives one."""

    name = "with-options"
    chunk_rows: int = 8
    tile: int = 256
    exact: bool = False
    largest_error: float = 1e-5
    rule: str = "first"

    def run(self, step: StepGraph) -> PassResult:
        return PassResult(False, {"seen": self.chunk_rows})


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`with-options` is known by its name, as the project's own passes are."""
    of_the_project = pipeline.lookup
    monkeypatch.setitem(pipeline.REGISTRY, "with-options", "WithOptions")
    monkeypatch.setattr(
        pipeline, "lookup", lambda name: WithOptions if name == "with-options" else of_the_project(name)
    )


passes = st.one_of(
    st.sampled_from(pipeline.DEFAULT_PIPELINE.split(",")).map(lambda name: pipeline.lookup(name)()),
    st.builds(
        WithOptions,
        st.integers(0, 99),
        st.integers(0, 2**40),
        st.booleans(),
        st.floats(0, 1e15),
        st.from_regex(r"[a-z0-9_.-]+", fullmatch=True),
    ),
    st.builds(WithOptions),
)


@settings(deadline=None, derandomize=True)
@given(st.lists(passes, max_size=6), st.booleans())
def test_what_is_printed_parses_back(listed: list[Pass], spaced: bool) -> None:
    """`parse` reads `text_of` back equal, spaces around commas or not; defaults are not printed."""
    with pytest.MonkeyPatch.context() as patch:
        lookup = pipeline.lookup
        patch.setattr(pipeline, "lookup", lambda name: WithOptions if name == "with-options" else lookup(name))
        text = pipeline.text_of(listed)
        assert pipeline.parse(text.replace(",", " , ") if spaced else text) == tuple(listed)
        assert "tile=256" not in text


def test_options_are_printed_as_they_are_written() -> None:
    """Names with hyphens, in braces, only where they differ from the default."""
    text = "cse,with-options{chunk-rows=16,tile=4},with-options{tile=1},with-options"
    assert pipeline.text_of(pipeline.parse(text)) == text
    assert pipeline.parse(text)[1] == WithOptions(16, 4)
    text = "with-options{exact=true,largest-error=1e-07,rule=widest_first},with-options{largest-error=0.25}"
    assert pipeline.text_of(pipeline.parse(text)) == text
    assert pipeline.parse(text)[0] == WithOptions(exact=True, largest_error=1e-7, rule="widest_first")
    assert pipeline.parse("with-options{exact=false,largest-error=2}") == (WithOptions(largest_error=2.0),)
    assert pipeline.parse("with-options{}") == (WithOptions(),)
    assert pipeline.parse(" ") == ()


def test_the_default_pipeline_has_every_pass_once() -> None:
    """Every pass of the package stands in it, memory planning last but for what makes parts of the plan."""
    parsed = pipeline.parse(pipeline.DEFAULT_PIPELINE)
    assert [p.name for p in parsed] == pipeline.DEFAULT_PIPELINE.split(",")
    assert [p.name for p in parsed[-2:]] == ["plan-memory", "specialize-phase"]
    assert len({p.name for p in parsed}) == len(parsed) == len(pipeline.REGISTRY) - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cse,fuse-everything", "no pass is named 'fuse-everything'; choose from: inline-regions, remove-noops, "),
        ("cse{chunk=8}", "pass 'cse' has no option 'chunk'; its options: none"),
        ("with-options{rows=8}", "pass 'with-options' has no option 'rows'; its options: chunk-rows, tile, exact, "),
        ("with-options{tile}", "option 'tile' of pass 'with-options': expected an integer, found ''"),
        ("with-options{tile=big}", "option 'tile' of pass 'with-options': expected an integer, found 'big'"),
        ("with-options{tile=-1}", "expected an integer, found '-1'"),
        ("with-options{tile=1.5}", "expected an integer, found '1.5'"),
        ("with-options{exact=1}", "option 'exact' of pass 'with-options': expected true or false, found '1'"),
        ("with-options{exact}", "expected true or false, found ''"),
        ("with-options{largest-error=tiny}", "expected a number, found 'tiny'"),
        ("with-options{largest-error=nan}", "expected a number, found 'nan'"),
        ("with-options{rule=}", "option 'rule' of pass 'with-options': expected a word, found ''"),
        ("with-options{rule=a b}", "expected a word, found 'a b'"),
        ("cse,,lower", "expected NAME or NAME{OPTION=VALUE,...}, found ''"),
        ("cse,", "expected NAME or NAME{OPTION=VALUE,...}, found ''"),
        ("cse{", "expected NAME or NAME{OPTION=VALUE,...}, found 'cse{'"),
        ("with-options{tile=1", "expected NAME or NAME{OPTION=VALUE,...}, found 'with-options{tile=1'"),
        ("cse}", "expected NAME or NAME{OPTION=VALUE,...}, found 'cse}'"),
        ("cse{}lower", "expected NAME or NAME{OPTION=VALUE,...}, found 'cse{}lower'"),
        ("cse lower", "expected NAME or NAME{OPTION=VALUE,...}, found 'cse lower'"),
        ("CSE", "no pass is named 'CSE'"),
    ],
)
def test_text_that_is_no_pipeline(text: str, message: str) -> None:
    """The error quotes the part that is wrong and lists the choices."""
    with pytest.raises(PassError) as error:
        pipeline.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cse", "pass 'cse' requires flat, which nothing before it ensures; this order would do: inline-regions,cse"),
        ("inline-regions,select-logit-rows", "requires packed, .* would do: inline-regions,.*,pack-tokens,select"),
        ("cse,inline-regions", "requires flat, .* this order would do: inline-regions,cse"),
        ("inline-regions,fuse-head", "pass 'fuse-head' requires rows-selected, .*,select-logit-rows,fuse-head"),
    ],
)
def test_a_pass_needs_its_facts(text: str, message: str) -> None:
    """Nothing runs where a pass would meet a graph that is not fit for it; the error gives an order that works."""
    step = step_of(lambda m, x: x.clone())
    before = str(step.graph)
    with pytest.raises(PassError, match=message) as error:
        pipeline.run(step, pipeline.parse(text))
    assert str(step.graph) == before
    pipeline.run(step, pipeline.parse(str(error.value).partition("this order would do: ")[2]))


def test_the_log_has_an_entry_a_pass() -> None:
    """Text with options, whether the graph was modified, counts, and time."""
    log = pipeline.run(
        step_of(lambda m, x: x.clone()), pipeline.parse("inline-regions,remove-noops,with-options{tile=1}")
    )
    assert [(entry.text, entry.modified, entry.stats) for entry in log] == [
        ("inline-regions", False, {"inlined": 0}),
        ("remove-noops", True, {"removed": 1, "respelled": 0}),
        ("with-options{tile=1}", False, {"seen": 8}),
    ]
    assert all(0 < entry.seconds < 60 for entry in log)


Rewrite = Callable[[StepGraph], None]


@dataclass(frozen=True)
class Broken(Pass):
    """A pass that does what a test gives it, and says what a test makes it say."""

    name = "broken"
    rewrite: Rewrite = lambda step: None
    says_modified: bool = True

    def run(self, step: StepGraph) -> PassResult:
        self.rewrite(step)
        return PassResult(self.says_modified)


class Ensuring(Broken):
    """The same, with a claim."""

    ensures = ("packed",)


class Summed(Tiny):
    """`x.exp()` and `x.sin()`, added: calls for the broken passes to break."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.exp()
        return self.head(y + x.sin())


def call(step: StepGraph, name: str) -> torch.fx.Node:
    return next(node for node in step.calls() if node.name == name)


def use_before_definition(step: StepGraph) -> None:
    call(step, "exp").args = (call(step, "sin"),)


def change_a_width(step: StepGraph) -> None:
    call(step, "exp").target, call(step, "exp").args = aten.slice.Tensor, (call(step, "embedding"), 2, 0, 3)


def swap_an_argument(step: StepGraph) -> None:
    call(step, "add").args = (call(step, "sin"), call(step, "exp"))


def swap_an_operator(step: StepGraph) -> None:
    call(step, "exp").target = aten.cos.default


def add_a_call(step: StepGraph) -> None:
    with step.graph.inserting_after(call(step, "exp")):
        call(step, "sin").args = (step.graph.call_function(aten.tanh.default, (call(step, "embedding"),)),)


def sum_over_tokens(step: StepGraph) -> None:
    call(step, "exp").target, call(step, "exp").args = aten.mean.dim, (call(step, "embedding"), [1], True)


def ask_for_the_size(step: StepGraph) -> None:
    assert int(step.size("tokens")) > 0


@pytest.fixture
def summed() -> StepGraph:
    return captured(Summed())


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (use_before_definition, "used before it has been defined"),
        (change_a_width, r"%add : .*= call_function\[target=torch.ops.aten.add.Tensor\]"),
    ],
    ids=("a dangling value", "shapes that do not fit"),
)
def test_a_pass_that_leaves_an_invalid_graph(summed: StepGraph, rewrite: Rewrite, message: str) -> None:
    """The error names the pass and the node that does not run."""
    with pytest.raises(PassError, match=f"(?s)pass 'broken' left a graph that does not run: .*{message}"):
        pipeline.run(summed, [Broken(rewrite)])


@pytest.mark.parametrize("rewrite", [swap_an_argument, swap_an_operator, add_a_call], ids=lambda f: f.__name__)
def test_a_pass_that_hides_what_it_did(summed: StepGraph, rewrite: Rewrite) -> None:
    """Any change of the graph counts as one, even where no node comes or goes."""
    with pytest.raises(PassError, match="pass 'broken' changed the graph but reports modified=False"):
        pipeline.run(summed, [Broken(rewrite, says_modified=False)])


def test_a_pass_that_claims_what_it_did_not_do(summed: StepGraph) -> None:
    """`modified` is honest in both directions."""
    with pytest.raises(PassError, match="pass 'broken' did not change the graph but reports modified=True"):
        pipeline.run(summed, [Broken()])


@pytest.mark.parametrize("modified", [False, True])
def test_a_pass_whose_claim_does_not_hold(summed: StepGraph, modified: bool) -> None:
    """The facts that a pass ensures are checked whether it modified the graph or not; the node is named."""
    if modified:
        broken = Ensuring(sum_over_tokens)
    else:
        sum_over_tokens(summed)
        summed.propagate()
        broken = Ensuring(says_modified=False)
    with pytest.raises(PassError) as error:
        pipeline.run(summed, [broken])
    assert str(error.value).startswith("pass 'broken' ensures 'packed', but exp (aten.mean.dim) at ")
    assert "in forward: y = x.exp(): it may mix the tokens" in str(error.value)


def test_a_pass_that_breaks_an_earlier_fact(summed: StepGraph) -> None:
    """What earlier passes ensured holds to the end; the pass that broke it is named, with the node and its line."""

    def hide(step: StepGraph) -> None:
        step.module.register_buffer("hidden", torch.ones(8))
        with step.graph.inserting_before(call(step, "add")):
            call(step, "add").args = (call(step, "exp"), step.graph.get_attr("hidden"))

    with pytest.raises(PassError, match=r"pass 'broken' broke 'flat': hidden \(hidden\) is not a call of an operator"):
        pipeline.run(summed, [InlineRegions(), Broken(hide)])


def test_a_pass_that_fixes_a_size(summed: StepGraph) -> None:
    """Asking for a size's value makes torch assume it: the graph would hold for that size alone."""
    with pytest.raises(PassError, match="pass 'broken' asked for the value of the size 'tokens'"):
        pipeline.run(summed, [Broken(ask_for_the_size, says_modified=False)])


def test_an_operator_that_fixes_a_size(summed: StepGraph) -> None:
    """Where torch computes an operator's shape for one size only, the call and the model's line are named."""
    library = torch.library.Library("dllmc_test", "DEF")
    library.define("fixes_a_size(Tensor x) -> Tensor")
    torch.library.register_fake("dllmc_test::fixes_a_size", lambda x: x.new_empty(1, int(x.shape[1]), 8), lib=library)

    def use(step: StepGraph) -> None:
        call(step, "exp").target = torch.ops.dllmc_test.fixes_a_size.default

    with pytest.raises(CaptureError, match="torch computes it for one number of tokens only") as error:
        pipeline.run(summed, [Broken(use)])
    assert "in forward: y = x.exp()" in str(error.value)


def test_dead_code_goes_with_a_modification(summed: StepGraph) -> None:
    """After a pass that modified the graph nothing is left that no one uses."""

    def forget(step: StepGraph) -> None:
        call(step, "add").args = (call(step, "exp"), call(step, "exp"))

    pipeline.run(summed, [Broken(forget)])
    assert not [node for node in summed.calls() if node.target is aten.sin.default or not node.users]
    assert all(node.target is not operator.getitem for node in summed.calls())
