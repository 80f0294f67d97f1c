"""Patterns of calls: what fits them, and how rules replace it."""

import operator
from typing import Any

import pytest
import torch
from torch import fx

from dllmc.ir.step_graph import StepGraph
from dllmc.passes.base import PassResult
from dllmc.passes.pattern import Call, Found, OneOf, Rule, Var, apply, is_float, is_number, matches
from tests.graphs import Body, Tiny, captured, lines, step_of, text

aten = torch.ops.aten
X, Y, N = Var("x"), Var("y"), Var("n", is_number)


class Calls:
    """A graph of calls on two matrices, x and y; every value is computed as it is added."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.x.meta["val"], self.y.meta["val"] = torch.ones(2, 4), torch.ones(2, 4)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values, **options)
        return node


@pytest.fixture
def call() -> Calls:
    return Calls()


def fits(pattern: Any, value: Any) -> bool:
    return any(True for _ in matches(pattern, value))


def test_a_call_fits_with_what_its_variables_stand_for(call: Calls) -> None:
    """Found is a value for every variable, those of inner calls too."""
    inner = call(aten.sin.default, call.x)
    root = call(aten.mul.Tensor, inner, call.y)
    pattern = Call(aten.mul.Tensor, Call(aten.sin.default, X), Y)
    assert list(matches(pattern, root)) == [{"x": call.x, "y": call.y}]
    assert list(matches(pattern, inner)) == []
    assert list(matches(pattern, call(aten.add.Tensor, inner, call.y))) == []
    assert list(matches(pattern, 3)) == []


def test_one_of_several_operators(call: Calls) -> None:
    """A call may be of any of the operators given."""
    pattern = Call((aten.sin.default, aten.cos.default), X)
    assert fits(pattern, call(aten.sin.default, call.x))
    assert fits(pattern, call(aten.cos.default, call.x))
    assert not fits(pattern, call(aten.exp.default, call.x))


def test_a_variable_stands_for_one_thing(call: Calls) -> None:
    """Where it occurs twice, both are to be the same node, or equal constants; equal calls are not the same."""
    square = Call(aten.mul.Tensor, X, X)
    assert fits(square, call(aten.mul.Tensor, call.x, call.x))
    assert not fits(square, call(aten.mul.Tensor, call.x, call.y))
    twins = call(aten.sin.default, call.x), call(aten.sin.default, call.x)
    assert not fits(square, call(aten.mul.Tensor, *twins))
    both = Call(aten.add.Scalar, Call(aten.add.Scalar, X, N), N)
    assert fits(both, call(aten.add.Scalar, call(aten.add.Scalar, call.x, 2), 2.0))
    assert not fits(both, call(aten.add.Scalar, call(aten.add.Scalar, call.x, 2), 3))


def test_a_variable_passes_its_test(call: Calls) -> None:
    """By default it is a tensor: no constant, no list of tensors, no size."""
    assert fits(X, call.x)
    assert not fits(X, 3)
    parts = call(aten.chunk.default, call.x, 2)
    assert not fits(X, parts)
    assert fits(X, call(operator.getitem, parts, 0))
    assert not fits(X, call(aten.sym_size.int, call.x, 0))
    assert fits(N, 2)
    assert fits(N, -0.5)
    assert not fits(N, True)
    assert not fits(N, call.x)
    assert [is_float(d) for d in (torch.bfloat16, torch.float64, torch.int64, torch.bool, "float", 1.0)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def test_commuting(call: Calls) -> None:
    """The first two arguments in either order, where the pattern says so; every way is found, as given first."""
    sine = call(aten.sin.default, call.x)
    ordered = Call(aten.mul.Tensor, Call(aten.sin.default, X), Y)
    either = Call(aten.mul.Tensor, Call(aten.sin.default, X), Y, commutes=True)
    swapped = call(aten.mul.Tensor, call.y, sine)
    assert not fits(ordered, swapped)
    assert list(matches(either, swapped)) == [{"x": call.x, "y": call.y}]
    assert list(matches(Call(aten.add.Tensor, X, Y, commutes=True), call(aten.add.Tensor, call.x, call.y))) == [
        {"x": call.x, "y": call.y},
        {"x": call.y, "y": call.x},
    ]


def test_a_choice_is_taken_back(call: Calls) -> None:
    """What a commuting call found first may not fit the rest: the other order is tried before giving up."""
    inner = call(aten.mul.Tensor, call.x, call.y)
    pattern = Call(aten.add.Tensor, Call(aten.mul.Tensor, X, Y, commutes=True), X)
    assert list(matches(pattern, call(aten.add.Tensor, inner, call.y))) == [{"x": call.y, "y": call.x}]


@pytest.mark.parametrize(
    ("kwargs", "fit"),
    [({}, True), ({"alpha": 1}, True), ({"alpha": 2}, False)],
    ids=("left out", "given as it would be", "another"),
)
def test_other_arguments_are_at_their_defaults(call: Calls, kwargs: dict[str, Any], fit: bool) -> None:
    """An argument that the pattern does not name may be given, but only as its default."""
    assert fits(Call(aten.add.Tensor, X, Y), call(aten.add.Tensor, call.x, call.y, **kwargs)) is fit


def test_other_arguments_have_defaults(call: Calls) -> None:
    """One that has none, such as an exponent, cannot go unnamed."""
    power = call(aten.pow.Tensor_Scalar, call.x, 3)
    assert not fits(Call(aten.pow.Tensor_Scalar, X), power)
    assert fits(Call(aten.pow.Tensor_Scalar, X, 3), power)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(([-1], True), {}), (([-1],), {"keepdim": True}), ((), {"dim": [-1], "keepdim": True})],
)
def test_arguments_may_be_keywords(call: Calls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same call by position or by name; a pattern gives its arguments in the order of the schema."""
    node = call(aten.mean.dim, call.x, *args, **kwargs)
    assert fits(Call(aten.mean.dim, X, [-1], True), node)
    assert not fits(Call(aten.mean.dim, X, [-1]), node)


