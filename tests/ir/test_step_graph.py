"""The step graph: propagation that recomputes only what has changed, edits, and tensors that are joined on demand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from dllmc.ir.provenance import layer_of, source_line
from dllmc.ir.step_graph import Role, StepGraph, Tensors
from tests.graphs import VOCAB, WIDTH, Body, Tiny, captured, execute, lines, run, step_inputs, text
from tests.graphs import step_of as captured_of

aten = torch.ops.aten


def step_of(body: Body, **constants: Tensor) -> StepGraph:
    """`Tiny` with this body, without the checks that export leaves, propagated once."""
    step = captured_of(body, **constants)
    run(step, "inline-regions,remove-noops")
    step.propagate()
    return step


UNARY = (aten.exp.default, aten.sin.default, aten.neg.default, aten.sigmoid.default)


def varied(module: Tiny, x: Tensor) -> Tensor:
    """Views of views, copies, several results of one call, other dtypes, and other orders of the axes in memory."""
    a = x.exp()
    b = a.view(1, -1, 2, 4).transpose(1, 2)
    c = b.contiguous().transpose(1, 2).flatten(2)
    first, second = (a + c).chunk(2, dim=-1)
    d = torch.cat((second, first), dim=-1)
    e = d.double().sin().to(torch.float32)
    f = e.transpose(1, 2).neg().transpose(1, 2)
    return f.reshape(-1, 8)[None] * a + f


def tensors_of(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]


def storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def known(step: StepGraph) -> list[Any]:
    """What a graph's metadata says: of each value dtype, shape, strides and offset, and which share memory."""
    first_with: dict[int, str] = {}
    described = []
    for node in step.graph.nodes:
        for i, value in enumerate(tensors_of(node)):
            home = first_with.setdefault(storage(value), f"{node.name}.{i}")
            shape, strides = [[str(size) for size in sizes] for sizes in (value.shape, value.stride())]
            described.append((node.name, i, value.dtype, shape, strides, str(value.storage_offset()), home))
    return described


def known_afresh(step: StepGraph) -> list[Any]:
    """The same, with every call computed anew."""
    for node in step.calls():
        node.meta.pop("computed_from", None)
        node.meta.pop("val", None)
    step.propagate()
    return known(step)


def alike(step: StepGraph, node: fx.Node, before: fx.Node) -> list[fx.Node]:
    """Calls above another that could stand in for a call: their values have its shape and dtype."""
    like = [(v.dtype, [*map(str, v.shape)]) for v in tensors_of(node)]
    return [
        n
        for n in step.calls()
        if n is not node and n < before and [(v.dtype, [*map(str, v.shape)]) for v in tensors_of(n)] == like
    ]


def edit(step: StepGraph, draw: Callable[[list[Any]], Any]) -> None:
    """One random edit, such as passes make; the graph stays valid."""
    results = [n for n in step.calls() if isinstance(n.meta["val"], Tensor) and n.meta["val"].dim() == 3]
    choices = {
        "another operator": list(step.calls(*UNARY)),
        "another input": [(n, s, other) for n in results for s in n.all_input_nodes for other in alike(step, s, n)],
        "a call behind it": results,
        "another order in memory": results,
        "nothing of it": [(n, other) for n in results for other in alike(step, n, n)],
    }
    kind = draw([kind for kind in choices if choices[kind]])
    chosen = draw(choices[kind])
    if kind == "another operator":
        chosen.target = draw(list(UNARY))
    elif kind == "another input":
        node, source, other = chosen
        node.replace_input_with(source, other)
    elif kind == "nothing of it":
        step.replace(*chosen)
    else:
        readers = list(chosen.users)
        turn = (aten.transpose.int, 1, 2)
        calls = [(draw(list(UNARY)),)] if kind == "a call behind it" else [turn, (aten.contiguous.default,), turn]
        new = chosen
        for target, *args in calls:
            with step.graph.inserting_after(new):
                new = step.call(target, new, *args, origin=chosen)
        for reader in readers:
            reader.replace_input_with(chosen, new)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.data())
