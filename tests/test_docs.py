"""The documentation's examples, run as they stand, and its links."""

import doctest
import linecache
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_worked_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is executed, sessions print what they show, one after the other in one namespace."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "writing-a-pass.md"
    names: dict[str, Any] = {"__name__": "worked_pass"}
    sessions = 0
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        if not block.startswith(">>>"):
            file = str(tmp_path / f"block_{number}.py")
            linecache.cache[file] = (len(block), None, block.splitlines(keepends=True), file)  # lines, for messages
            exec(compile(block, file, "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test, clear_globs=False).failed == 0
        names.update(test.globs)
        sessions += 1
    assert sessions >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    """Relative links, and paths in backticks that name a file of the package, exist."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = re.findall(r"`((?:dllmc|tests|docs|examples|benchmarks)/[\w./-]+)`", text)
    missing = [p for p in links if not (page.parent / p).exists()] + [p for p in paths if not (ROOT / p).exists()]
    assert not missing
