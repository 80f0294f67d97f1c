"""Ways to tamper with an artifact: its bytes as they lie there, or what is in its files, with all hashes made right."""

import hashlib
import json
import random
import struct
from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from contextlib import suppress
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

Rewrite = Callable[[Any, random.Random], str]
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
        knowing = _REWRITES.get(file.parent.name, ()) if file.name != MANIFEST else _OF_MANIFEST
        told = ", ".join(_rewritten(document, knowing, draw) for _ in range(changes))
        file.write_text(json.dumps(document, indent=1) + "\n")
    if file.read_bytes() == before:
        return None
    _make_right(folder, draw)
    return f"{name}: {told}"


def _rewritten(document: Any, knowing: Sequence[Rewrite], draw: random.Random) -> str:
    """Change a document, knowing what it is or not."""
    if knowing and draw.random() < 0.5:
        with suppress(
            LookupError, TypeError, ValueError, AttributeError
        ):  # an earlier change took away what this one is about
            return draw.choice(knowing)(document, draw)
    return _change(document, draw)


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
    return [*spots[-3:], *spots[-1:] * 4] or [({"": None}, "")]  # mostly its end, where most of a document is


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


def _calls(program: Any) -> list[dict[str, Any]]:
    """Every instruction of a program, those in loops too."""
    return [call for item in program["instructions"] for call in item.get("body", [item])]


def _views(program: Any) -> list[dict[str, Any]]:
    groups = [operands for call in _calls(program) for operands in (call["inputs"], call["outputs"])]
    return [operand for group in groups for operand in group if isinstance(operand, dict) and "view" in operand]


def _move_buffer(program: Any, draw: random.Random) -> str:
    name = draw.choice(list(program["buffers"]))
    buffer, other = program["buffers"][name], draw.choice(list(program["buffers"].values()))
    buffer["offset"] = draw.choice((other["offset"], buffer["offset"] + 64, max(0, buffer["offset"] - 64), 8))
    return f"{name} moved to {buffer['offset']}"


def _resize_buffer(program: Any, draw: random.Random) -> str:
    group = program[draw.choice(("buffers", "buffers", "inputs", "weights", "caches"))] or program["buffers"]
    name = draw.choice(list(group))
    shape = group[name]["shape"]
    if shape:
        shape[draw.randrange(len(shape))] = draw.choice(
            (0, 1, 3, 1 << 20, {"tokens": 1}, {"rows": 2}, {"tokens": -1}, {"chunk": 1})
        )
    return f"{name} resized to {shape}"


def _shorten_life(program: Any, draw: random.Random) -> str:
    name = draw.choice(list(program["buffers"]))
    life = program["buffers"][name].get("lifetime") or [0, 0]
    life[draw.randrange(2)] += draw.choice((-1, 1, 2))
    return f"{name} lives {life}"


def _reorder(program: Any, draw: random.Random) -> str:
    calls = draw.choice([program["instructions"], *(i["body"] for i in program["instructions"] if "body" in i)])
    at, to = draw.randrange(len(calls)), draw.randrange(len(calls))
    calls.insert(to, calls.pop(at))
    return f"instruction {at} moved to {to}"


def _drop(program: Any, draw: random.Random) -> str:
    at = draw.randrange(len(program["instructions"]))
    del program["instructions"][at]
    return f"instruction {at} dropped"


def _retarget(program: Any, draw: random.Random) -> str:
    view, other = draw.choice(_views(program)), draw.choice(_views(program))
    view["view"] = other["view"]
    return f"a view of {other['view']} instead"


def _restride(program: Any, draw: random.Random) -> str:
    view = draw.choice(_views(program))
    if "shape" not in view:
        [whole] = [program[group][view["view"]] for group in _GROUPS if view["view"] in program[group]]
        view |= {"shape": whole["shape"], "strides": [1] * len(whole["shape"]), "offset": 0}
    field = draw.choice(("shape", "strides", "offset"))
    number = draw.choice((0, 1, 2, 64, -1, 1 << 30, {"tokens": 1}, {"rows": 64}, {"start": 1}, {"pages": 1}))
    if field == "offset" or not view[field]:
        view["offset"] = number
    else:
        view[field] = [*view[field]]
        view[field][draw.randrange(len(view[field]))] = number
    return f"a view's {field} has {number}"


def _odd_constant(program: Any, draw: random.Random) -> str:
    call = draw.choice(_calls(program))
    constant = draw.choice((10**30, {"float": "nan"}, {"size": {"tokens": 1}}, {"dtype": "float8"}, [[[1]]], 1e308))
    call["inputs"].insert(draw.randrange(len(call["inputs"]) + 1), constant)
    return f"{constant} for {call['op']}"


