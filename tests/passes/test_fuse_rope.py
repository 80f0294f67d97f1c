"""fuse-rope: rotary embeddings become one operator each, with the gather of positions inside."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import HEAD_DIM, SPEC, Body, Tiny, heads_of, lines, rewritten, text

FLAT = "inline-regions,remove-noops"
PASSES = f"{FLAT},lift-positions,fuse-rope"
DTYPES = (torch.float32, torch.bfloat16)

ANGLES = torch.outer(torch.arange(float(SPEC.max_positions)), 1 / 10 ** torch.arange(0, 1, 2 / HEAD_DIM))
HALVES = {"cos": ANGLES.cos(), "sin": ANGLES.sin()}
TABLES = {name: torch.cat((table, table), dim=-1) for name, table in HALVES.items()}

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotated(rotate: Rotate, by_token: bool = False) -> Body:
    """Rotates x in heads by tables sliced to its length."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        cos, sin = (table[: x.shape[1]] for table in (module.cos, module.sin))
        if by_token:
            return rotate(x.view(1, -1, 2, HEAD_DIM), cos[None, :, None], sin[None, :, None]).flatten(2)
        return rotate(heads_of(x), cos, sin).transpose(1, 2).flatten(2)

    return body


def whole(turned: Callable[[Tensor], Tensor]) -> Rotate:
    return lambda x, cos, sin: x * cos + turned(x) * sin


