"""The HTML page: the data in it is the trace, each view shows a pass's difference, and it asks nothing of a network."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dllmc.artifact import Artifact, read
from dllmc.cli import page
from dllmc.ir.trace import Trace, from_json
from tests.artifacts import write
from tests.cli.test_commands import run
from tests.golden.cases import ROOT
from tests.ir.stacks import call
from tests.ir.test_trace import GRAPHS, INPUT, RETURN, SMALL


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of the one that holds the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


@pytest.fixture
def small(tmp_path: Path) -> Artifact:
    return write(tmp_path / "out", trace=SMALL)


def test_the_data_is_the_trace(tiny_llada: Path, tmp_path: Path) -> None:
    """Parsed back from the page it is the artifact's, and what each view names makes up the graphs."""
    file = tmp_path / "page.html"
    assert run("inspect", tiny_llada, "--html", file).stdout == f"wrote {file}\n"
    data = json.loads(Parsed(file.read_text(encoding="utf-8")).data)
    artifact = read(tiny_llada)
    trace = artifact.load_trace()
    assert trace is not None
    assert from_json(data["trace"], "page") == trace
    assert data["memory"] == dict(artifact.memory)
    assert data["options"] == artifact.manifest["options"]
    assert [program["name"] for program in data["programs"]] == ["mixed", "dense", "refresh", "reuse"]
    assert len(data["programs"][0]["buffers"]) == len(artifact.program.buffers)
    records = from_json({**data["trace"], "graphs": [[[0, len(data["trace"]["records"])]]], "passes": []}, "").graphs[0]
    for number, (view, graph) in enumerate(zip(data["views"], trace.graphs, strict=True)):
        rows = [*view["inputs"], *(row for group in view["groups"] for row in group["rows"]), *view["returns"]]
        pairs = [row if isinstance(row, list) else [row, row] for row in rows]
        assert [records[new] for new, _ in pairs if new >= 0] == list(graph)
        before = trace.graphs[max(0, number - 1)]
        assert {records[old] for _, old in pairs if old >= 0} == set(before)


def test_nothing_is_loaded_from_elsewhere(small: Artifact) -> None:
    """No link, no source, no style or script from outside; the policy forbids them too."""
    text = page.render(small, SMALL)
    elements = Parsed(text).elements
    assert {tag for tag, _ in elements}.isdisjoint({"link", "img", "iframe", "base", "object", "embed", "form"})
    assert not [attributes for _, attributes in elements if {"src", "href"} & attributes.keys()]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|\bfetch\b|XMLHttpRequest|WebSocket", text)
    policy = next(a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_of_a_model_never_becomes_markup(tmp_path: Path) -> None:
    """A source line that closes the script, and an artifact's name with markup in it, stay text."""
    evil = "</script><script>alert(1)</script><!--"
    named = replace(write(tmp_path / "out"), path=tmp_path / "<b>x")
    trace = Trace({}, ((replace(call("a"), source=evil),),), ())
    text = page.render(named, trace)
    parsed = Parsed(text)
    assert evil not in text
    assert "b" not in {tag for tag, _ in parsed.elements}
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    data = json.loads(parsed.data)
    assert data["trace"]["sources"] == [evil]
    assert data["title"] == "<b>x"


def test_a_view_says_what_a_pass_added_removed_and_edited() -> None:
    """One number for what stayed, [new, old] for what did not; what is gone stands behind what came before it."""
    first = (INPUT, call("a", "%ids"), call("b", "%a"), call("c", "%b"), RETURN)
    second = (INPUT, call("b", "%ids"), call("new", "%b"), call("c", "%new"), RETURN)
    _, view = page.views(Trace({}, (first, second), ()))
    [group] = view["groups"]
    assert view["inputs"] == [0]
    # Records: ids, a, b, c, return; then b, new and c as the second graph has them.
    assert group["rows"] == [[-1, 1], [5, 2], [6, -1], [7, 3]]
    assert view["returns"] == [4]


def test_the_first_view_shows_no_change() -> None:
    view = page.views(SMALL)[0]
    assert [*view["inputs"], *view["groups"][0]["rows"], *view["returns"]] == [*range(len(GRAPHS[0]))]


def test_layers_fold_only_where_a_pass_did_the_same_to_them() -> None:
    """A layer in which something else was removed is not like the others, though the graph behind it is."""

    def layer(index: int, reads: str, *more: str) -> list:  # type: ignore[type-arg]
        path = f"l.{index}"
        return [call(f"a{index}", f"%{reads}", path), *(call(f"{m}{index}", f"%a{index}", path) for m in more)]

    after = tuple(call for index in range(4) for call in layer(index, f"a{index - 1}" if index else "x"))
    before = tuple(
        call
        for index in range(4)
        for call in layer(index, f"a{index - 1}" if index else "x", *(["old"] if index < 3 else []))
    )
    start = (call("x"),)
    plain, changed = page.views(Trace({}, ((*start, *after), (*start, *after)), ()))
    assert [group["like"] for group in plain["groups"]] == [None, None, 1, 1, 1]
    _, changed = page.views(Trace({}, ((*start, *before), (*start, *after)), ()))
    assert [group["like"] for group in changed["groups"]] == [None, None, 1, 1, None]


def test_a_page_made_while_compiling_has_the_times(tmp_path: Path) -> None:
    """Of each pass two, which no artifact tells."""
    page_file, out = tmp_path / "page.html", tmp_path / "out"
    result = run("compile", ROOT / "llada-mha", out, "--html", page_file)
    assert result.stdout.endswith(f"wrote {page_file}\nwrote {out}\n")
    data = json.loads(Parsed(page_file.read_text(encoding="utf-8")).data)
    assert [len(pair) for pair in data["times"]] == [2] * len(data["trace"]["passes"])
    assert all(seconds >= 0 for pair in data["times"] for seconds in pair)
    assert json.loads(Parsed(page.render(read(out), from_json(data["trace"], ""))).data) == {**data, "times": []}


def test_an_older_page_is_replaced(tiny_llada: Path, tmp_path: Path) -> None:
    """And with --json the document goes to standard output as ever."""
    file = tmp_path / "page.html"
    file.write_text("older")
    result = run("inspect", tiny_llada, "--html", file, "--json")
    assert json.loads(result.stdout) == json.loads(run("inspect", tiny_llada, "--json").stdout)
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [file]
