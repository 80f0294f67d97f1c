"""lift-positions: what counts along the sequence becomes the input `positions`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllmc.errors import CaptureError, PassError
from tests.graphs import SPEC, WIDTH, Body, Tiny, captured, execute, lines, run, step_inputs, step_of, text

PASSES = "inline-regions,remove-noops,lift-positions"
ROWS = 40  # more than the longest sequence has positions
TABLE = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def counted(module: Tiny, x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[1])[:, None]


def counted_as_floats(module: Tiny, x: Tensor) -> Tensor:
    return x * torch.arange(0, x.shape[1], 1, dtype=torch.float32)[:, None]


def table(module: Tiny, x: Tensor) -> Tensor:
    return x + module.table[: x.shape[1]]


def table_on_another_axis(module: Tiny, x: Tensor) -> Tensor:
    return x + module.table.view(1, 1, ROWS, WIDTH)[:, :, : x.shape[1], :][:, 0]


def list_of_positions(module: Tiny, x: Tensor) -> Tensor:
    """BERT's way to token types: a row of integers, looked up at positions [1, T]."""
    positions = torch.arange(x.shape[1])[None] + 2
    return x * module.row.expand(1, -1).gather(1, positions)[..., None]


def weight(module: Tiny, x: Tensor) -> Tensor:
    return x + module.qkv.weight[: x.shape[1]]


@pytest.mark.parametrize(
    ("body", "stats", "after"),
    [
        (counted, {"ranges": 1, "tables": 0, "lists": 0}, "0 = unsqueeze(positions, 1) \n 1 = mul(x, 0)"),
        (
            counted_as_floats,
            {"ranges": 1, "tables": 0, "lists": 0},
            "0 = to(positions, float32) \n 1 = unsqueeze(0, 1) \n 2 = mul(x, 1)",
        ),
        (table, {"ranges": 0, "tables": 1, "lists": 0}, "0 = index_select(self.table, 0, positions) \n 1 = add(x, 0)"),
        (
            table_on_another_axis,
            {"ranges": 0, "tables": 1, "lists": 0},
            "0 = view(self.table, [1, 1, 40, 8]) \n 1 = index_select(0, 2, positions) \n 2 = select(1, 1, 0)",
        ),
        (
            list_of_positions,
            {"ranges": 1, "tables": 0, "lists": 1},
            "0 = unsqueeze(positions, 0) \n 1 = add(0, 2) \n 2 = flatten(1) \n 3 = index_select(self.row, 1, 2)",
        ),
        (weight, {"ranges": 0, "tables": 1, "lists": 0}, "0 = index_select(qkv.weight, 0, positions) \n 1 = add(x, 0)"),
    ],
    ids=(
        "case 1: a range",
        "case 1: a range of floats",
        "case 2: a table",
        "case 2: a table along axis 2",
        "case 3: a list",
        "case 2: a learned table",
    ),
)
def test_what_counts_along_the_sequence_reads_positions(body: Body, stats: dict[str, int], after: str) -> None:
    """Cases 1 to 3: with positions 0, 1, ... as before; with others, what a longer sequence has there."""
    step = step_of(body, spec=replace(SPEC, max_positions=24), table=TABLE, row=torch.arange(100, 100 + ROWS)[None])
    inputs = step_inputs(9)
    expected = execute(step, inputs)["logits"]
    entry = run(step, PASSES)
    assert entry.modified
    assert entry.stats == stats
    assert text(step).startswith(lines(after))
    assert torch.equal(execute(step, inputs)["logits"], expected)
    some = torch.tensor([7, 2, 2, 8])
    moved = {name: inputs[name][some] for name in ("token_ids", "positions")}
    assert torch.equal(execute(step, moved)["logits"], expected[some])


def test_ranges_and_tables_of_fixed_size_stay() -> None:
    """A range or a slice that does not depend on the length counts something else."""
    step = step_of(lambda m, x: x * torch.arange(WIDTH) + m.table[:1], table=TABLE)
    before = text(step)
    assert not run(step, PASSES).modified
    assert text(step) == before


class TooShort(Tiny):
    """Looks up positions that begin at 9."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x + F.embedding(torch.arange(x.shape[1]) + 9, self.table)
        return self.head(x)


@pytest.mark.parametrize(("max_positions", "refused"), [(31, False), (32, True)])
def test_a_table_must_have_a_row_for_each_position(max_positions: int, refused: bool) -> None:
    """Export checks that of slices alone; the error says how long a sequence may be."""
    step = captured(TooShort(table=TABLE), replace(SPEC, max_positions=max_positions))
    if not refused:
        assert run(step, PASSES).modified
        return
    with pytest.raises(CaptureError, match=r"row 40 of a table of 40 .* max_positions to 31 or less") as error:
        run(step, PASSES)
    assert "F.embedding(torch.arange(x.shape[1]) + 9, self.table)" in str(error.value)


class Reversed(Tiny):
    """Counts down: what it adds at a position depends on the length."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x + torch.arange(x.shape[1] - 1, -1, -1)[:, None]
        return self.head(x)


class Scaled(Tiny):
    """Scales by the length itself."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x / x.shape[1]
        return self.head(x)


class Shifted(Tiny):
    """Reads a table from its second row on."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x + self.table[1 : x.shape[1] + 1]
        return self.head(x)


class SlicedTokens(Tiny):
    """Slices the tokens themselves, which are no table, whatever remove-noops would make of it."""

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed(token_ids)
        x = x[:, : x.shape[1]].exp()
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (Reversed, "torch.arange(x.shape[1] - 1, -1, -1)"),
        (Scaled, "x = x / x.shape[1]"),
        (Shifted, "self.table[1 : x.shape[1] + 1]"),
        (SlicedTokens, "x = x[:, : x.shape[1]].exp()"),
    ],
)
def test_other_dependence_on_the_length_is_refused(model: type[Tiny], code: str) -> None:
    """A value that depends on the length of its sequence has none in a packed step; the line is named."""
    step = captured(model(table=TABLE))
    with pytest.raises(PassError, match="depends on the length of the sequence") as error:
        run(step, "inline-regions,lift-positions")
    assert code in str(error.value)
