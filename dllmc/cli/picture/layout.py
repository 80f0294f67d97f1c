"""The picture of a planned program's memory: buffers on their own, bytes alive, the arena, a layer of it enlarged."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dllmc.cli.picture.panel import STRIP, Panel
from dllmc.cli.picture.scene import ON, Box, Path, Scene, Text, text_width
from dllmc.cli.report import quality
from dllmc.ir.graph_printer import size
from dllmc.ir.program import SYMBOLS, Instruction, Program
from dllmc.memory.kinds import KINDS, kinds
from dllmc.memory.timeline import Placed, Stretch, layers, live_bytes, loops, placed

WIDTH, LEFT, RIGHT = 1500, 100, 140  # of the picture, and of its margins
_COLUMNS = 6  # of the legend
_LABEL = 11  # size of the text in boxes
_FEW = 30  # instructions that can be read without enlarging a part


def figure(program: Program, artifact: str) -> Scene:
    """The picture of a program with a plan; `artifact` names what it is from."""
    facts = _Facts(program)
    scene = Scene(f"Memory of program {program.name} in {artifact}", WIDTH)
    _header(scene, facts, artifact)
    _legend(scene, facts)
    _separate(scene, facts)
    _live(scene, facts)
    whole = Stretch("After planning", 0, len(facts.instructions))
    _arena(scene, facts, whole, 380, "the arena; a box is a buffer: its bytes, from when it is written to its last use")
    if whole.stop > _FEW:
        _arena(scene, facts, facts.detail(), 420, "a part of the arena in which the peak is reached")
    scene.height += 8
    return scene


class _Facts:
    """What the parts of the picture share, told from the program once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instructions: list[Instruction] = [instruction for instruction, _ in program.calls()]
        self.kinds = kinds(program)
        self.buffers = placed(program)
        self.live = live_bytes(program, self.kinds)
        self.layers, self.loops = layers(program), loops(program)
        self.all_live: NDArray[np.int64] = np.sum([*self.live.values()], axis=0)
        self.peak = int(np.argmax(self.all_live))
        self.arena, self.bound = program.arena_bytes or 0, program.lower_bound_bytes or 0
        self.total = sum(buffer.size_bytes for buffer in self.buffers)
        self.about = {buffer.name: self._about(buffer) for buffer in self.buffers}

    def where(self, index: int) -> str:
        """An instruction for people: `instruction 15 (aten.linear, model.layers.3)`."""
        layer = [stretch.name for stretch in self.layers if stretch.start <= index < stretch.stop]
        return f"instruction {index} ({', '.join((short(self.instructions[index].op), *layer))})"

    def detail(self) -> Stretch:
        """The part to enlarge: of the layers in which the peak is reached the middle one, else what is around it."""
        high = [s for s in self.layers if self.all_live[s.start : s.stop].max() == self.all_live[self.peak]]
        if high:
            layer = high[len(high) // 2]
            return Stretch(f"Enlarged: {layer.name}", layer.start, layer.stop)
        start = max(0, self.peak - _FEW // 2)
        stop = min(len(self.instructions), start + _FEW)
        return Stretch(f"Enlarged: instructions {start} to {stop - 1}", start, stop)

    def _about(self, buffer: Placed) -> str:
        """What is shown where one points at a buffer."""
        tensor = self.program.buffers[buffer.name]
        shape = ", ".join(map(str, tensor.shape))
        index = next(
            n for n, i in enumerate(self.instructions[buffer.start :], buffer.start) if _writes(i, buffer.name)
        )
        source = self.instructions[index].source
        return "\n".join(
            (
                f"{buffer.name}: {self.kinds[buffer.name]}",
                f"{tensor.dtype}[{shape}], {size(buffer.size_bytes)} at offset {buffer.offset}",
                f"alive [{buffer.start}, {buffer.stop})",
                f"from {self.where(index)}",
                *([source] if source else []),
            )
        )


def _writes(instruction: Instruction, buffer: str) -> bool:
    return buffer == instruction.workspace or any(view.base == buffer for view in instruction.outputs)


def _header(scene: Scene, facts: _Facts, artifact: str) -> None:
    program = facts.program
    limits = ", ".join(f"{value} {symbol}" for symbol, value in program.maxima.items() if symbol in SYMBOLS)
    counts = f"{len(facts.buffers)} buffers, {len(facts.instructions)} instructions; steps of up to {limits}"
    title = f"{artifact}, program {program.name}: {size(facts.total)} of buffers in an arena of {size(facts.arena)}"
    scene.add(Text(24, 36, title, 21, bold=True))
    peak = f"Most is live at {facts.where(facts.peak)}: {size(int(facts.all_live[facts.peak]))}"
    scene.add(Text(24, 61, f"The arena is {quality(program)}. {peak}.", 13))
    scene.add(Text(24, 81, counts, 13, "soft"))
    scene.height = 98


def _legend(scene: Scene, facts: _Facts) -> None:
    """The colours of the kinds that there are, and how much of each is alive at the peak."""
    scene.add(Text(24, scene.height + 15, "Live at the peak:", 12, "soft"))
    shown = [kind for kind in KINDS if kind in facts.live]
    for number, kind in enumerate(shown):
        row, column = divmod(number, _COLUMNS)
        x, y = 150 + column * (WIDTH - 150) / _COLUMNS, scene.height + 15 + 22 * row
        text = f"{kind} {size(int(facts.live[kind][facts.peak]))}"
        scene.add(Box(x, y - 11, 13, 13, kind), Text(x + 19, y, text, 12))
    scene.height += 22 * -(-len(shown) // _COLUMNS)


def _separate(scene: Scene, facts: _Facts) -> None:
    """Before planning: every buffer behind the one that is written before it; grey is what holds nothing any more."""
    text = "every buffer in memory of its own, one behind the other; grey: taken, and not used any more"
    panel = _panel(scene, facts, "Before planning", text, 190, max(facts.total, 1))
    starts = [buffer.start for buffer in facts.buffers]
    written = np.bincount(starts, [b.size_bytes for b in facts.buffers], len(facts.instructions))
    corners = (panel.x(panel.last), panel.bottom), (panel.left, panel.bottom)
    scene.add(Path((*_steps(panel, np.cumsum(written).astype(np.int64)), *corners), "band", filled=True))
    offset = 0
    for buffer in facts.buffers:
        scene.add(panel.box(buffer, offset, facts.kinds[buffer.name], facts.about[buffer.name]))
        offset += buffer.size_bytes
    panel.levels(scene, (facts.total, "all buffers"), (facts.arena, "the arena"))
    _below(scene, facts, panel)


def _live(scene: Scene, facts: _Facts) -> None:
    """The bytes alive at each instruction, kind upon kind; no plan is below their largest sum."""
    text = "what must be in memory at the same time; its peak is the lower bound of any plan"
    panel = _panel(scene, facts, "Live bytes", text, 230, max(facts.arena, facts.bound, 1))
    if facts.arena > facts.bound:
        y = panel.y(facts.arena)
        scene.add(Box(panel.left, y, panel.width, panel.y(facts.bound) - y, "gap"))
    below = np.zeros_like(facts.all_live)
    for kind in KINDS:
        if kind in facts.live:
            above = below + facts.live[kind]
            scene.add(Path((*_steps(panel, above), *reversed(list(_steps(panel, below)))), kind, filled=True))
            below = above
    bound = (facts.bound, "arena = lower bound" if facts.arena <= facts.bound else "lower bound")
    panel.levels(scene, *([(facts.arena, "arena")] if facts.arena > facts.bound else []), bound)
    _below(scene, facts, panel)


def _arena(scene: Scene, facts: _Facts, part: Stretch, height: float, text: str) -> None:
    """After planning: each buffer's bytes for as long as it lives, in a part of the step."""
    panel = _panel(scene, facts, part.name, text, height, max(facts.arena, 1), part.start, part.stop)
    shown = [b for b in facts.buffers if b.stop > part.start and b.start < part.stop]
    for buffer in shown:
        scene.add(panel.box(buffer, buffer.offset, facts.kinds[buffer.name], facts.about[buffer.name]))
    for buffer in shown:
        _label(scene, facts, panel, buffer)
    panel.levels(scene, (facts.arena, "arena"))
    _below(scene, facts, panel, [short(i.op) for i in facts.instructions[part.start : part.stop]])


def _label(scene: Scene, facts: _Facts, panel: Panel, buffer: Placed) -> None:
    """In a box that has room for it: the buffer's name, and below it what it is and its size, or its size alone."""
    left, right = panel.x(buffer.start), panel.x(buffer.stop)
    top, bottom = panel.y(buffer.offset + buffer.size_bytes), panel.y(buffer.offset)
    kind, bytes_ = facts.kinds[buffer.name], size(buffer.size_bytes)

    def first_that_fits(*texts: str) -> list[str]:
        return [text for text in texts if text_width(text, _LABEL) < right - left - 4][:1]

    lines = [*first_that_fits(buffer.name.removeprefix("%")), *first_that_fits(f"{kind}, {bytes_}", bytes_)]
    del lines[int((bottom - top) / (1.35 * _LABEL)) :]
    y = (top + bottom) / 2 - 0.65 * _LABEL * (len(lines) - 1) + 0.35 * _LABEL
    for number, line in enumerate(lines):
        scene.add(Text((left + right) / 2, y + 1.3 * _LABEL * number, line, _LABEL, ON[kind], "middle"))


def _steps(panel: Panel, counts: NDArray[np.int64]) -> Iterator[tuple[float, float]]:
    """The corners of a curve that changes between instructions only."""
    ends = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    for start, stop in pairwise(ends):
        y = panel.y(int(counts[start]))
        yield panel.x(start), y
        yield panel.x(stop), y


def _panel(
    scene: Scene, facts: _Facts, title: str, text: str, height: float, top: int, first: int = 0, last: int | None = None
) -> Panel:
    """A diagram below what there is, with its heading."""
    y = scene.height + 34
    scene.add(Text(24, y, title, 15, bold=True), Text(24 + text_width(title, 15) + 16, y, text, 12.5, "soft"))
    stop = len(facts.instructions) if last is None else last
    panel = Panel(LEFT, y + 14 + height, WIDTH - LEFT - RIGHT, height, first, stop, top)
    panel.frame(scene, facts.layers)
    return panel


def _below(scene: Scene, facts: _Facts, panel: Panel, names: Sequence[str] = ()) -> None:
    """Layers, loops and numbers of instructions below a diagram."""
    offset = 4.0
    for stretches, draw in ((facts.layers, panel.layers), (facts.loops, panel.loops)):
        if stretches:
            draw(scene, offset, stretches)
            offset += STRIP
    scene.height = panel.bottom + offset + panel.instructions(scene, offset, names)


def short(op: str) -> str:
    """`dllmc.add_rms_norm.default` -> `add_rms_norm`."""
    return op.split(".")[1] if "." in op else op
