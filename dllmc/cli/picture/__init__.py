"""Where the memory of a step goes, as a picture: a page for browsers, or an image.

`layout` makes of a program's plan the marks of a `scene`, in diagrams, each a `panel`; `html` and `png` draw them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dllmc.cli.picture.layout import figure
from dllmc.cli.prompts import replacing, replacing_bytes

if TYPE_CHECKING:
    from dllmc.artifact import Artifact


def write(artifact: "Artifact", file: Path) -> None:
    """Draw each program of an artifact, one below the other, to FILE.html or FILE.png (which needs matplotlib)."""
    scenes = [figure(artifact.program, artifact.path.name)]
    if file.suffix.lower() == ".png":
        from dllmc.cli.picture import png

        with replacing_bytes(file) as image:
            image.write(png.image(scenes))
        return
    from dllmc.cli.picture import html

    with replacing(file) as page:
        page.write(html.page(scenes, f"Memory of {artifact.path.name}"))