def test_incremental_propagation_equals_a_full_one(data: st.DataObject) -> None:
    """After any edits: dtypes, shapes, strides, offsets, and which values share memory."""
    step = step_of(varied)
    for _ in range(data.draw(st.integers(1, 5))):
        edit(step, lambda choices: data.draw(st.sampled_from(choices)))
        step.graph.lint()
        step.propagate()
    found = known(step)
    assert found == known_afresh(step)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the calls that were computed on fake tensors, but for those that read inputs and weights."""
    names: list[str] = []
    run_node = FakeTensorProp.run_node

    def counted(self: FakeTensorProp, n: fx.Node) -> Any:
        if n.op == "call_function" and all(source.op != "placeholder" for source in n.all_input_nodes):
            names.append(n.name)
        return run_node(self, n)

    monkeypatch.setattr(FakeTensorProp, "run_node", counted)
    return names


def test_what_has_not_changed_is_not_computed(recomputed: list[str]) -> None:
    """The first propagation computes all, the next nothing; the values are the same objects."""
    step = step_of(varied)
    values = {node: node.meta["val"] for node in step.calls(*UNARY, aten.cat.default, aten.add.Tensor)}
    recomputed.clear()
    step.propagate()
    assert recomputed == []
    assert all(node.meta["val"] is value for node, value in values.items())


def test_a_change_without_effect_stays_local(recomputed: list[str]) -> None:
    """Where a call's result has the layout that it had, what reads it is not computed again."""
    step = step_of(lambda m, x: x.exp().sin() + x)
    recomputed.clear()
    (exp,) = step.calls(aten.exp.default)
    exp.target = aten.neg.default
    step.propagate()
    assert recomputed == ["exp", "sin"]


def test_another_layout_goes_on_until_nothing_changes(recomputed: list[str]) -> None:
    """Readers are computed while their results change, and no further."""
    step = step_of(lambda m, x: (x.exp().sin() @ x.transpose(1, 2)).neg() @ x)
    (exp,) = step.calls(aten.exp.default)
    (x,) = exp.all_input_nodes
    with step.graph.inserting_before(exp):
        turned = step.call(aten.transpose.int, x, 1, 2, origin=x)
        copied = step.call(aten.contiguous.default, turned, origin=x)
        back = step.call(aten.transpose.int, copied, 1, 2, origin=x)
    recomputed.clear()
    step.replace(exp, back)
    step.propagate()
    assert recomputed == [turned.name, copied.name, back.name, "sin", "matmul"]
    (sin,) = step.calls(aten.sin.default)
    assert sin.meta["val"].stride()[1] == 1


def test_a_views_memory_is_its_sources() -> None:
    """However often a source is recomputed, all views of it, and of those, share the memory that it has now."""
    step = step_of(lambda m, x: x.exp().view(1, -1, 2, 4).transpose(1, 2).chunk(2, -1)[1].sum(1).repeat(1, 1, 4))
    (exp,) = step.calls(aten.exp.default)
    views = [*step.calls(aten.view.default, aten.transpose.int, aten.chunk.default)]
    for target in (aten.sin.default, aten.exp.default):
        exp.target = target
        step.propagate()
        assert {storage(v) for view in views for v in tensors_of(view)} == {storage(exp.meta["val"])}
    (x,) = exp.all_input_nodes
    (view,) = step.calls(aten.view.default)
    view.args = (x, *view.args[1:])
    step.propagate()
    assert {storage(v) for view in views for v in tensors_of(view)} == {storage(x.meta["val"])}
    assert storage(exp.meta["val"]) != storage(x.meta["val"])


def test_a_conversion_is_a_view_only_of_its_own_dtype() -> None:
    """Whether a call shares memory may depend on its arguments."""
    step = step_of(lambda m, x: x.exp().to(torch.float64).to(torch.float32))
    first, second = step.calls(aten.to.dtype)
    (exp,) = step.calls(aten.exp.default)
    assert storage(first.meta["val"]) != storage(exp.meta["val"])
    first.args = (exp, torch.float32)
    step.propagate()
    assert {storage(n.meta["val"]) for n in (exp, first, second)} == {storage(exp.meta["val"])}


def test_replacing_erases_what_served_nothing_else() -> None:
    """The old call, and what it alone was made of; not what others read, nor placeholders."""
    step = step_of(lambda m, x: (x.exp().sin() * x.exp().cos()).neg() + x.cos() + m.weight.sum(), weight=torch.ones(8))
    shown = text(step)
    (neg,) = step.calls(aten.neg.default)
    (cos,) = [n for n in step.calls(aten.cos.default) if n.users.keys() != neg.all_input_nodes[0].users.keys()][-1:]
    step.replace(neg, cos.all_input_nodes[0])
    step.propagate()
    assert "exp(" in shown
    assert "sin(" in shown
    assert text(step) == lines(
        """
        0 = cos(x)
        1 = add(x, 0)
        2 = sum(self.weight)
        3 = add(1, 2)
        4 = linear(3, head.weight)
        5 = select(4, 0, 0)
        return logits=5
        """
    )


def test_replacing_by_what_reads_the_same() -> None:
    """What the new call shares with the old stays, whichever way it is reached."""
    step = step_of(lambda m, x: (x.exp().sin() + x.exp()).tanh())
    (tanh,) = step.calls(aten.tanh.default)
    (sin,) = step.calls(aten.sin.default)
    with step.graph.inserting_before(tanh):
        new = step.call(aten.mul.Tensor, sin, sin, origin=tanh)
    step.replace(tanh, new)
    step.propagate()
    assert text(step).startswith("0 = exp(x)\n1 = sin(0)\n2 = mul(1, 1)\n3 = linear(2, head.weight)\n")


