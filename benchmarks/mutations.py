"""Ways to tamper with an artifact: its bytes as they lie there, or what is in its files, with all hashes made right."""

import hashlib
import json
import random
import struct
from collections.abc import Callable, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
NUMBERS = (0, 1, -1, 2, 7, 63, 64, 65, 2**31 - 1, 2**31, 2**47, 2**53, 2**63, 10**30, -(2**31), 0.5, -0.0, 1e308)
OTHERS: tuple[Any, ...] = (None, True, "", "x", "..", "tokens", "inf", [], {}, [[]], {"view": "token_ids"})
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool", "F32", "I64", "complex64")
OPERATORS = (
    "copy",
    "aten.linear.default",
    "aten.add.Tensor",
    "aten.softmax.int",
    "dllmc.attention.default",
    "os.system",
)

Spot = tuple[Any, Any]  # an object or list of a document, and a key of it


def damage(folder: Path, draw: random.Random) -> str | None:
    """Change bytes of a file, or the file itself, and leave the hashes. None if nothing has changed."""
    file = draw.choice(_files(folder))
    name, content = file.relative_to(folder).as_posix(), bytearray(file.read_bytes())
    before = bytes(content)
    way = draw.choice(
        ("flip", "flip", "set", "insert", "delete", "truncate", "append", "repeat", "unlink", "swap", "link")
    )
    at = draw.randrange(len(content))
    length = draw.randint(1, 64)
    match way:
        case "flip":
            content[at] ^= 1 << draw.randrange(8)
        case "set":
            content[at] = draw.randrange(256)
        case "insert":
            content[at:at] = draw.randbytes(length)
        case "delete":
            del content[at : at + length]
        case "truncate":
            del content[at:]
        case "append":
            content += draw.choice((b"\n", b" ", b"\0", draw.randbytes(length)))
        case "repeat":
            content[at:at] = content[at : at + length]
        case "unlink":
            file.unlink()
            return f"{name}: unlinked"
        case "swap":
            other = draw.choice([each for each in _files(folder) if each != file])
            content = bytearray(other.read_bytes())
        case "link":
            moved = file.rename(folder.parent / "moved")
            file.symlink_to(moved)
            return f"{name}: a link"
    if content == before:
        return None
    file.write_bytes(content)
    return f"{name}: {way} at {at}"


def forge(folder: Path, draw: random.Random) -> str | None:
    """Change what is in a file, in one to three places, then bring sizes, hashes and memory up to date.

    None if nothing has changed.
    """
    file = draw.choice([*_files(folder), *folder.glob("programs/*.json")])  # programs twice as often
    name, before = file.relative_to(folder).as_posix(), file.read_bytes()
    changes = draw.choice((1, 1, 1, 2, 3))
    if file.suffix == ".safetensors":
        told = _forge_header(file, changes, draw)
    else:
        document = json.loads(before)
        told = ", ".join(_change(document, draw) for _ in range(changes))
        file.write_text(json.dumps(document, indent=1) + "\n")
    if file.read_bytes() == before:
        return None
    _make_right(folder, draw)
    return f"{name}: {told}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _forge_header(file: Path, changes: int, draw: random.Random) -> str:
    """Change the header of a safetensors file, or its length."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    told = ", ".join(_change(header, draw) for _ in range(changes))
    text = json.dumps(header).encode()
    said = draw.choice((len(text),) * 8 + (0, len(text) - 1, len(text) + 9, 2**40, 2**63))
    file.write_bytes(struct.pack("<Q", said) + text + content[8 + length :])
    return told if said == len(text) else f"{told}, header of {said} bytes"


def _make_right(folder: Path, draw: random.Random) -> None:
    """Sizes and hashes as they are now, and mostly the memory that the programs now take: a careful forger's work."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        return
    for group in ("files", "linked"):
        entries = manifest.get(group)
        for name in entries if isinstance(entries, dict) else ():
            file = folder / name
            if isinstance(name, str) and "\0" not in name and len(name) < 200 and file.is_file():
                content = file.read_bytes()
                entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if draw.random() < 0.9:
        manifest["memory"] = _memory(folder) or manifest.get("memory")
    manifest.pop("sha256", None)
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _memory(folder: Path) -> dict[str, int] | None:
    """What the programs take, as dllmc counts it; None where it cannot be counted."""
    from dllmc.artifact import _memory as counted
    from dllmc.errors import DllmcError
    from dllmc.ir.program_json import from_json

    try:
        files = folder.glob("programs/*.json")
        return counted({file.stem: from_json(json.loads(file.read_text()), file.name) for file in files})
    except (DllmcError, ValueError, KeyError, TypeError):
        return None


def _change(document: Any, draw: random.Random) -> str:
    """Change one place of a document, drawn so that large lists do not take all; say where and how."""
    spots = _spots(document, draw)
    holder, key = draw.choice(spots)
    value = holder[key]
    change = draw.choices(list(_CHANGES), list(_CHANGES.values()))[0]
    told = change(holder, key, draw)
    return f"{key!r:.40}: {value!r:.40} {told}"


def _spots(document: Any, draw: random.Random) -> list[Spot]:
    """A way from the top to somewhere within: each place on it."""
    spots: list[Spot] = []
    while isinstance(document, dict | list) and document:
        key = draw.choice(list(document)) if isinstance(document, dict) else draw.randrange(len(document))
        spots.append((document, key))
        document = document[key]
    return spots[-3:] or [({"": None}, "")]  # where most of a document is


def _replace(holder: Any, key: Any, draw: random.Random) -> str:
    value = holder[key]
    if type(value) is int and draw.random() < 0.8:
        near = (value + 1, value - 1, value * 2, value // 2, -value, value + 64, value - 64, value * 1024)
        holder[key] = draw.choice((*near, *NUMBERS))
    elif isinstance(value, str) and draw.random() < 0.8:
        holder[key] = draw.choice((*DTYPES, *OPERATORS, value + "x", value[:-1], "\x1b[2J", "../" + value))
    else:
        holder[key] = draw.choice((*NUMBERS, *OTHERS))
    return f"becomes {holder[key]!r:.40}"


def _transplant(holder: Any, key: Any, draw: random.Random) -> str:
    """Take another value of the same holder instead."""
    other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    holder[key] = json.loads(json.dumps(holder[other]))
    return f"becomes that of {other!r:.40}"


def _remove(holder: Any, key: Any, draw: random.Random) -> str:
    del holder[key]
    return "removed"


def _double(holder: Any, key: Any, draw: random.Random) -> str:
    value = json.loads(json.dumps(holder[key]))
    if isinstance(holder, MutableSequence):
        holder.insert(draw.randrange(len(holder) + 1), value)
    elif isinstance(holder, MutableMapping):
        holder[f"{key}2"] = value
    return "doubled"


def _swap(holder: Any, key: Any, draw: random.Random) -> str:
    other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]
    return f"swapped with {other!r:.40}"


def _rename(holder: Any, key: Any, draw: random.Random) -> str:
    if isinstance(holder, MutableMapping):
        name = draw.choice((f"{key}x", "", "tokens", *map(str, holder)))
        holder[name] = holder.pop(key)
        return f"renamed {name!r:.40}"
    return _replace(holder, key, draw)


# How often each is drawn: a document that lacks a field is refused before much else is looked at.
_CHANGES: dict[Callable[[Any, Any, random.Random], str], int] = {
    _replace: 12,
    _transplant: 4,
    _swap: 4,
    _remove: 1,
    _double: 1,
    _rename: 1,
}
