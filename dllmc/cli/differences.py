"""What two artifacts do not have in common: `dllmc inspect --diff`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import unified_diff
from typing import TYPE_CHECKING

from dllmc.cli.report import table
from dllmc.ir.graph_printer import size

if TYPE_CHECKING:
    from dllmc.artifact import Artifact

Fact = str | int | float | bool | None
_DIGITS = 12  # of a hash, as people compare them


@dataclass(frozen=True)
class Change:
    """A fact of artifacts, by its path, such as `programs.dense.arena_bytes`; None where one has it not."""

    what: str
    old: Fact
    new: Fact


def changes(old: "Artifact", new: "Artifact") -> list[Change]:
    """Every fact that is not the same of both, in the order of the newer one's."""
    before, after = _facts(old), _facts(new)
    paths = [*after, *(path for path in before if path not in after)]
    return [Change(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def lines(found: list[Change]) -> Iterator[str]:
    """A table of changes; a line that says so where there are none."""
    if not found:
        yield "no difference"
        return
    yield from table(
        [{"": c.what, "old": _text(c.what, c.old), "new": _text(c.what, c.new), "change": _by(c)} for c in found]
    )


def program_lines(old: "Artifact", new: "Artifact") -> Iterator[str]:
    """A unified diff of the programs, instruction by instruction."""
    from dllmc.ir.printer import text_of

    for name in sorted({*old.programs, *new.programs}):
        before, after = (text_of(a.programs[name]).splitlines() if name in a.programs else [] for a in (old, new))
        was, now = (f"{a.path}/programs/{name}.json" for a in (old, new))
        yield from unified_diff(before, after, was, now, lineterm="", n=2)


def _facts(artifact: "Artifact") -> dict[str, Fact]:
    manifest = artifact.manifest
    facts: dict[str, Fact] = {}
    for field in ("versions", "model", "options"):
        facts |= {f"{field}.{key}": _plain(value) for key, value in manifest[field].items()}
    for entry in manifest["passes"]:
        name = entry["pass"].partition("{")[0]
        facts |= {f"passes.{name}.{key}": value for key, value in entry.items() if key not in ("pass", "modified")}
    for name, program in artifact.programs.items():
        counts = Counter(call.op for call, _ in program.calls())
        facts |= {
            f"programs.{name}.instructions": counts.total(),
            **{f"programs.{name}.{op}": count for op, count in sorted(counts.items())},
            f"programs.{name}.buffers": len(program.buffers),
            **{f"programs.{name}.{symbol}": most for symbol, most in program.maxima.items()},
            f"programs.{name}.arena_bytes": program.arena_bytes,
        }
        for weight, tensor in program.weights.items():
            facts[f"weights.{weight}"] = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
    facts |= {f"memory.{part}_bytes": count for part, count in artifact.memory.items()}
    stored: Mapping[str, Mapping[str, str]] = manifest["files"] | manifest["linked"]
    content = [name for name in stored if not name.startswith("programs/") and name != "trace.json"]
    return facts | {f"files.{name}": f"sha256 {stored[name]['sha256'][:_DIGITS]}" for name in content}


def _plain(value: object) -> Fact:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _text(what: str, value: Fact) -> str:
    if value is None:
        return "-"
    return size(int(value)) if what.endswith("_bytes") else str(value)


def _by(change: Change) -> str:
    """By how much a size changed."""
    if not change.what.endswith("_bytes") or not change.old or change.new is None:
        return ""
    return f"{int(change.new) / int(change.old) - 1:+.1%}"
