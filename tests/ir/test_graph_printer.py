"""Graphs as text: one line a call, layer by layer, and layers that do the same shown once."""

import pytest

from dllmc.ir.graph_printer import COMMENT, folded, in_layer, size, text_of
from dllmc.ir.listing import listing
from dllmc.ir.trace import Call
from tests.graphs import captured
from tests.ir.stacks import Block, Stack, call


def without_source(text: str) -> list[str]:
    """The lines of a graph's text, without the user's lines and trailing spaces."""
    return [line.partition(COMMENT)[0] for line in text.splitlines()]


def test_the_text_of_a_graph() -> None:
    """Every line of a model of four equal layers, and the fourth with an activation."""
    step = captured(Stack([Block(), Block(), Block(), Block(activated=True)]))
    assert without_source(text_of(listing(step))) == [
        "calls 17, written 31.25 KiB",
        "",
        "inputs",
        "  %token_ids : int64[tokens]      512 B",
        "",
        "outside of layers: calls 2, written 2 KiB",
        "  %unsqueeze = aten.unsqueeze(%token_ids, 0)            : int64[1, tokens]            view",
        "  %embedding = aten.embedding(embed.weight, %unsqueeze) : float32[1, tokens, 8]      2 KiB",
        "",
        "layers.0: calls 3, written 6 KiB",
        "  %rms_norm = aten.rms_norm(%embedding, [8], .norm.weight) : float32[1, tokens, 8]      2 KiB",
        "  %linear = aten.linear(%rms_norm, .up.weight)             : float32[1, tokens, 8]      2 KiB",
        "  %add = aten.add.Tensor(%embedding, %linear)              : float32[1, tokens, 8]      2 KiB",
        "",
        "layers.1 to 2: as layers.0",
        "",
        "layers.3: calls 4, written 8 KiB",
        "  %rms_norm_3 = aten.rms_norm(%add_2, [8], .norm.weight) : float32[1, tokens, 8]      2 KiB",
        "  %linear_3 = aten.linear(%rms_norm_3, .up.weight)       : float32[1, tokens, 8]      2 KiB",
        "  %silu = aten.silu(%linear_3)                           : float32[1, tokens, 8]      2 KiB",
        "  %add_3 = aten.add.Tensor(%add_2, %silu)                : float32[1, tokens, 8]      2 KiB",
        "",
        "outside of layers: calls 2, written 3.25 KiB",
        "  %linear_4 = aten.linear(%add_3, head.weight) : float32[1, tokens, 13]   3.25 KiB",
        "  %select = aten.select.int(%linear_4, 0, 0)   : float32[tokens, 13]          view",
        "",
        "return logits=%select",
    ]


def test_all_layers() -> None:
    """Folded layers are written out when they are asked for."""
    text = text_of(listing(captured(Stack([Block(), Block(), Block()]))), all_layers=True)
    assert [line for line in text.splitlines() if line.startswith("layers.")] == [
        f"layers.{index}: calls 3, written 6 KiB" for index in range(3)
    ]


def test_the_users_line_stands_where_it_changes() -> None:
    """File, line and code, once for all calls in a row that came from it."""
    text = text_of(listing(captured(Stack([Block()]))))
    sources = {
        line.split()[0]: line.partition(COMMENT)[2].partition(": ")[2] for line in text.splitlines() if " = " in line
    }
    assert sources["%rms_norm"] == "h = self.up(self.norm(x))"
    assert sources["%linear"] == ""
    assert sources["%add"] == "return x + h"
    assert "  # stacks.py:" in text


def test_layers_that_alternate_fold_into_the_first_of_their_kind() -> None:
    """0 and 2, 1 and 3: each is like the first of its kind, though not like the one before it."""
    graph = listing(captured(Stack([Block(), Block(True), Block(), Block(True)])))
    groups = folded((call,) for call in graph if call.operator not in ("input", "return"))
    assert [(group.layer, group.like) for group in groups] == [
        ("", None),
        *(("layers.0", None), ("layers.1", None), ("layers.2", 1), ("layers.3", 2)),
        ("", None),
    ]


def layers(*groups: list[Call]) -> list[int | None]:
    """What each group of calls is like, behind a call `%x` outside of layers."""
    rows = [call("x"), *(call for group in groups for call in group)]
    return [group.like for group in folded((row,) for row in rows)][1:]


@pytest.mark.parametrize(
    ("second", "folds"),
    [
        ([call("c", "%b, 1", "l.1"), call("d", "%c, l.1.w", "l.1")], True),
        ([call("c", "%a, 1", "l.1"), call("d", "%c, l.1.w", "l.1")], True),  # of layer 0, which reads another group
        ([call("c", "%b, 2", "l.1"), call("d", "%c, l.1.w", "l.1")], False),
        ([call("c", "%b, 1", "l.1"), call("d", "%b, l.1.w", "l.1")], False),
        ([call("c", "%b, 1", "l.1"), call("d", "%c, l.0.w", "l.1")], False),
        ([call("c", "%b, 1", "l.1"), call("d", "%c, l.1.v", "l.1")], False),
        ([call("c", "%b, 1", "l.1", type="int64[2]"), call("d", "%c, l.1.w", "l.1")], False),
        ([call("c", "%b, 1", "l.1", operator="other"), call("d", "%c, l.1.w", "l.1")], False),
        ([call("c", "%b, 1", "l.1")], False),
    ],
)
def test_what_makes_two_layers_alike(second: list[Call], folds: bool) -> None:
    """The same calls of the same values of its own, of its own weights, and of one value of the group before it."""
    first = [call("a", "%x, 1", "l.0"), call("b", "%a, l.0.w", "l.0")]
    assert layers(first, second) == [None, 1 if folds else None]


def test_one_value_is_read_where_the_other_layer_reads_one() -> None:
    """A layer that reads two values of the layer before it is not like one that reads the same value twice."""
    first = [call("a", "%x, %x", "l.0"), call("b", "%a", "l.0")]
    assert layers(first, [call("c", "%b, %b", "l.1"), call("d", "%c", "l.1")]) == [None, 1]
    assert layers(first, [call("c", "%a, %b", "l.1"), call("d", "%c", "l.1")]) == [None, None]


def test_a_layer_that_reads_another_place_is_shown() -> None:
    """Layer 2 reads the first value of layer 1 instead of its last; behind it layer 3 reads as layer 1 does."""
    graph = [
        [call("a", "%x, 7", "l.0"), call("b", "%a", "l.0")],
        [call("c", "%b", "l.1"), call("d", "%c", "l.1")],
        [call("e", "%c", "l.2"), call("f", "%e", "l.2")],
        [call("g", "%f", "l.3"), call("h", "%g", "l.3")],
    ]
    assert layers(*graph) == [None, None, None, 2]


def test_what_is_of_no_layer_amid_one_belongs_to_it() -> None:
    groups = folded((row,) for row in (call("a", layer="l.0"), call("b"), call("c", layer="l.0"), call("d")))
    assert [(group.layer, len(group.rows)) for group in groups] == [("l.0", 3), ("", 1)]


def test_names_below_a_layers_heading() -> None:
    """The layer's own path goes, each time; a path that only begins or ends like it stays."""
    text = "a.layers.1.w+layers.1.q.weight, layers.10.w, layers.1.b"
    assert in_layer(text, "layers.1") == "a.layers.1.w+.q.weight, layers.10.w, .b"


def test_sizes_for_people() -> None:
    """Bytes are shown in the largest unit that keeps them above one, to four digits."""
    assert [size(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3 MiB", "5 GiB"]