def _many_dimensions(program: Any, draw: random.Random) -> str:
    view = draw.choice(_views(program))
    count = draw.choice((64, 65, 1000))
    view |= {"shape": [1] * count, "strides": [1] * (count - draw.randrange(2)), "offset": 0}
    return f"a view with {count} dimensions"


def _written_again(program: Any, draw: random.Random) -> str:
    """Show one element several times, where a result goes."""
    view = draw.choice([view for call in _calls(program) for view in call["outputs"]])
    view |= {"shape": [2, 2], "strides": [draw.randrange(2), 0], "offset": 0}
    return f"{view['view']} is written in one place"


def _other_operator(program: Any, draw: random.Random) -> str:
    call, other = draw.choice(_calls(program)), draw.choice(_calls(program))
    call["op"] = other["op"]
    return f"operator {other['op']} instead"


def _other_operand(program: Any, draw: random.Random) -> str:
    call, other = draw.choice(_calls(program)), draw.choice(_calls(program))
    if call["inputs"] and other["inputs"]:
        call["inputs"][draw.randrange(len(call["inputs"]))] = draw.choice(other["inputs"])
    return f"an operand of {other['op']} for {call['op']}"


def _other_output(program: Any, draw: random.Random) -> str:
    call, view = draw.choice(_calls(program)), draw.choice(_views(program))
    call["outputs"][0] = json.loads(json.dumps(view))
    return f"{call['op']} writes {view['view']}"


def _other_workspace(program: Any, draw: random.Random) -> str:
    call = draw.choice(_calls(program))
    call["workspace"] = draw.choice((None, *program["buffers"]))
    return f"workspace {call['workspace']} for {call['op']}"


def _loop(program: Any, draw: random.Random) -> str:
    """Make a loop of an instruction, or change or undo one."""
    items = program["instructions"]
    at = draw.randrange(len(items))
    extent = draw.choice(({"tokens": 1}, {"rows": 1}, {"tokens": 1 << 40}, {"chunk": 1}, 4))
    if "body" not in items[at]:
        items[at] = {"for_rows": extent, "body": [items[at]]}
        program["maxima"].setdefault("chunk", 4)
    elif draw.random() < 0.5:
        items[at]["for_rows"] = extent
    else:
        items[at : at + 1] = items[at]["body"]
    return f"a loop at {at}"


