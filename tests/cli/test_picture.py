"""Pictures of the arena: every box is where the plan has its buffer, nothing overlaps, and mistakes are told."""

import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dllmc.artifact import read
from dllmc.cli.picture import html, layout, png
from dllmc.cli.picture.scene import COLOURS, Box, Scene, Text, text_width
from dllmc.cli.picture.scene import Path as Line
from dllmc.ir.graph_printer import size
from dllmc.ir.program import Instruction, Program, aligned
from dllmc.memory.kinds import KINDS, kinds
from tests.artifacts import small_program, write
from tests.cli.test_commands import run
from tests.memory.test_timeline import looped
from tests.programs import TOKENS, planned, program, tensor

WHOLE = "After planning"


@dataclass
class Rectangle:
    """A box of the page and what is shown where one points at it."""

    x: float
    y: float
    width: float
    height: float
    about: str = ""


@dataclass
class Parsed(HTMLParser):
    """The page's tags, text, and boxes below each heading."""

    page: str
    tags: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    boxes: dict[str, list[Rectangle]] = field(default_factory=lambda: {"": []})

    def __post_init__(self) -> None:
        super().__init__()
        self.heading = ""
        self.feed(self.page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {key: value or "" for key, value in attrs}
        if tag == "rect":
            self.boxes[self.heading].append(Rectangle(*(float(given[n]) for n in ("x", "y", "width", "height"))))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["title"] and "svg" in self.tags:
            self.boxes[self.heading][-1].about += data
        elif self.tags[-1:] == ["text"] and data.strip():
            self.texts.append(data)
            if data in ("Before planning", "Live bytes", WHOLE) or data.startswith("Enlarged: "):
                self.heading = data
                self.boxes[data] = []

    def of_buffers(self, heading: str, step: Program) -> dict[str, Rectangle]:
        """The boxes of buffers below a heading, by name."""
        named = {box.about.split(": ")[0]: box for box in self.boxes[heading]}
        return {name: box for name, box in named.items() if name in step.buffers}


def layered(count: int) -> Program:
    """A planned program of `count` feed-forward layers with four instructions each, between an embedding and a head."""
    buffers = {"%stream": tensor(TOKENS, 64)}
    calls: list[tuple[list[str], list[str]]] = [(["wte"], ["%stream"])]
    operators = ["aten.embedding.default"]
    stream = "%stream"
    for n in range(count):
        up, hidden, down, added = (f"%{part}_{n}" for part in ("up", "hidden", "down", "stream"))
        buffers |= {up: tensor(TOKENS, 256), hidden: tensor(TOKENS, 256)}
        buffers |= {down: tensor(TOKENS, 64), added: tensor(TOKENS, 64)}
        calls += [([stream, f"model.layers.{n}.up"], [up]), ([up], [hidden])]
        calls += [([hidden, f"model.layers.{n}.down"], [down]), ([stream, down], [added])]
        operators += ["aten.linear.default", "aten.gelu.default", "aten.linear.default", "aten.add.Tensor"]
        stream = added
    calls.append(([stream, "head"], ["%token"]))
    names = ["wte", *(f"model.layers.{n}.{part}" for n in range(count) for part in ("up", "down")), "head"]
    weights = {name: tensor(4) for name in names}
    plain = program({**buffers, "%token": tensor(TOKENS)}, calls, ["%token"], weights=weights)
    named = zip(
        (instruction for instruction, _ in plain.calls()), (*operators, "dllmc.decode_head.default"), strict=True
    )
    return planned(replace(plain, instructions=tuple(replace(instruction, op=op) for instruction, op in named)))


def with_gap() -> Program:
    """A plan of four layers in an arena twice as large as what is live at once."""
    step = layered(4)
    assert step.lower_bound_bytes is not None
    return replace(step, arena_bytes=2 * step.lower_bound_bytes)


@pytest.fixture(scope="module")
def page(tiny_llada: Path, tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    file = tmp_path_factory.mktemp("page") / "memory.html"
    assert run("inspect", tiny_llada, "--memory", file).stdout == f"wrote {file}\n"
    return Parsed(file.read_text(encoding="utf-8"))


def test_each_box_is_where_the_plan_has_its_buffer(page: Parsed, tiny_llada: Path) -> None:
    """Time is x and bytes are y, in one scale for all; each says what it is."""
    step = read(tiny_llada).program
    boxes = page.of_buffers(WHOLE, step)
    assert boxes.keys() == step.buffers.keys()
    assert_scaled(boxes, step, {name: buffer.offset or 0 for name, buffer in step.buffers.items()})
    known = kinds(step)
    for name, box in boxes.items():
        buffer = step.buffers[name]
        assert buffer.lifetime is not None
        assert box.about.startswith(f"{name}: {known[name]}\n")
        assert f"{size(aligned(buffer.size_bytes(step.maxima)))} at offset {buffer.offset}\n" in box.about
        assert f"alive [{buffer.lifetime[0]}, {buffer.lifetime[1]})\n" in box.about
        assert f"{buffer.dtype}[{', '.join(map(str, buffer.shape))}], " in box.about


def test_before_planning_each_buffer_has_memory_of_its_own(page: Parsed, tiny_llada: Path) -> None:
    """In the order in which they are written, one behind the other."""
    step = read(tiny_llada).program
    boxes = page.of_buffers("Before planning", step)
    assert boxes.keys() == step.buffers.keys()
    offsets, top = {}, 0
    for name in boxes:
        offsets[name] = top
        top += aligned(step.buffers[name].size_bytes(step.maxima))
    assert_scaled(boxes, step, offsets)
    starts = [step.buffers[name].lifetime for name in boxes]
    assert starts == sorted(starts, key=lambda lifetime: (lifetime or (0, 0))[0])
    assert f"{size(top)} of buffers in an arena of {size(step.arena_bytes or 0)}" in page.texts[0]


def assert_scaled(boxes: dict[str, Rectangle], step: Program, offsets: dict[str, int]) -> None:
    """Left, right, top and bottom of all boxes are on one scale: that of a straight line through them."""
    edges: list[tuple[float, float]] = []
    bytes_: list[tuple[float, float]] = []
    for name, box in boxes.items():
        start, stop = step.buffers[name].lifetime or (0, 0)
        end = offsets[name] + aligned(step.buffers[name].size_bytes(step.maxima))
        edges += [(start, box.x), (stop, box.x + box.width)]
        bytes_ += [(offsets[name], box.y + box.height), (end, box.y)]
    for points, sign in ((edges, 1), (bytes_, -1)):
        given, drawn = np.array(points).T
        slope, base = np.polyfit(given, drawn, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(base + slope * given, drawn, atol=0.03)  # coordinates have two decimals


def test_the_enlarged_part_is_a_layer(page: Parsed, tiny_llada: Path) -> None:
    """One in which the peak is reached, with every buffer that is alive in it, and with the instructions' names."""
    step = read(tiny_llada).program
    [heading] = [heading for heading in page.boxes if heading.startswith("Enlarged")]
    path = heading.removeprefix("Enlarged: ")
    [layer] = {box.about for box in page.boxes[heading] if box.about.startswith(f"{path}\n")}
    first, last = map(int, re.findall(r"\d+", layer.splitlines()[1]))
    alive = {n for n, b in step.buffers.items() if b.lifetime and b.lifetime[0] <= last and b.lifetime[1] > first}
    assert page.of_buffers(heading, step).keys() == alive
    [peak] = [text for text in page.texts if "Most is live at instruction" in text]
    assert peak.endswith(f": {size(step.lower_bound_bytes or 0)}.")
    assert {"attention", "glu", "add_rms_norm"} <= set(page.texts)


def test_nothing_is_loaded_from_elsewhere(page: Parsed) -> None:
    """No script, no link, no image; the policy forbids them too."""
    assert set(page.tags).isdisjoint({"script", "link", "img", "iframe", "base", "object", "embed", "a", "use"})
    assert not re.search(r"https?://|@import|url\(|\b(?:src|href)=", page.page)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.page


def test_live_bytes_are_drawn_kind_upon_kind() -> None:
    """The areas' upper edge is what is alive: its highest point is the lower bound, and each kind has its share."""
    step = layered(3)
    scene = layout.figure(step, "x")
    areas = [m for m in scene.marks if isinstance(m, Line) and m.filled and m.colour in KINDS]
    assert {area.colour for area in areas} == {"residual stream", "feed-forward", "output projections", "head"}
    [plot] = plots(scene)[1:2]
    for index in range(len(step.instructions)):
        x = plot.x + plot.width * (index + 0.5) / len(step.instructions)
        live = sum(
            aligned(b.size_bytes(step.maxima))
            for b in step.buffers.values()
            if b.lifetime and b.lifetime[0] <= index < b.lifetime[1]
        )
        height = plot.height * live / (step.arena_bytes or 1)
        spans = [span_at(area, x) for area in areas]
        assert sum(low - high for high, low in spans) == pytest.approx(height)
        assert min(high for high, _ in spans) == pytest.approx(plot.y + plot.height - height)


def plots(scene: Scene) -> list[Box]:
    """The backgrounds of the diagrams: before, live bytes, the arena, and maybe a part of it."""
    return [mark for mark in scene.marks if isinstance(mark, Box) and mark.colour == "plot"]


def span_at(area: Line, x: float) -> tuple[float, float]:
    """The upper and the lower edge of an area over an x that is none of its corners'."""
    ends = zip(area.points, (*area.points[1:], area.points[0]), strict=True)
    crossed = [a[1] for a, b in ends if min(a[0], b[0]) < x < max(a[0], b[0])]
    return min(crossed), max(crossed)


def test_an_arena_above_the_bound_shows_the_gap(tmp_path: Path) -> None:
    """In the text, and in the picture as a band between the two."""
    small = small_program()
    bound = small.lower_bound_bytes or 0
    out = write(tmp_path / "out", dense=replace(small, arena_bytes=2 * bound)).path
    told = f"{size(bound)} (100.0%) above the lower bound of {size(bound)}"
    assert run("inspect", out).stdout.endswith(f"{size(2 * bound)} for 2 buffers, {told}\n")
    step = with_gap()
    arena, bound = step.arena_bytes or 0, step.lower_bound_bytes or 0
    told = f"{size(arena - bound)} (100.0%) above the lower bound of {size(bound)}"
    scene = layout.figure(step, "x")
    assert any(told in mark.text for mark in scene.marks if isinstance(mark, Text))
    [gap] = [mark for mark in scene.marks if isinstance(mark, Box) and mark.colour == "gap"]
    assert gap.height == pytest.approx(plots(scene)[1].height * (arena - bound) / arena)
    optimal = layout.figure(replace(step, arena_bytes=bound), "x")
    assert not [mark for mark in optimal.marks if isinstance(mark, Box) and mark.colour == "gap"]


@pytest.mark.parametrize("step", [small_program(), looped(), layered(1), layered(8), layered(80), with_gap()])
def test_texts_keep_clear_of_each_other_and_of_the_edges(step: Program) -> None:
    """In pictures of two instructions and of 80 layers alike."""
    scene = layout.figure(step, "an-artifact-with-a-long-name.dllmc")
    texts = [extent(mark) for mark in scene.marks if isinstance(mark, Text)]
    for left, top, right, bottom, text in texts:
        assert 0 <= left < right <= scene.width, text
        assert 0 <= top < bottom <= scene.height, text
    for a, b in combinations(texts, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{a[4]!r} lies on {b[4]!r}"


def extent(mark: Text) -> tuple[float, float, float, float, str]:
    """Left, top, right and bottom of a text, and the text."""
    width = text_width(mark.text, mark.size)
    left = mark.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[mark.anchor] * width
    return left, mark.y - 0.75 * mark.size, left + width, mark.y + 0.1 * mark.size, mark.text


def test_loops_are_marked() -> None:
    """With what they run over."""
    abouts = {m.about for m in layout.figure(looped(), "x").marks if isinstance(m, Box)}
    assert "runs for 2 of tokens at a time\ninstructions 1 to 2" in abouts


def test_what_a_loop_writes_is_from_the_instruction_that_writes_it() -> None:
    """Though the whole of it is alive from the beginning of the loop on."""
    [about] = {m.about for m in layout.figure(looped(), "x").marks if isinstance(m, Box) and m.about.startswith("b:")}
    assert "alive [1, 3)\nfrom instruction 2 (copy)" in about


def test_text_of_a_model_never_becomes_markup() -> None:
    """A name, and a line of the user's, with markup in them stay text."""
    evil = "</title></svg><script>"
    plain = program({evil: tensor(4)}, [(["w"], [evil])], weights={"w": tensor(4)})
    [only] = plain.instructions
    assert isinstance(only, Instruction)
    step = planned(replace(plain, instructions=(replace(only, source=evil),)))
    text = html.page([layout.figure(step, evil)], evil)
    assert evil not in text
    assert "script" not in Parsed(text).tags


def test_every_kind_has_a_colour_of_its_own() -> None:
    """On light pages and on dark ones."""
    for mode in (0, 1):
        assert len({COLOURS[kind][mode] for kind in KINDS}) == len(KINDS)


def test_the_image_shows_the_boxes(tiny_llada: Path, tmp_path: Path) -> None:
    """A PNG of the picture at twice its size: near its corner each box has the colour of its kind."""
    file = tmp_path / "memory.png"
    assert run("inspect", tiny_llada, "--memory", file).stdout == f"wrote {file}\n"
    pixels = np.round(255 * matplotlib.image.imread(file)).astype(int)
    artifact = read(tiny_llada)
    scene = layout.figure(artifact.program, artifact.path.name)
    assert pixels.shape[:2] == (round(2 * scene.height), round(2 * scene.width))
    arena = [i for i, mark in enumerate(scene.marks) if isinstance(mark, Text) and mark.text == WHOLE]
    shown = [m for m in scene.marks[arena[0] :] if isinstance(m, Box) and m.colour in KINDS]
    large = [box for box in shown if box.width > 12 and box.height > 8]
    assert len(large) > 30
    for box in large:
        colour = COLOURS[box.colour][0]
        expected = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        assert pixels[round(2 * box.y) + 6, round(2 * box.x) + 6, :3].tolist() == expected, box.about


def test_an_image_has_every_program() -> None:
    """One below the other."""
    scenes = [layout.figure(step, "x") for step in (small_program(), layered(1))]
    assert png.image(scenes).startswith(b"\x89PNG\r\n\x1a\n")
    assert html.page(scenes, "x").count("<svg") == 2


def test_matplotlib_is_not_needed_for_a_page() -> None:
    """It takes long to load: only an image loads it."""
    check = "import sys, dllmc.cli.picture.html; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("memory.svg", "memory.svg is no picture; give a FILE.html or FILE.png"),
        ("memory", "memory is no picture; give a FILE.html or FILE.png"),
        ("missing/memory.html", "missing/memory.html cannot be written: No such file or directory; give a file in"),
        ("missing/memory.png", "missing/memory.png cannot be written: No such file or directory; give a file in"),
        ("folder.png", "folder.png exists and is no file"),
    ],
)
def test_a_file_that_cannot_be_is_told_in_one_line(file: str, message: str, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    artifact = write(tmp_path / "out").path
    (tmp_path / "folder.png").mkdir()
    result = run("inspect", artifact, "--memory", tmp_path / file)
    assert result.exit_code != 0
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "out"]


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllmc.cli.options.find_spec", lambda name: None)
    artifact = write(tmp_path / "out").path
    result = run("inspect", artifact, "--memory", tmp_path / "memory.png")
    assert "matplotlib, which is not installed; install it (`pip install matplotlib`" in result.stderr
    assert run("inspect", artifact, "--memory", tmp_path / "memory.html").exit_code == 0


def test_with_json_the_document_is_printed_as_ever(tmp_path: Path) -> None:
    """And the picture is written, over an older one."""
    artifact, file = write(tmp_path / "out").path, tmp_path / "memory.HTML"
    file.write_text("older")
    assert run("inspect", artifact, "--memory", file, "--json").stdout == run("inspect", artifact, "--json").stdout
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