def test_keyword_only_arguments(call: Calls) -> None:
    """GELU's form is given by name alone, and is the pattern's second argument."""
    plain = call(aten.gelu.default, call.x)
    tanh = call(aten.gelu.default, call.x, approximate="tanh")
    assert [fits(Call(aten.gelu.default, X), n) for n in (plain, tanh)] == [True, False]
    assert [fits(Call(aten.gelu.default, X, "tanh"), n) for n in (plain, tanh)] == [False, True]


def test_one_of_is_tried_in_order(call: Calls) -> None:
    """All that fit are found, the first first."""
    converted = call(aten.to.dtype, call.x, torch.float64)
    optional = OneOf(Call(aten.to.dtype, X, Var("dtype", is_float)), X)
    assert list(matches(optional, converted)) == [{"x": call.x, "dtype": torch.float64}, {"x": converted}]
    assert next(matches(OneOf(*reversed(optional.patterns)), converted)) == {"x": converted}
    assert list(matches(optional, call.y)) == [{"x": call.y}]
    assert list(matches(OneOf(), call.y)) == []


def test_one_of_with_a_variable_known(call: Calls) -> None:
    """A choice that contradicts what was found before is none."""
    converted = call(aten.to.dtype, call.x, torch.float64)
    optional = OneOf(Call(aten.to.dtype, X, Var("dtype", is_float)), X)
    pattern = Call(aten.mul.Tensor, optional, Call(aten.sin.default, X))
    assert list(matches(pattern, call(aten.mul.Tensor, converted, call(aten.sin.default, call.x)))) == [
        {"x": call.x, "dtype": torch.float64}
    ]
    assert list(matches(pattern, call(aten.mul.Tensor, converted, call(aten.sin.default, converted)))) == [
        {"x": converted}
    ]


def test_lists(call: Calls) -> None:
    """Lists and tuples of as many items, each of which fits."""
    joined = call(aten.cat.default, [call(aten.neg.default, call.y), call.x], -1)
    assert list(matches(Call(aten.cat.default, [Call(aten.neg.default, Y), X], -1), joined)) == [
        {"x": call.x, "y": call.y}
    ]
    assert not fits(Call(aten.cat.default, [X, Call(aten.neg.default, Y)], -1), joined)
    assert not fits(Call(aten.cat.default, [Call(aten.neg.default, Y)], -1), joined)
    assert not fits(Call(aten.cat.default, X, -1), joined)
    assert fits([1, N], (1, 2))
    assert not fits([1, N], (1, 2, 3))
    assert not fits([1], 1)


@pytest.mark.parametrize(
    ("pattern", "value", "fit"),
    [
        (1, 1, True),
        (1, 1.0, True),
        (2.0, 2, True),
        (1, True, False),
        (True, 1, False),
        (1.0, True, False),
        (True, True, True),
        (0, False, False),
        (0, None, False),
        (None, None, True),
        (None, 0, False),
        ("tanh", "tanh", True),
        ("tanh", "none", False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, False),
    ],
)
def test_constants(pattern: object, value: object, fit: bool) -> None:
    """Equal numbers are equal whatever their type, but truth is no number."""
    assert fits(pattern, value) is fit


