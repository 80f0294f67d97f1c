"""Pictures as one HTML file that needs nothing else: inline SVG, in colours for light pages or dark ones."""

from collections.abc import Sequence
from html import escape

from dllmc.cli.picture.scene import COLOURS, Box, Mark, Path, Scene, Text

_NAMES = {name: f"c{number}" for number, name in enumerate(COLOURS)}
_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
body { margin: 0 auto; padding: 16px; max-width: 1800px; background: var(--page); }
svg {
  display: block; width: 100%%; height: auto; margin-bottom: 40px; font-variant-numeric: tabular-nums;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
}
text { pointer-events: none; }
path { fill: none; pointer-events: none; }
.edge { stroke: var(--page); stroke-width: .8; }
.b:hover { fill: var(--ink); }
%(classes)s
"""


def page(scenes: Sequence[Scene], title: str) -> str:
    """A page that shows the scenes one below the other."""
    variables = {name: f"--{_NAMES[name]}" for name in COLOURS} | {"page": "--page", "ink": "--ink"}
    classes = [
        f".{_NAMES[name]} {{ fill: var({variable}); }} .s{_NAMES[name]} {{ stroke: var({variable}); }}"
        for name, variable in variables.items()
    ]
    light, dark = (" ".join(f"{variables[n]}: {c[index]};" for n, c in COLOURS.items()) for index in (0, 1))
    style = _STYLE % {"light": light, "dark": dark, "classes": "\n".join(classes)}
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *map(_svg, scenes),
            "</body>\n</html>\n",
        )
    )


def _svg(scene: Scene) -> str:
    box = f'viewBox="0 0 {scene.width:g} {scene.height:g}"'
    return "\n".join(
        (f'<svg {box} role="img" aria-label="{escape(scene.title)}">', *map(_element, scene.marks), "</svg>")
    )


def _element(mark: Mark) -> str:
    name = _NAMES[mark.colour]
    if isinstance(mark, Box):
        classes = " ".join((name, *(["b"] if mark.about else []), *(["edge"] if mark.edge else [])))
        place = f'x="{mark.x:.2f}" y="{mark.y:.2f}" width="{mark.width:.2f}" height="{mark.height:.2f}"'
        about = f"<title>{escape(mark.about)}</title>" if mark.about else ""
        return f'<rect class="{classes}" {place}>{about}</rect>'
    if isinstance(mark, Path):
        points = "L".join(f"{x:.2f} {y:.2f}" for x, y in mark.points)
        if mark.filled:
            return f'<path style="fill:var(--{name})" d="M{points}Z"/>'
        dashes = ' stroke-dasharray="6 4"' if mark.dashed else ""
        return f'<path class="s{name}" stroke-width="{mark.width:g}"{dashes} d="M{points}"/>'
    assert isinstance(mark, Text)
    weight = ' font-weight="650"' if mark.bold else ""
    place = f'x="{mark.x:.2f}" y="{mark.y:.2f}" text-anchor="{mark.anchor}"'
    return f'<text class="{name}" {place} font-size="{mark.size:g}"{weight}>{escape(mark.text)}</text>'