def test_replacing_where_one_input_is_read_twice() -> None:
    """A call that reads a value twice, or along two ways, is erased once."""
    step = step_of(lambda m, x: ((y := x.exp()) * y + y.sin() * y) - x)
    (sub,) = step.calls(aten.sub.Tensor)
    step.replace(sub, sub.args[1])
    step.propagate()
    assert text(step) == "0 = linear(x, head.weight)\n1 = select(0, 0, 0)\nreturn logits=1"


class TwoLines(Tiny):
    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        y = x.exp()
        return self.head(y.sin())


def test_a_new_call_comes_from_where_its_origin_did() -> None:
    """Its line in the user's model, and its name, its operator's."""
    step = captured(TwoLines())
    (exp,) = step.calls(aten.exp.default)
    with step.graph.inserting_after(exp):
        new = step.call(aten.cos.default, exp, origin=exp)
        other = step.call(torch.ops.aten.cos.default, exp, origin=new)
    assert new.name.startswith("cos")
    assert other.name != new.name
    assert source_line(new) == source_line(other) == source_line(exp)
    assert source_line(new).endswith("in forward: y = x.exp()")
    assert "val" not in new.meta


def test_tensors_are_joined_when_they_are_asked_for() -> None:
    """A joined name is the parts, one after the other, made anew each time and kept never; parts may be joined too."""
    tensors = Tensors({"a": torch.ones(2, 3), "b": torch.zeros(1, 3)})
    tensors.join("ab", ["a", "b"])
    tensors.join("aba", ["ab", "a"])
    assert torch.equal(tensors["ab"], torch.tensor([[1.0] * 3] * 2 + [[0.0] * 3]))
    assert torch.equal(tensors["aba"], torch.cat([tensors["a"], tensors["b"], tensors["a"]]))
    assert list(tensors) == ["a", "b"]
    tensors["a"] = torch.full((1, 3), 7.0)
    assert tensors["ab"].tolist() == [[7.0] * 3, [0.0] * 3]
    assert list(tensors) == ["a", "b"]
    with pytest.raises(KeyError, match="c"):
        tensors["c"]


def test_a_joined_weight_is_a_placeholder() -> None:
    """Its role is its name, its value has the joined shape, and the graph runs with it."""
    step = step_of(lambda m, x: torch.nn.functional.linear(x, m.a) + x, a=torch.eye(8))
    weights = [node for node, role in step.placeholders() if role.name in ("self.a", "head.weight")]
    joined = step.join_weights(weights)
    names = [step.roles[node.name].name for node in weights]
    assert step.roles[joined.name] == Role("weight", "+".join(names))
    assert [*joined.meta["val"].shape] == [8 + VOCAB, WIDTH]
    assert step.tensors["+".join(names)].shape == (8 + VOCAB, WIDTH)
    step.graph.lint()
    step.propagate()
    assert execute(step, step_inputs(5))["logits"].shape == (5, VOCAB)


def test_meta_weights_join() -> None:
    """Weights without bytes can be joined; the result has none either."""
    tensors = Tensors({"a": torch.empty(2, 3, device="meta"), "b": torch.empty(4, 3, device="meta")})
    tensors.join("ab", ["a", "b"])
    assert tensors["ab"].is_meta
    assert tensors["ab"].shape == (6, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + self.mlp(x)


class Nested(nn.Module):
    """Layers within a part of the model, as encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids).exp()
        for layer in self.encoder.layer:
            x = layer(x)
        return self.head(x.cos())


def test_the_layer_of_a_call() -> None:
    """The path of the outermost numbered module that a call was made in; none for what stands outside of any."""
    step = captured(Nested())
    of = {target: [layer_of(n) for n in step.calls(target)] for target in (aten.sin.default, aten.gelu.default)}
    layers = [f"encoder.layer.{i}" for i in range(12)]
    assert of == {aten.sin.default: layers, aten.gelu.default: layers}
    linears = [layer_of(n) for n in step.calls(aten.linear.default)]
    assert linears == [*layers, ""]
    outside = [n for t in (aten.embedding, aten.exp, aten.cos) for n in step.calls(t.default)]
    assert [layer_of(n) for n in outside] == ["", "", ""]
    with step.graph.inserting_after(outside[1]):
        made = step.call(aten.neg.default, outside[1], origin=next(step.calls(aten.gelu.default)))
    assert layer_of(made) == "encoder.layer.0"
