"""Numeric verification: passes that break what a step computes are caught, by name, node and line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from dllmc import compiler
from dllmc.compiler import CompileOptions
from dllmc.errors import PassError
from dllmc.ir.step_graph import StepGraph
from dllmc.passes import pipeline, verify
from dllmc.passes.base import Pass, PassResult
from dllmc.passes.fuse_head import FuseHead
from dllmc.passes.lower import Lower
from dllmc.passes.select_logit_rows import SelectLogitRows
from dllmc.passes.verify import NumericCheck, random_inputs
from tests.graphs import captured
from tests.passes import two_layers
from tests.passes.two_layers import SPEC, WIDTH, Broken, Model, calls, until

aten = torch.ops.aten
Rewrite = Callable[[StepGraph], fx.Node]


def run(passes: Sequence[Pass], model: nn.Module | None = None) -> NumericCheck:
    """Run passes on the module under verification."""
    check = NumericCheck()
    pipeline.run(captured(model or Model(), SPEC), passes, check)
    return check


# Slips that passes may make. Each returns the first node whose value is another.


def swap_cos_and_sin(step: StepGraph) -> fx.Node:
    """In layer 1's rotation."""
    by_cos, by_sin = [n for n in calls(step, aten.mul.Tensor, 1) if n.args[1].target is aten.index_select.default]
    by_cos.args, by_sin.args = (by_cos.args[0], by_sin.args[1]), (by_sin.args[0], by_cos.args[1])
    return by_cos


def swap_halves(step: StepGraph) -> fx.Node:
    """The negative half comes last."""
    (turned,) = calls(step, aten.cat.default, 0)
    turned.args = (turned.args[0][::-1], *turned.args[1:])
    return turned


def drop_a_residual(step: StepGraph) -> fx.Node:
    """Layer 1's attention takes the place of what it should be added to."""
    *_, attended, _last = calls(step, aten.add.Tensor, 1)
    reader = min(attended.users)
    step.replace(attended, attended.args[1])
    return reader


def change_an_eps(step: StepGraph) -> fx.Node:
    """Of layer 1's norm."""
    (variance,) = (n for n in calls(step, aten.add.Tensor, 1) if n.args[1] == 1e-6)
    variance.args = (variance.args[0], 0.1)
    return variance


def scale_attention(step: StepGraph) -> fx.Node:
    """Layer 1's, by the width of all heads instead of one's."""
    _first, attention = calls(step, torch.ops.dllmc.attention.default)
    attention.update_arg(5, WIDTH**-0.5)
    return attention


def scale_a_projection(step: StepGraph) -> fx.Node:
    """By a call of its own, behind the last projection of layer 0."""
    *_, down = calls(step, aten.linear.default, 0)
    readers = list(down.users)
    with step.graph.inserting_after(down):
        scaled = step.call(aten.mul.Tensor, down, 0.5, origin=down)
    for reader in readers:
        reader.replace_input_with(down, scaled)
    return min(readers)


def take_up_for_gate(step: StepGraph) -> fx.Node:
    """The activation is of the other half."""
    (activation,) = calls(step, aten.silu.default, 0)
    (product,) = activation.users
    gate, up = activation.args[0], product.args[1]
    up.append(activation)
    activation.args, product.args = (up,), (activation, gate)
    return activation


def read_the_rows_before(step: StepGraph) -> fx.Node:
    """One too early, after an earlier pass has gathered the right ones."""
    rows = step.input("rows")
    gather = next(n for n in calls(step, aten.index_select.default) if n.args[2] is rows)
    with step.graph.inserting_before(gather):
        back = step.call(aten.clamp_min.default, step.call(aten.sub.Tensor, rows, 1, origin=gather), 0, origin=gather)
    gather.update_arg(2, back)
    return gather


