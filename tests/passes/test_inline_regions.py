"""inline-regions: the bodies of wrapped regions become part of the graph."""

import pytest
import torch
from torch import Tensor

from dllmc.errors import CaptureError
from tests.graphs import Body, Tiny, captured, execute, lines, run, step_inputs, step_of, text


def without_grad(module: Tiny, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
    return x * y


def without_autocast(module: Tiny, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x.exp()
    return x * y


def nested(module: Tiny, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sin()
        with torch.autocast("cpu", enabled=False):
            y = y.exp()
    return x * y


def several_results(module: Tiny, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
        z = y.sin()
    return x * y + z


@pytest.mark.parametrize(
    ("body", "inlined", "after"),
    [
        (without_grad, 1, "0 = exp(x) \n 1 = mul(x, 0)"),
        (without_autocast, 1, "0 = exp(x) \n 1 = mul(x, 0)"),
        (nested, 2, "0 = sin(x) \n 1 = exp(0) \n 2 = mul(x, 1)"),
        (several_results, 1, "0 = exp(x) \n 1 = sin(0) \n 2 = mul(x, 0) \n 3 = add(2, 1)"),
    ],
    ids=("case 1: grad mode", "case 2: autocast that is disabled", "a region in a region", "a region with two results"),
)
def test_bodies_take_the_place_of_regions(body: Body, inlined: int, after: str) -> None:
    """Cases 1 and 2: the calls of the region stand where the region stood, and compute the same."""
    step = step_of(body)
    assert "wrap_with" in text(step)
    inputs = step_inputs(5)
    expected = execute(step, inputs)["logits"]
    entry = run(step, "inline-regions")
    assert entry.modified
    assert entry.stats == {"inlined": inlined}
    assert lines(after) in text(step)
    assert "wrap_with" not in text(step)
    assert not step.graph.find_nodes(op="get_attr")
    assert torch.equal(execute(step, inputs)["logits"], expected)


def test_a_graph_without_regions_stays_as_it_is() -> None:
    """Nothing to inline: not modified."""
    step = step_of(lambda module, x: x.exp())
    before = text(step)
    assert not run(step, "inline-regions").modified
    assert text(step) == before


class Autocast(Tiny):
    """A forward of its own, so that messages can name its line."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x.exp()
        return self.head(x)


def test_an_enabled_autocast_region_is_refused() -> None:
    """Its casts are not in the graph; the message names the line and what to do."""
    step = captured(Autocast())
    with pytest.raises(CaptureError, match="autocast region that is enabled; convert the model to one dtype") as error:
        run(step, "inline-regions")
    assert "test_inline_regions.py" in str(error.value)
    assert "in forward: x = x.exp()" in str(error.value)
