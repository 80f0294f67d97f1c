"""What a picture is made of: boxes, areas, lines and text in pixels, y downwards, coloured by names of `COLOURS`.

`html` and `png` draw it. Kinds of values have the colours of two published palettes for colour-blind readers
(Okabe and Ito 2008; Tol 2021), some lighter or darker so that they also differ in lightness.
"""

from dataclasses import dataclass, field
from typing import Literal

from dllmc.memory import kinds

# Name -> colour on a light page, and on a dark one.
COLOURS: dict[str, tuple[str, str]] = {
    kinds.RESIDUAL: ("#cf5200", "#e0691c"),
    kinds.KEYS_VALUES: ("#0072b2", "#2f97d9"),
    kinds.QUERIES: ("#7cc7f0", "#9ad6f7"),
    kinds.QKV: ("#332288", "#5b4fc4"),
    kinds.ATTENTION: ("#d98fbb", "#dd8fbc"),
    kinds.NORM: ("#009e73", "#1fb98d"),
    kinds.FEED_FORWARD: ("#e6a817", "#e6b03a"),
    kinds.PROJECTION: ("#f0e07a", "#f2e796"),
    kinds.HEAD: ("#7a1648", "#a3215f"),
    kinds.POSITIONS: ("#a3a33c", "#b0b050"),
    kinds.WORKSPACE: ("#6b727c", "#ccd2d9"),
    kinds.OTHER: ("#c4cad1", "#565e68"),
    "page": ("#ffffff", "#191d24"),
    "plot": ("#f3f5f7", "#12151a"),
    "band": ("#e4e8ed", "#262c36"),
    "line": ("#d5dae0", "#323945"),
    "ink": ("#1c2128", "#d9dee6"),
    "soft": ("#5d6774", "#98a2b0"),
    "gap": ("#f7c6bd", "#6b2c22"),
}


def _readable_on(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour (WCAG 2.1, relative luminance)."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


ON = {kind: f"on {kind}" for kind in kinds.KINDS}
"""Kind -> the name of the colour of text on it."""
COLOURS |= {ON[kind]: (_readable_on(COLOURS[kind][0]), _readable_on(COLOURS[kind][1])) for kind in kinds.KINDS}


@dataclass(frozen=True)
class Box:
    """A filled rectangle, with a thin edge in the page's colour if `edge`; `about` is shown where one points at it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    about: str = ""
    edge: bool = False


@dataclass(frozen=True)
class Path:
    """A line through points, or the area that they surround if `filled`."""

    points: tuple[tuple[float, float], ...]
    colour: str
    filled: bool = False
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Text:
    """One line of text; `x` is its start, middle or end as `anchor` says, `y` its baseline, `size` in pixels."""

    x: float
    y: float
    text: str
    size: float = 12
    colour: str = "ink"
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


Mark = Box | Path | Text


@dataclass
class Scene:
    """Marks, the later ones above the earlier ones."""

    title: str
    width: float
    height: float = 0
    marks: list[Mark] = field(default_factory=list)

    def add(self, *marks: Mark) -> None:
        """Draw above what is there."""
        self.marks += marks


def text_width(text: str, size: float) -> float:
    """Pixels that a line of text takes at most, in any of the usual fonts without serifs."""
    return 0.62 * size * len(text)