def see_segments_before(step: StepGraph) -> fx.Node:
    """Layer 0's keys from the step's first token on, instead of the segment's own."""
    attention, _second = calls(step, torch.ops.dllmc.attention.default)
    until_end = step.add_constant("constant.until_end", torch.tensor([0, 1]))
    with step.graph.inserting_before(attention):
        wider = step.call(aten.mul.Tensor, step.input("segments"), until_end, origin=attention)
    attention.update_arg(4, wider)
    return attention


def halve_the_heads_scale(step: StepGraph) -> fx.Node:
    """Probabilities are of other logits, though their order is the same."""
    (head,) = calls(step, torch.ops.dllmc.decode_head.default)
    head.update_arg(3, head.args[3] / 2)
    return head


ROTATION = "q = q * cos + torch.cat((-second, first), dim=-1) * sin"
ATTENTION = "mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)"
MLP = "return x + self.down(F.silu(self.gate(x)) * self.up(x))"


@pytest.mark.parametrize(
    ("rewrite", "after", "output", "code"),
    [
        (swap_cos_and_sin, "lift-positions", "logits", ROTATION),
        (swap_halves, "inline-regions", "logits", ROTATION),
        (drop_a_residual, "remove-noops", "logits", MLP),
        (change_an_eps, "remove-noops", "logits", "variance = wide.pow(2).mean(-1, keepdim=True) + 1e-6"),
        (scale_attention, "pack-tokens", "logits", ATTENTION),
        (scale_a_projection, "select-logit-rows", "logits", MLP),
        (take_up_for_gate, "cse", "logits", MLP),
        (read_the_rows_before, "select-logit-rows", "logits", None),
        (see_segments_before, "pack-tokens", "logits", ATTENTION),
        (halve_the_heads_scale, "fuse-head", "confidence", "return self.head(self.norm(x)) / 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pass_that_changes_numbers(rewrite: Rewrite, after: str, output: str, code: str | None) -> None:
    """The error names the pass, an output, and the first value that differs with its line: no node of layer 0 if the
    slip was in layer 1.
    """
    step, first = captured(Model(), SPEC), list[fx.Node]()
    pipeline.run(step, until(after))
    with pytest.raises(PassError) as error:
        pipeline.run(step, [Broken(lambda step: first.append(rewrite(step)))], NumericCheck())
    said = str(error.value)
    assert said.startswith("pass 'broken' changed what the step computes: the largest relative error of ")
    assert f"of {output!r} is " in said
    assert "expected at most 1e-04 on random inputs; the first value that differs is " in said
    assert f" differs is {first[0].name} (" in said
    if code is not None:
        assert f", in forward: {code}, by " in said
        assert "two_layers.py" in said


def test_what_a_pass_made_is_named() -> None:
    """The value that differs is one that was there before; the error says what new call it reads."""
    with pytest.raises(PassError, match=r"it reads mul_\d+, which this pass made") as error:
        run((*until("cse"), Broken(scale_a_projection)))
    assert "add" in str(error.value)


def test_segments_that_mix_show_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step of one segment the slip would go unseen; that is why steps of three are tried too."""
    passes = *until("pack-tokens"), Broken(see_segments_before)
    with pytest.raises(PassError, match="pass 'broken' changed what the step computes"):
        run(passes)
    monkeypatch.setattr(verify, "SEVERAL", verify.ONE)
    assert run(passes).errors[-1][1] == 0


@dataclass(frozen=True)
class RowsTooEarly(SelectLogitRows):
    """Selects rows, but not those that are wanted."""

    name = "select-logit-rows"

    def run(self, step: StepGraph) -> PassResult:
        result = super().run(step)
        read_the_rows_before(step)
        return result


@dataclass(frozen=True)
class HeadWithoutScale(FuseHead):
    """Takes the linear for all there is of the head."""

    name = "fuse-head"

    def run(self, step: StepGraph) -> PassResult:
        result = super().run(step)
        (head,) = calls(step, torch.ops.dllmc.decode_head.default)
        head.update_arg(3, 1.0)
        return result


@dataclass(frozen=True)
class LastOfTheVocabulary(FuseHead):
    """Decodes the tokens with the least logits."""

    name = "fuse-head"

    def run(self, step: StepGraph) -> PassResult:
        result = super().run(step)
        (head,) = calls(step, torch.ops.dllmc.decode_head.default)
        head.update_arg(3, -head.args[3])
        return result


@pytest.mark.parametrize(
    ("before", "broken", "output"),
    [
        ("pack-tokens", RowsTooEarly(), "'logits' is "),
        ("select-logit-rows", HeadWithoutScale(), "'confidence' is "),
        ("select-logit-rows", LastOfTheVocabulary(), "'token' is inf"),
    ],
)
def test_a_pass_that_returns_something_else_than_it_says(before: str, broken: Pass, output: str) -> None:
    """What a pass is to return instead is computed from what was returned before it."""
    with pytest.raises(PassError, match=f"pass {broken.name!r} changed what the step computes: .* of {output}"):
        run((*until(before), broken))


def test_outputs_of_other_names() -> None:
    """A step that returns something else altogether is told from one that returns it wrong."""

    def rename(step: StepGraph) -> None:
        step.set_outputs(scores=step.output_nodes()[0])
        step.graph.call_function(aten.add.Tensor, (step.output_nodes()[0], 1))

    with pytest.raises(PassError, match=r"pass 'broken': the step returns \['scores'\], expected \['logits'\]"):
        run((*until("remove-noops"), Broken(rename)))


def swapped(step: StepGraph, op: str) -> None:
    """Let the program's first instruction of that operator have its first two operands the wrong way round."""
    assert step.program is not None
    instructions = list(step.program.instructions)
    at = next(i for i, instruction in enumerate(instructions) if instruction.op == op)
    first, second, *rest = instructions[at].inputs
    instructions[at] = replace(instructions[at], inputs=(second, first, *rest))
    step.program = replace(step.program, instructions=tuple(instructions))


@dataclass(frozen=True)
class WrongOperands(Lower):
    """Lowers to a program that is well-formed, but mistakes keys for queries."""

    name = "lower"

    def run(self, step: StepGraph) -> PassResult:
        result = super().run(step)
        swapped(step, "dllmc.glu.default")
        return result


@dataclass(frozen=True)
class SwapsLater(Pass):
    """The same of a program that is planned."""

    name = "swaps-later"

    def run(self, step: StepGraph) -> PassResult:
        swapped(step, "dllmc.glu.default")
        return PassResult(False)


@pytest.mark.parametrize(
    ("passes", "blamed"),
    [
        ((*until("fuse-glu"), WrongOperands(), *until("plan-memory")[-1:]), "plan-memory"),
        ((*until("lower"), *until("plan-memory")[-1:], SwapsLater()), "swaps-later"),
    ],
    ids=("before it is planned", "after"),
)
def test_a_program_that_computes_something_else(passes: tuple[Pass, ...], blamed: str) -> None:
    """Programs run once they are planned: the pass that ends before is named, and that the graph is not at fault."""
    options = CompileOptions(64, 4, 16, passes=passes, verify="numeric")
    with pytest.raises(PassError) as error:
        compiler.rewrite(Model(), SPEC, options)
    assert str(error.value).startswith(f"pass {blamed!r} changed what the step computes: ")
    assert str(error.value).endswith("the graph is as it was, the program made from it computes something else")


@pytest.mark.parametrize(
    ("dtype", "most", "shifted"), [(torch.float32, 1e-6, True), (torch.bfloat16, 3e-2, False)], ids=str
)
def test_correct_passes_pass(dtype: torch.dtype, most: float, shifted: bool) -> None:
    """What is left of the whole pipeline is rounding, and the program equals its graph; all of it is recorded."""
    check = NumericCheck(compiler._execute)
    log = pipeline.run(captured(Model().to(dtype), replace(SPEC, shifted=shifted)), until("plan-memory"), check)
    assert [text for text, _ in check.errors] == [e.text for e in log if e.modified] + ["plan-memory"]
    assert {"pack-tokens", "select-logit-rows", "fuse-head", "fuse-norm", "fuse-rope", "fuse-glu"} <= dict(
        check.errors
    ).keys()
    assert all(0 <= error <= most for _, error in check.errors)
    assert dict(check.errors)["plan-memory"] <= 1e-6
    assert (dict(check.errors)["fuse-norm"] > 0) or dtype == torch.float32


def test_verification_is_an_option_of_compiling() -> None:
    """`verify="numeric"` checks every pass, and the other observers still look on."""
    seen = NumericCheck()
    options = CompileOptions(64, 4, 16, passes=(*until("pack-tokens"), Broken(scale_attention)), verify="numeric")
    with pytest.raises(PassError, match="pass 'broken' changed what the step computes"):
        compiler.rewrite(Model(), SPEC, options, seen)
    assert [text for text, _ in seen.errors] == [p.name for p in until("pack-tokens") if p.name in dict(seen.errors)]
    assert seen.errors


def test_weights_are_needed() -> None:
    """A model on the meta device is refused by the first pass, whatever it is."""
    with torch.device("meta"):
        model = Model()
    model.cos, model.sin = two_layers.ANGLES.cos(), two_layers.ANGLES.sin()
    with pytest.raises(
        PassError, match=r"verify='numeric' runs the graph, but its weights are on the meta device; load"
    ):
        run(until("cse"), model)


@settings(deadline=None, derandomize=True)
@given(
    maxima=st.fixed_dictionaries(
        {
            "tokens": st.integers(2, 60),
            "rows": st.integers(1, 20),
            "guided": st.integers(1, 4),
            "segments": st.integers(1, 5),
        }
    ),
    longest=st.integers(2, 40),
    lengths=st.sampled_from((*verify.ONE, *verify.SEVERAL)),
    seed=st.integers(0, 9),
)
def test_random_inputs_fit_a_step(maxima: dict[str, int], longest: int, lengths: tuple[int, ...], seed: int) -> None:
    """Of no size beyond the largest, positions that restart with each segment, rows that are grouped by segments."""
    step = replace(STEP, maxima=maxima, spec=replace(SPEC, max_positions=longest))
    inputs = random_inputs(step, lengths, seed)
    tokens, rows = len(inputs["token_ids"]), len(inputs["rows"])
    segments = inputs["segments"].tolist()
    assert 1 <= tokens <= maxima["tokens"]
    assert 1 <= rows <= maxima["rows"]
    assert 1 <= len(segments) <= maxima["segments"]
    assert len(inputs["guided"]) == len(inputs["guidance"]) == 0
    assert [start for start, _ in segments] + [tokens] == [0] + [end for _, end in segments]
    assert all(1 <= end - start <= longest for start, end in segments)
    assert inputs["positions"].tolist() == [i for start, end in segments for i in range(end - start)]
    assert 0 <= inputs["token_ids"].min() <= inputs["token_ids"].max() < SPEC.vocab_size
    spans = inputs["row_spans"].tolist()
    assert [start for start, _ in spans] + [rows] == [0] + [end for _, end in spans]
    for segment, ((start, end), (first, last)) in enumerate(zip(segments, spans, strict=True)):
        assert all(start <= row < end for row in inputs["rows"][first:last].tolist())
        assert inputs["row_segment"][first:last].tolist() == [segment] * (last - first)
    assert torch.equal(inputs["row_position"], inputs["positions"][inputs["rows"]])
    assert len(set(inputs["rows"].tolist())) == rows
    per_segment = {"temperature", "top_k", "top_p", "confidence_rule", "seed", "step", "suppressed"}
    assert {len(inputs[name]) for name in per_segment} == {len(segments)}


STEP = captured(Model(), SPEC)