def by_slices(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def by_chunk(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def by_split(x: Tensor) -> Tensor:
    first, second = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def by_unbind(x: Tensor) -> Tensor:
    """LLaDA's."""
    first, second = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(dim=-2)
    return torch.cat((-second, first), dim=-1)


def wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LLaDA's and Qwen2's: in float32, rounded at the end."""
    x_wide = x.float()
    return (x_wide * cos.float() + by_slices(x_wide) * sin.float()).to(x.dtype)


def factors_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return sin * by_chunk(x) + cos * x


def halves_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's and ESM's with tables of half the width."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def halves_by_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    return torch.cat((cos * first - sin * second, first * sin + second * cos), dim=-1)


def halves_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().split(HEAD_DIM // 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def calls(step_text: str) -> list[str]:
    """The operators of a graph's text, in order."""
    return [line.split(" = ")[1].split("(")[0] for line in step_text.splitlines()[:-1]]


SPELLINGS = {
    "slices": (whole(by_slices), TABLES),
    "chunk": (whole(by_chunk), TABLES),
    "split": (whole(by_split), TABLES),
    "view and unbind": (whole(by_unbind), TABLES),
    "in float32": (wide, TABLES),
    "factors first": (factors_first, TABLES),
    "halves by chunk": (halves_by_chunk, HALVES),
    "halves by slices": (halves_by_slices, HALVES),
    "halves in float32": (halves_wide, HALVES),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_operator(spelling: str, dtype: torch.dtype) -> None:
    """Cases 1 to 3: the operator takes tokens first, and reads the rows of whole tables at the positions."""
    rotate, tables = SPELLINGS[spelling]
    step, entry = rewritten(rotated(rotate), PASSES, dtype, **tables)
    assert entry.modified
    assert entry.stats == {"ropes": 1}
    assert entry.notes == ()
    shown = text(step)
    if "float32" not in spelling:
        assert shown == lines(
            """
            0 = unflatten(x, -1, [2, -1])
            1 = transpose(0, 1, 2)
            2 = select(1, 0, 0)
            3 = transpose(2, 0, 1)
            4 = rope(3, self.cos, self.sin, positions)
            5 = transpose(4, 0, 1)
            6 = unsqueeze(5, 0)
            7 = transpose(6, 1, 2)
            8 = flatten(7, 2)
            9 = linear(8, head.weight)
            10 = select(9, 0, 0)
            return logits=10
            """
        )
    assert not {"mul", "cat", "neg", "chunk", "slice"} & {*calls(shown)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rotate", "tables"), [(whole(by_slices), TABLES), (halves_by_chunk, HALVES)])
def test_tokens_before_heads(rotate: Rotate, tables: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Heads after tokens, [1, tokens, heads, head_dim]: x needs no transposition."""
    step, entry = rewritten(rotated(rotate, by_token=True), PASSES, dtype, **tables)
    assert entry.stats == {"ropes": 1}
    assert text(step) == lines(
        """
        0 = view(x, [1, tokens, 2, 4])
        1 = select(0, 0, 0)
        2 = rope(1, self.cos, self.sin, positions)
        3 = unsqueeze(2, 0)
        4 = flatten(3, 2)
        5 = linear(4, head.weight)
        6 = select(5, 0, 0)
        return logits=6
        """
    ).replace("tokens, 2", "-1, 2")


@pytest.mark.parametrize("rotate", [whole(by_slices), halves_by_chunk])
def test_rows_that_are_not_gathered(rotate: Rotate) -> None:
    """Before positions are an input, the operator reads the rows that the model has made."""
    tables = TABLES if rotate is not halves_by_chunk else HALVES
    step, entry = rewritten(rotated(rotate), f"{FLAT},fuse-rope", **tables)
    assert entry.modified
    assert lines(
        """
        0 = slice(self.cos, 0, None, tokens)
        1 = slice(self.sin, 0, None, tokens)
        2 = unflatten(x, -1, [2, -1])
        3 = transpose(2, 1, 2)
        4 = select(3, 0, 0)
        5 = transpose(4, 0, 1)
        6 = rope(5, 0, 1, None)
        """
    ) in text(step)


def test_angles_made_of_positions() -> None:
    """Qwen2's and Dream's: no table, angles of `arange`; the axis of the batch goes by a view."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        angles = (module.frequencies[None, :, None] @ positions[:, None, :].to(x.dtype)).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = (table.to(x.dtype)[:, None] for table in (angles.cos(), angles.sin()))
        q = heads_of(x)
        return whole(by_slices)(q, cos, sin).transpose(1, 2).flatten(2)

    step, entry = rewritten(body, PASSES, frequencies=ANGLES[1])
    assert entry.stats == {"ropes": 1}
    shown = text(step)
    assert "cos(" in shown
    assert ", None)" in next(line for line in shown.splitlines() if "rope(" in line)


def axes_in_front(module: Tiny, x: Tensor) -> Tensor:
    """LLaDA's: tables [1, 1, max, head_dim]."""
    cos, sin = (table[None, None][:, :, : x.shape[1]] for table in (module.cos, module.sin))
    return whole(by_slices)(heads_of(x), cos, sin).transpose(1, 2).flatten(2)


def axes_on_both_sides(module: Tiny, x: Tensor) -> Tensor:
    """Tables [1, max, 1, head_dim], for tokens before heads."""
    cos, sin = (table[None, :, None][:, : x.shape[1]] for table in (module.cos, module.sin))
    return whole(by_slices)(x.view(1, -1, 2, HEAD_DIM), cos, sin).flatten(2)


@pytest.mark.parametrize(("body", "first"), [(axes_in_front, 1), (axes_on_both_sides, 2)])
def test_tables_with_axes_of_one_row(body: Body, first: int) -> None:
    """Case 3: they are gathered too; their axes of size 1 go by views."""
    step, entry = rewritten(body, f"inline-regions,fold-constants,{PASSES.partition(',')[2]}", **TABLES)
    assert entry.stats == {"ropes": 1}
    shown = text(step)
    assert "index_select" not in shown
    (rope,) = (line for line in shown.splitlines() if "rope(" in line)
    cos = rope.split(", ")[1]
    assert f"\n{cos} = select({int(cos) - 1}, 0, 0)\n" in shown
    assert f"\n{int(cos) - 1} = select(" in shown
    assert shown.count(f", {first}, 0)\n") == 2
    assert rope.endswith(", positions)")


def test_positions_looked_up_by_the_model() -> None:
    """Case 3: a gather of both tables by the same positions goes inside; of others each keeps its own."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        q = heads_of(x)
        same = whole(by_slices)(q, module.cos.index_select(0, positions), module.sin.index_select(0, positions))
        cos, sin = module.cos.index_select(0, positions), module.sin.index_select(0, positions // 2)
        return (same + whole(by_slices)(q, cos, sin)).transpose(1, 2).flatten(2)

    step, entry = rewritten(body, PASSES, **TABLES)
    assert entry.stats == {"ropes": 2}
    ropes = [line for line in text(step).splitlines() if "rope(" in line]
    assert "self.cos, self.sin, positions)" in ropes[0]
    assert ropes[1].endswith(", None)")


def test_heads_of_queries_and_keys_in_one() -> None:
    """Two rotations of one x, or of two, are two calls."""

    def body(module: Tiny, x: Tensor) -> Tensor:
        cos, sin = module.cos[: x.shape[1]], module.sin[: x.shape[1]]
        q, k = heads_of(x), heads_of(x.sin())
        q, k = whole(by_slices)(q, cos, sin), whole(by_slices)(k, cos, sin)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)

    step, entry = rewritten(body, PASSES, **TABLES)
    assert entry.stats == {"ropes": 2}
    assert calls(text(step)).count("rope") == 2


def per_head(module: Tiny, x: Tensor) -> Tensor:
    cos, sin = (table[None, None, : x.shape[1]] * module.scale[:, None, None] for table in (module.cos, module.sin))
    return whole(by_slices)(heads_of(x), cos, sin).transpose(1, 2).flatten(2)


def without_heads(module: Tiny, x: Tensor) -> Tensor:
    cos, sin = (table[: x.shape[1]].repeat(1, 2) for table in (module.cos, module.sin))
    return whole(by_slices)(x, cos, sin)


def two_sequences(module: Tiny, x: Tensor) -> Tensor:
    cos, sin = module.cos[: x.shape[1]], module.sin[: x.shape[1]]
    return whole(by_slices)(torch.cat((heads_of(x), heads_of(x).sin())), cos, sin)[1:].transpose(1, 2).flatten(2)


def a_quarter(module: Tiny, x: Tensor) -> Tensor:
    """x1 is one number wide, x2 three."""

    def turned(x: Tensor) -> Tensor:
        return torch.cat((-x[..., 1:], x[..., :1]), dim=-1)

    return rotated(whole(turned))(module, x)


def even_and_odd(module: Tiny, x: Tensor) -> Tensor:
    """GPT-J's, by views: x1 are the even numbers, x2 the odd."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.view(*x.shape[:-1], HEAD_DIM // 2, 2).unbind(dim=-1)
        return torch.cat((-second, first), dim=-1)

    return rotated(whole(turned))(module, x)


def another_dtype(module: Tiny, x: Tensor) -> Tensor:
    """Tables in float64 make the result float64."""
    cos, sin = (table[: x.shape[1]].double() for table in (module.cos, module.sin))
    return whole(by_slices)(heads_of(x), cos, sin).sin().to(x.dtype).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("body", "note"),
    [
        (per_head, "cos ['1', '2', 's"),
        (without_heads, "expected x of one sequence in four dimensions, found ['1', 's"),
        (two_sequences, "expected x of one sequence in four dimensions, found ['2', '2', 's"),
        (a_quarter, "x is not cut into two halves along its last axis"),
        (even_and_odd, "x is not cut into two halves along its last axis"),
        (another_dtype, "it makes torch.float64 of torch.float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_refused_is_noted(body: Body, note: str) -> None:
    """What has the form of a rotation but is not the operator's stays, with its line and the reason."""
    step, entry = rewritten(body, PASSES, **TABLES, scale=torch.tensor([1.0, 2.0]))
    assert not entry.modified
    assert entry.stats == {"ropes": 0}
    (found,) = entry.notes
    assert f" stays: {note}" in found
    assert "test_fuse_rope.py:" in found or "graphs.py:" in found
    assert "rope" not in str(step.graph)


def turned_the_other_way(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def interleaved(x: Tensor) -> Tensor:
    """GPT-J's: even against odd."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


@pytest.mark.parametrize(
    "rotate",
    [
        whole(turned_the_other_way),
        whole(interleaved),
        whole(swapped),
        lambda x, cos, sin: x * cos - by_slices(x) * sin,
        lambda x, cos, sin: x.sin() * cos + by_slices(x) * sin,
        lambda x, cos, sin: torch.cat((x[..., :2] * cos - x[..., 2:] * sin, x[..., 2:] * sin + x[..., :2] * cos), -1),
    ],
    ids=("the other way", "interleaved", "swapped halves", "a difference", "two values", "sin and cos swapped"),
)
def test_what_is_no_rotation_stays(rotate: Rotate) -> None:
    """Not modified, and nothing to say."""
    tables = HALVES if rotate.__code__.co_names == ("torch", "cat") else TABLES
    step, entry = rewritten(rotated(rotate), PASSES, **tables)
    assert not entry.modified
    assert entry.notes == ()
    assert "rope" not in str(step.graph)
