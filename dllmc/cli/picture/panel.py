"""One diagram of a picture: time to the right, bytes upwards, with its axes, layers and loops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dllmc.cli.picture.scene import Box, Path, Scene, Text, text_width
from dllmc.ir.graph_printer import size
from dllmc.memory.timeline import Placed, Stretch

STRIP = 15  # height of a row of layers or loops
_SMALL = 10.5
_EDGED = 4  # pixels from which on boxes have edges: smaller ones would be nothing but edge
_ROWS = 3  # in which the names of instructions may stand


@dataclass(frozen=True)
class Panel:
    """Instructions `[first, last)` across `width` pixels, bytes `[0, top]` up `height`, from a corner on."""

    left: float
    bottom: float
    width: float
    height: float
    first: int
    last: int
    top: int

    def x(self, index: float) -> float:
        """Where an instruction begins; what is outside of the panel is moved to its edge."""
        return self.left + self.width * (min(max(index, self.first), self.last) - self.first) / (self.last - self.first)

    def y(self, count: float) -> float:
        """The height of so many bytes."""
        return self.bottom - self.height * count / max(self.top, 1)

    @property
    def step(self) -> float:
        """Width of one instruction."""
        return self.width / (self.last - self.first)

    def frame(self, scene: Scene, layers: Sequence[Stretch]) -> None:
        """The background, lines and labels for bytes, and where layers begin."""
        scene.add(Box(self.left, self.bottom - self.height, self.width, self.height, "plot"))
        for count in byte_ticks(self.top):
            y = self.y(count)
            scene.add(Path(((self.left, y), (self.left + self.width, y)), "line"))
            scene.add(Text(self.left - 8, y + 4, size(count), 11, "soft", "end"))
        shown = self._shown(layers)
        for layer in shown[:: _every(shown, self.step)]:
            scene.add(
                Path(((self.x(layer.start), self.bottom), (self.x(layer.start), self.bottom - self.height)), "line")
            )

    def box(self, buffer: Placed, offset: int, colour: str, about: str) -> Box:
        """A buffer at an offset for as long as it lives."""
        left, right = self.x(buffer.start), self.x(buffer.stop)
        top, bottom = self.y(offset + buffer.size_bytes), self.y(offset)
        edge = self.step > _EDGED and bottom - top > _EDGED
        return Box(left, top, right - left, bottom - top, colour, about, edge)

    def levels(self, scene: Scene, *levels: tuple[int, str]) -> None:
        """Dashed lines at numbers of bytes, highest first, each named at the right; names keep clear of each other."""
        right, free = self.left + self.width, 0.0
        for count, name in levels:
            y = self.y(count)
            scene.add(Path(((self.left, y), (right, y)), "ink", width=1.4, dashed=True))
            y = max(y, free)
            scene.add(Text(right + 8, y + 3, size(count), 12, bold=True), Text(right + 8, y + 17, name, 11, "soft"))
            free = y + 34

    def layers(self, scene: Scene, offset: float, layers: Sequence[Stretch]) -> None:
        """A row of layers below the panel, every other one shaded, with as many numbers as there is room for."""
        shown = self._shown(layers)
        every = _every(shown, self.step)
        for number, layer in enumerate(shown):
            self._stretch(scene, offset, layer, layer.name, "line" if number % 2 else "band")
            if number % every == 0:
                self._name(scene, offset, layer, layer.name.rpartition(".")[2])
        scene.add(Text(self.left - 8, self.bottom + offset + 11, "layer", _SMALL, "soft", "end"))

    def loops(self, scene: Scene, offset: float, loops: Sequence[Stretch]) -> None:
        """A row of what runs for some rows after others, named where there is room for it."""
        for loop in self._shown(loops):
            about = f"runs for {loop.name} at a time"
            self._stretch(scene, offset, loop, about, "band")
            for name in (loop.name, loop.name.partition(" ")[0]):
                if text_width(name, _SMALL) < self.x(loop.stop) - self.x(loop.start):
                    self._name(scene, offset, loop, name)
                    break
        scene.add(Text(self.left - 8, self.bottom + offset + 11, "rows at a time", _SMALL, "soft", "end"))

    def instructions(self, scene: Scene, offset: float, names: Sequence[str]) -> float:
        """Numbers of instructions below the panel; returns the height that they take.

        `names`: of the instructions, to be shown too if there is room; neighbours may stand in different rows.
        """
        y = self.bottom + offset + 11
        scene.add(Text(self.left - 8, y, "instruction", _SMALL, "soft", "end"))
        rows = math.ceil((max((text_width(name, _SMALL) for name in names), default=0.0) + 4) / self.step)
        named = bool(names) and rows <= _ROWS
        numbered = range(self.first, self.last) if named else round_steps(self.first, self.last, self.width / 90)
        for index in numbered:
            scene.add(Text(self.x(index + 0.5), y, str(index), _SMALL, "soft", "middle"))
            if named:
                below = y + 14 * (1 + index % rows)
                scene.add(Text(self.x(index + 0.5), below, names[index - self.first], _SMALL, "ink", "middle"))
        return STRIP + (14 * rows if named else 0)

    def _shown(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        return [s for s in stretches if s.stop > self.first and s.start < self.last]

    def _stretch(self, scene: Scene, offset: float, stretch: Stretch, about: str, colour: str) -> None:
        left, right = self.x(stretch.start), self.x(stretch.stop)
        about = f"{about}\ninstructions {stretch.start} to {stretch.stop - 1}"
        scene.add(Box(left, self.bottom + offset, right - left, STRIP - 1, colour, about, edge=self.step > _EDGED))

    def _name(self, scene: Scene, offset: float, stretch: Stretch, name: str) -> None:
        middle = (self.x(stretch.start) + self.x(stretch.stop)) / 2
        scene.add(Text(middle, self.bottom + offset + 11, name, _SMALL, "ink", "middle"))


def _every(layers: Sequence[Stretch], step: float) -> int:
    """Of how many layers one is numbered, so that the numbers keep clear of each other."""
    narrowest = min((layer.stop - layer.start for layer in layers), default=1) * step
    return _round_up(22 / narrowest)


def byte_ticks(top: int) -> range:
    """Round numbers of bytes, at most nine of them: multiples of a power of two."""
    step = 1
    while step * 8 < top:
        step *= 2
    return range(0, top + 1, step)


def round_steps(first: int, last: int, most: float) -> range:
    """Multiples of a round number from `first` on and below `last`, at most about `most` of them."""
    step = _round_up((last - first) / most)
    return range(-(-first // step) * step, last, step)


def _round_up(number: float) -> int:
    """The next 1, 2 or 5 times a power of ten."""
    power = 1
    while 5 * power < number:
        power *= 10
    return next(factor * power for factor in (1, 2, 5) if factor * power >= number)
