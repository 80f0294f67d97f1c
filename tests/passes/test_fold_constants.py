"""fold-constants: what depends on no input is computed once."""

import torch

from tests.graphs import Tiny, captured, execute, lines, run, step_inputs, step_of, text

PASSES = "inline-regions,fold-constants"
TABLE = torch.arange(8.0) / 7


def test_calls_on_constants_are_computed_once() -> None:
    """A chain from a range and a buffer becomes one constant, which has the chain's value."""
    step = step_of(lambda m, x: x * (m.table * torch.arange(8)).cos(), table=TABLE)
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == {"folded": 3, "constants": 1}
    assert text(step) == lines(
        """
        0 = mul(x, constant.cos)
        1 = linear(0, head.weight)
        2 = select(1, 0, 0)
        return logits=2
        """
    )
    assert torch.equal(step.tensors["constant.cos"], (TABLE * torch.arange(8)).cos())
    assert torch.equal(execute(step, inputs)["logits"], expected)


def test_only_what_others_use_is_kept() -> None:
    """Of a chain, the values that calls on inputs read become constants, each once."""
    step = step_of(lambda m, x: x * m.table.sin() + m.table.sin().cos(), table=TABLE)
    entry = run(step, "inline-regions,cse,fold-constants")
    assert entry.stats == {"folded": 2, "constants": 2}
    assert text(step).startswith("0 = mul(x, constant.sin)\n1 = add(0, constant.cos)\n")


def test_weights_are_not_folded() -> None:
    """A weight's bytes need not be at hand when compiling: what depends on one is left to the step."""
    step = step_of(lambda m, x: x * m.embed.weight[0].exp())
    before = text(step)
    assert not run(step, PASSES).modified
    assert text(step) == before


def test_a_buffer_without_value_is_left() -> None:
    """One on the meta device has none yet; what is computed from nothing has its value all the same."""
    with torch.device("meta"):
        module = Tiny(lambda m, x: x * m.table.exp() * torch.arange(8, device=x.device).cos(), table=TABLE.to("meta"))
    step = captured(module)
    entry = run(step, PASSES)
    assert entry.stats == {"folded": 2, "constants": 1}
    assert text(step).startswith("0 = exp(self.table)\n1 = mul(x, 0)\n2 = mul(1, constant.cos)\n")
    assert torch.equal(step.tensors["constant.cos"], torch.arange(8).cos())
    assert step.tensors["self.table"].is_meta


def test_a_constant_has_memory_of_its_own() -> None:
    """A folded view does not share the bytes of the constant that it is a view of: each is saved on its own."""

    def body(m: Tiny, x: torch.Tensor) -> torch.Tensor:
        return x * m.tables[0] + m.tables.select(0, 1)

    step = step_of(body, tables=torch.stack((TABLE, TABLE.flip(0))))
    assert run(step, PASSES).modified
    constants = [value for name, value in step.tensors.items() if name.startswith("constant.")]
    assert (
        [value.untyped_storage().nbytes() for value in constants] == [value.nbytes for value in constants] == [32, 32]
    )
