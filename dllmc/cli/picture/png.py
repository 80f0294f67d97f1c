"""Pictures as PNG, in the colours of a light page; drawn by matplotlib, which nothing else here imports."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import groupby
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from dllmc.cli.picture.scene import COLOURS, Box, Path, Scene, Text

_DPI = 100  # pixels of a scene in an inch
_SCALE = 2  # pixels of the file, each way, for one of a scene
_POINTS = 72 / _DPI
_ALIGNED = {"start": "left", "middle": "center", "end": "right"}
_NO_LINE = 0.0


def image(scenes: Sequence[Scene]) -> bytes:
    """A PNG file of the scenes, one below the other."""
    width, height = max(s.width for s in scenes), sum(s.height for s in scenes)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI * _SCALE, facecolor=_light("page"))
    top = 0.0
    for scene in scenes:
        share = scene.height / height
        place = (0, 1 - top / height - share, scene.width / width, share)
        axes = figure.add_axes(place, xlim=(0, scene.width), ylim=(scene.height, 0))
        axes.axis("off")
        for order, (kind, marks) in enumerate(groupby(scene.marks, key=type)):
            _DRAW[kind](axes, marks, order)
        top += scene.height
    file = BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(file)
    return file.getvalue()


def _boxes(axes: Any, boxes: Iterable[Box], order: int) -> None:
    """All at once: a picture has thousands."""
    given = list(boxes)
    corners = [
        [(b.x, b.y), (b.x + b.width, b.y), (b.x + b.width, b.y + b.height), (b.x, b.y + b.height)] for b in given
    ]
    widths = [0.8 * _POINTS if b.edge else _NO_LINE for b in given]
    colours = [_light(b.colour) for b in given]
    axes.add_collection(
        PolyCollection(corners, facecolors=colours, edgecolors=_light("page"), linewidths=widths, zorder=order),
        autolim=False,
    )


def _paths(axes: Any, paths: Iterable[Path], order: int) -> None:
    for filled, group in groupby(paths, key=lambda path: path.filled):
        given = list(group)
        points, colours = [p.points for p in given], [_light(p.colour) for p in given]
        if filled:
            drawn: Any = PolyCollection(points, facecolors=colours, linewidths=_NO_LINE, zorder=order)
        else:
            styles: list[Any] = [(0, (6, 4)) if p.dashed else "solid" for p in given]
            widths = [p.width * _POINTS for p in given]
            drawn = LineCollection(points, colors=colours, linewidths=widths, linestyles=styles, zorder=order)
        axes.add_collection(drawn, autolim=False)


def _texts(axes: Any, texts: Iterable[Text], order: int) -> None:
    for t in texts:
        weight = "bold" if t.bold else "normal"
        style = {"size": t.size * _POINTS, "color": _light(t.colour), "weight": weight}
        # What a model's names contain is text: a dollar sign starts no formula.
        axes.text(t.x, t.y, t.text, ha=_ALIGNED[t.anchor], va="baseline", zorder=order, parse_math=False, **style)


_DRAW: dict[type, Any] = {Box: _boxes, Path: _paths, Text: _texts}


def _light(name: str) -> str:
    return COLOURS[name][0]
