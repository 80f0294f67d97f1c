"""The running Python's standard library as text, split by the name of the top-level module.

Held-out modules are a tenth of the names, chosen by hash: a package is held out as a whole, so that no sibling of
a held-out file is trained on. Tests, generated tables and vendored programs are left out of both halves.
"""

import random
import sys
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dllmc.errors import TaskError

TESTS = {"test", "tests", "idle_test", "__phello__"}
GENERATED_OR_VENDORED = {"encodings", "pydoc_data", "lib2to3", "turtledemo", "ensurepip", "site-packages"}


def is_held_out(module: str) -> bool:
    """Whether a module, `json.decoder` say, is never trained on."""
    return zlib.crc32(module.partition(".")[0].encode()) % 10 == 0


def modules(held_out: bool) -> dict[str, str]:
    """Dotted name -> source, sorted by name: the held-out modules, or those to train on."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if (
            parts[0] in sys.stdlib_module_names
            and not set(parts) & (TESTS | GENERATED_OR_VENDORED)
            and is_held_out(name) == held_out
        ):
            found[name] = file.read_text("utf-8")
    return found


@dataclass(frozen=True)
class Gap:
    """A window of held-out source as token ids, `length` tokens of it to be infilled from `start`."""

    window: list[int]
    start: int
    length: int


def gaps(encode: Callable[[str], list[int]], end_id: int, count: int, seed: int, window: int, length: int) -> list[Gap]:
    """Windows drawn uniformly from the held-out modules, an end token behind each; never the first token is missing.

    window, length: in tokens. Raises `TaskError` where the modules have too few.
    """
    stream = [token for text in modules(held_out=True).values() for token in (*encode(text), end_id)]
    if not 0 < length < window <= len(stream):
        raise TaskError(
            f"gaps of {length} in windows of {window} tokens: the held-out modules have {len(stream)} tokens"
        )
    rng = random.Random(seed)
    starts = [rng.randrange(len(stream) - window + 1) for _ in range(count)]
    return [Gap(stream[at : at + window], rng.randrange(1, window - length + 1), length) for at in starts]