def test_constants_and_nodes(call: Calls) -> None:
    """A node is itself alone; no constant is one."""
    assert fits(call.x, call.x)
    assert not fits(call.x, call.y)
    assert not fits(1, call.x)


class Replaced(Rule):
    """Replaces what fits by `tanh` of x, unless it is told why not."""

    def __init__(self, name: str, pattern: Any, refusal: str | None = None, only: str | None = None) -> None:
        self.name = name
        self.pattern = pattern
        self.refusal = refusal
        self.only = only

    def refuses(self, root: fx.Node, found: Found) -> str | None:
        return self.refusal if self.only is None or found["x"].name == self.only else None

    def rewrite(self, step: StepGraph, root: fx.Node, found: Found) -> None:
        step.replace(root, step.call(aten.tanh.default, found["x"], origin=root))


class TwoCalls(Tiny):
    """A cosine, and its sine a line later."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        y = self.embed(token_ids).cos()
        return self.head(y.sin() + y.exp())


SINE, COSINE = Call(aten.sin.default, X), Call(aten.cos.default, X)
EITHER = Call((aten.sin.default, aten.cos.default), X)


def applied(body: Body, *rules: Rule) -> tuple[list[str], PassResult]:
    """The graph's lines before the head once the rules were applied to it, and the result."""
    step = step_of(body)
    result = apply(step, rules)
    step.propagate()
    return text(step).splitlines()[:-3], result


def test_the_largest_match_wins() -> None:
    """A match that encloses another comes first; what it made useless is not looked at, nor noted."""
    inside = Replaced("inside", SINE, refusal="it is a sine")
    outside = Replaced("outside", Call(aten.exp.default, SINE))
    shown, result = applied(lambda m, x: x.sin().exp(), inside, outside)
    assert shown == ["0 = tanh(x)"]
    assert result == PassResult(True, {"inside": 0, "outside": 1})


def test_every_match_is_replaced() -> None:
    """Also those that remain within what has been replaced, and those that the same call shares."""
    shown, result = applied(lambda m, x: x.sin().cos() + x.sin(), Replaced("both", EITHER))
    assert shown == ["0 = tanh(x)", "1 = tanh(0)", "2 = tanh(x)", "3 = add(1, 2)"]
    assert result == PassResult(True, {"both": 3})


def test_the_first_rule_that_fits_and_does_not_refuse() -> None:
    """Rules are tried in order; each replacement counts for the rule that made it."""
    rules = Replaced("first", SINE, refusal="no"), Replaced("second", SINE), Replaced("third", EITHER)
    shown, result = applied(lambda m, x: x.sin() + x.cos(), *rules)
    assert shown == ["0 = tanh(x)", "1 = tanh(x)", "2 = add(0, 1)"]
    assert result == PassResult(True, {"first": 0, "second": 1, "third": 1})


def test_another_match_of_the_same_rule() -> None:
    """Where a rule refuses one way in which a value fits, the next is tried."""
    rule = Replaced("sum", Call(aten.add.Tensor, X, Y, commutes=True), refusal="not that one", only="sin")
    shown, result = applied(lambda m, x: x.sin() + x.cos(), rule)
    assert shown == ["0 = cos(x)", "1 = tanh(0)"]
    assert result == PassResult(True, {"sum": 1})


def test_refusals_are_noted_in_order() -> None:
    """Each value that stays, with its line and the first reason, in the order of the graph; modified is honest."""
    rules = Replaced("a", SINE, refusal="it is a sine"), Replaced("b", EITHER, refusal="it is odd or even")

    step = captured(TwoCalls())
    result = apply(step, rules)
    shown = text(step).splitlines()[:-3]
    assert shown == lines("0 = cos(x) \n 1 = sin(0) \n 2 = exp(0) \n 3 = add(1, 2)").splitlines()
    assert not result.modified
    assert result.stats == {"a": 0, "b": 0}
    first, second = result.notes
    assert first.startswith("cos (aten.cos.default) at ")
    assert first.endswith(", in forward: y = self.embed(token_ids).cos() stays: it is odd or even")
    assert second.startswith("sin (aten.sin.default) at ")
    assert second.endswith(", in forward: return self.head(y.sin() + y.exp()) stays: it is a sine")


def test_rules_of_one_name_count_together() -> None:
    """Two rules may be one to those who read the log."""
    shown, result = applied(lambda m, x: x.sin() + x.cos(), Replaced("turns", SINE), Replaced("turns", COSINE))
    assert shown[:2] == ["0 = tanh(x)", "1 = tanh(x)"]
    assert result == PassResult(True, {"turns": 2})