def _wide_loop(program: Any, draw: random.Random) -> str:
    """A loop of many rounds, in each of which one element is copied into many of a chunk that nothing reads."""
    rounds, shown = draw.choice((1, 1 << 10, 1 << 16, 1 << 40)), draw.choice((1, 64, 1 << 12, 1 << 20))
    source = draw.choice(list(program["weights"]))
    row = {"shape": [{"chunk": 1}, shown], "strides": [shown, 1], "offset": 0}
    program["maxima"].setdefault("chunk", 1)
    program["buffers"]["%wide"] = {
        "dtype": program["weights"][source]["dtype"],
        **{"shape": row["shape"], "offset": program["arena_bytes"] // 64 * 64, "lifetime": [0, 1]},
    }
    program["arena_bytes"] += 4 * shown * program["maxima"]["chunk"] + 64
    for name, buffer in program["buffers"].items():
        if name != "%wide" and buffer.get("lifetime"):
            buffer["lifetime"] = [number + 1 for number in buffer["lifetime"]]
    call = {"op": "copy", "workspace": None, "source": ""}
    call |= {"inputs": [{**row, "view": source, "strides": [0, 0]}], "outputs": [{**row, "view": "%wide"}]}
    program["instructions"].insert(0, {"for_rows": {"tokens": rounds}, "body": [call]})
    return f"a loop of {rounds} rounds a token that copies {shown} elements"


def _fits_at_times(program: Any, draw: random.Random) -> str:
    """A dimension of a view that is as before in the largest step, or in the smallest, and in no other."""
    most = program["maxima"]
    view = draw.choice(
        [view for view in _views(program) if any(isinstance(dim, dict) for dim in view.get("shape", ()))]
    )
    axis = draw.choice([axis for axis, dim in enumerate(view["shape"]) if isinstance(dim, dict)])
    dim = {"constant": 0, **view["shape"][axis]}
    sizes = draw.choice((most, dict.fromkeys(most, 1)))
    fixed = dim["constant"] + sum(times * sizes.get(size, 0) for size, times in dim.items())
    view["shape"] = [*view["shape"]]
    view["shape"][axis] = draw.choice((fixed, {"constant": fixed - sizes["rows"], "rows": 1}))
    return f"a view of {view['view']} as long as at {'most' if sizes is most else 'least'}"


def _other_table(program: Any, draw: random.Random) -> str:
    """Where an operator is told by a table what to read, another table of the step, or a part of the same one."""
    calls = [call for call in _calls(program) if call["op"].startswith("dllmc.")]
    tables = [operand for call in calls for operand in call["inputs"] if isinstance(operand, dict)]
    table = draw.choice([each for each in tables if each.get("view") in program["inputs"]])
    name = table["view"]
    alike = [other for other, tensor in program["inputs"].items() if tensor == program["inputs"][name]]
    if draw.random() < 0.5:
        table["view"] = draw.choice(alike)
    else:
        whole = program["inputs"][name]["shape"]
        width = whole[1] if len(whole) > 1 else 1
        table |= {"shape": whole, "strides": [width, 1][: len(whole)], "offset": draw.choice((0, 1))}
        table |= {"shape": [1, *whole[1:]]} if draw.random() < 0.5 else {"strides": [0] * len(whole)}
    return f"{name} is {table}"


def _other_maximum(program: Any, draw: random.Random) -> str:
    size = draw.choice(list(program["maxima"]))
    program["maxima"][size] = draw.choice((1, 2, program["maxima"][size] * 2, 1 << 20, 1 << 40))
    return f"at most {program['maxima'][size]} {size}"


def _other_return(program: Any, draw: random.Random) -> str:
    name = draw.choice(list(program["outputs"]))
    program["outputs"][name] = json.loads(json.dumps(draw.choice(_views(program))))
    return f"returns {program['outputs'][name]['view']} as {name}"


def _no_plan(program: Any, draw: random.Random) -> str:
    program["arena_bytes"] = draw.choice((None, 0, (program["arena_bytes"] or 0) - 64))
    return f"an arena of {program['arena_bytes']}"


def _other_model(manifest: Any, draw: random.Random) -> str:
    field = draw.choice(list(manifest["model"]))
    manifest["model"][field] = draw.choice((0, 1, 41, 1 << 20, 1 << 45, True, [0], [99]))
    return f"model.{field} = {manifest['model'][field]}"


def _other_link(manifest: Any, draw: random.Random) -> str:
    name = draw.choice(
        ("/etc/hostname", "/x.safetensors", "../x/../checkpoint/model.safetensors", "nowhere.safetensors", "programs")
    )
    entry = next(iter(manifest["linked"].values()), {"bytes": 1, "sha256": "0" * 64})
    manifest["linked"] = draw.choice(({name: entry}, {**manifest["linked"], name: entry}, {}))
    return f"links {list(manifest['linked'])}"


def _other_recipe(manifest: Any, draw: random.Random) -> str:
    names = [*manifest["recipes"], *(part for recipe in manifest["recipes"].values() for part in recipe), "x"]
    name = draw.choice([*manifest["recipes"], "x"])
    manifest["recipes"][name] = draw.choices(names, k=draw.randint(0, 3))
    return f"{name} of {manifest['recipes'][name]}"


def _other_version(manifest: Any, draw: random.Random) -> str:
    name = draw.choice(list(manifest["operators"]))
    manifest["operators"][name] = draw.choice((0, 2, -1))
    return f"{name} in version {manifest['operators'][name]}"


def _fewer_programs(manifest: Any, draw: random.Random) -> str:
    name = manifest["programs"].pop(draw.randrange(len(manifest["programs"])))
    manifest["files"].pop(f"programs/{name}.json", None)
    return f"no program {name}"


def _twice(manifest: Any, draw: random.Random) -> str:
    field = draw.choice(("weights", "tokenizer", "programs"))
    manifest[field].append(draw.choice([*manifest[field], "manifest.json", "../x", "a b"]))
    return f"{field} {manifest[field]}"


_GROUPS = ("inputs", "weights", "buffers", "caches")
_REWRITES: dict[str, tuple[Rewrite, ...]] = {
    "programs": (
        *(_move_buffer, _resize_buffer, _shorten_life, _reorder, _drop, _retarget, _restride, _other_operator),
        *(_odd_constant, _many_dimensions, _written_again, _wide_loop, _fits_at_times, _other_table),
        *(_other_operand, _other_output, _other_workspace, _loop, _other_maximum, _other_return, _no_plan),
    )
}
_OF_MANIFEST = (_other_model, _other_link, _other_recipe, _other_version, _fewer_programs, _twice)

# How often each is drawn: a document that lacks a field is refused before much else is looked at.
_CHANGES: dict[Callable[[Any, Any, random.Random], str], int] = {
    _replace: 12,
    _transplant: 4,
    _swap: 4,
    _remove: 1,
    _double: 1,
    _rename: 1,
}
