"""What an engine gives a step and takes from it: names, dtypes and shapes of a program's inputs, outputs and caches."""

from collections.abc import Iterator, Mapping

from dllmc.errors import ProgramError
from dllmc.ir.program import PAGES, Affine, Program, Shape, Tensor, View, dense_strides
from dllmc.ops.keep import KEEPING_FIELDS
from dllmc.ops.signatures import operands
from dllmc.spec import MAX_SUPPRESS_TOKENS, ModelSpec

PHASES = ("dense", "refresh", "reuse", "mixed")


def _dims(*dims: int | str) -> Shape:
    return tuple(Affine(dim) if isinstance(dim, int) else sum(map(_size, dim.split("+")), Affine()) for dim in dims)


def _size(symbol: str) -> Affine:
    return Affine(0, ((symbol, 1),))


INPUTS: Mapping[str, tuple[str, Shape]] = {
    "token_ids": ("int64", _dims("tokens")),
    "positions": ("int64", _dims("tokens")),
    "segments": ("int64", _dims("segments", 2)),
    "rows": ("int64", _dims("guided+rows")),
    "row_spans": ("int64", _dims("segments", 2)),
    "guided": ("int64", _dims("guided")),
    "guidance": ("float32", _dims("guided")),
    "row_segment": ("int64", _dims("rows")),
    "row_position": ("int64", _dims("rows")),
    "row_target": ("int64", _dims("rows")),
    "temperature": ("float32", _dims("segments")),
    "top_k": ("int64", _dims("segments")),
    "top_p": ("float32", _dims("segments")),
    "confidence_rule": ("int64", _dims("segments")),
    "seed": ("int64", _dims("segments")),
    "step": ("int64", _dims("segments")),
    "suppressed": ("int64", _dims("segments", MAX_SUPPRESS_TOKENS)),
    "active": ("int64", _dims("active")),
    "keeping": ("int64", _dims("segments", KEEPING_FIELDS)),
    "cached": ("int64", _dims("segments")),
}
"""`dllmc.runtime.batch` makes them. A program takes those that it needs, and `page_table`, as wide as it says."""

OUTPUTS: Mapping[str, str] = {"token": "int64", "confidence": "float32", "logprob": "float32"}
"""Each [rows]."""

# What a table must have a row for: operator -> the operands that are tables, and the one that picks rows.
_TABLES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "aten.embedding.default": (("weight",), "indices"),
    "dllmc.rope.default": (("cos", "sin"), "positions"),
}
# Operators that read memory where a table says, and trust it: operator -> operand -> the inputs that it may be.
_TRUSTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "dllmc.attention.default": {
        "spans": ("segments", "row_spans"),
        "segments": ("segments",),
        "cached": ("cached",),
        "page_table": ("page_table",),
    },
    "dllmc.keep.default": {"segments": ("segments",), "keeping": ("keeping",), "page_table": ("page_table",)},
    "dllmc.decode_head.default": {"row_segment": ("row_segment",)},
    "dllmc.guide_rows.default": {"guided": ("guided",)},
}
# And what these tables count: operator -> size of a step -> the operands that have as many rows.
_COUNTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "dllmc.attention.default": {"tokens": ("k", "v")},
    "dllmc.keep.default": {"tokens": ("k", "v"), "active": ("q",)},
    "dllmc.decode_head.default": {
        "segments": ("temperature", "top_k", "top_p", "confidence_rule", "seed", "step", "suppressed")
    },
    "dllmc.guide_rows.default": {"guided+rows": ("hidden",)},
}


def check(programs: Mapping[str, Program], spec: ModelSpec) -> None:
    """Whether an engine can run these programs. Raises `ProgramError` naming the program and what does not fit."""
    if set(programs) not in ({"dense"}, {"mixed"}, set(PHASES)):
        raise ProgramError(f"programs {sorted(programs)}: expected dense, or mixed, or {', '.join(PHASES)}")
    for name, program in programs.items():
        for problem in _problems(program, spec):
            raise ProgramError(f"program {name!r}: {problem}")
        main = programs.get("mixed", program)
        if any(tensor != main.caches.get(cache) for cache, tensor in program.caches.items()):
            raise ProgramError(f"program {name!r}: its caches are not those of program {main.name!r}")
        if any(most != main.maxima.get(size) for size, most in program.maxima.items()):
            raise ProgramError(f"program {name!r}: its maxima {program.maxima} are not those of {main.maxima}")


def _problems(program: Program, spec: ModelSpec) -> Iterator[str]:
    rows = {"token_ids": spec.vocab_size, "positions": min(spec.max_positions, program.maxima["tokens"])}
    for name, tensor in program.inputs.items():
        if (wanted := _input(name, tensor)) is None:
            yield f"input {name!r}: no engine has it"
        elif (tensor.dtype, tensor.shape) != wanted:
            yield f"input {name!r}: expected {_text(*wanted)}, found {_text(tensor.dtype, tensor.shape)}"
    found = {name: (program.tensor(view.base).dtype, view.shape) for name, view in program.outputs.items()}
    if found != (wanted_outputs := {name: (dtype, _dims("rows")) for name, dtype in OUTPUTS.items()}):
        yield f"outputs: expected {_listed(wanted_outputs)}, found {_listed(found)}"
    for name, view in program.outputs.items():
        if view.strides != dense_strides(view.shape):
            yield f"output {name!r}: expected it dense, found strides {_text('', view.strides)}"
    for name, cache in program.caches.items():
        shape = cache.shape
        fixed = len(shape) == 5 and not any(dim.terms for axis, dim in enumerate(shape) if axis != 2)
        if not fixed or (shape[0], shape[2]) != _dims(2, PAGES) or shape[3] != Affine(max(program.page_tokens, 1)):
            yield f"cache {name!r}: expected [2, heads, pages, page tokens, head dim], found {_text('', shape)}"
    if program.caches and "page_table" not in program.inputs:
        yield "it has caches; expected an input 'page_table', found none"
    elif program.caches:
        width, pages = program.inputs["page_table"].shape[1].constant, -(-rows["positions"] // program.page_tokens)
        if width < pages:
            yield f"input 'page_table': expected {pages} pages or more a segment, found {width}"
    for call, _ in program.calls():
        views = {name: view for name, view in operands(call) if isinstance(view, View)}
        tables, picks = _TABLES.get(call.op, ((), ""))
        base = views[picks].base if picks in views else ""
        held = min((views[table].shape[0].least(program.maxima) for table in tables), default=0)
        if held < rows.get(base, 0):
            yield f"{call.op} looks up {base}: expected {rows[base]} rows or more, found {held}"
        for name, inputs in _TRUSTED.get(call.op, {}).items():
            if name in views and not any(_is_input(program, views[name], each) for each in inputs):
                yield f"{call.op}: expected {name} to be {' or '.join(inputs)} of the step, found {views[name].base!r}"
        for size, counted in _COUNTED.get(call.op, {}).items():
            for name in counted:
                if (shape := views[name].shape)[:1] != _dims(size):
                    yield f"{call.op}: expected {name} with {size} rows, found {_text('', shape)}"
        if "cache" in views and views["cache"] not in [_whole(*cache) for cache in program.caches.items()]:
            yield f"{call.op}: expected a whole cache, found a view of {views['cache'].base!r}"


def _is_input(program: Program, view: View, name: str) -> bool:
    """Whether a view is an input, or rows of it."""
    if view.base != name:
        return False
    whole = _whole(name, program.inputs[name])
    row = whole.strides[0].constant or 1  # of no columns
    at_a_row = not any(number % row for number in (view.offset.constant, *(n for _, n in view.offset.terms)))
    return (view.shape[1:], view.strides) == (whole.shape[1:], whole.strides) and at_a_row


def _whole(name: str, tensor: Tensor) -> View:
    return View(name, tensor.shape, dense_strides(tensor.shape))


def _input(name: str, tensor: Tensor) -> tuple[str, Shape] | None:
    if name == "page_table" and len(tensor.shape) == 2 and not tensor.shape[1].terms:
        return "int64", (*_dims("segments"), tensor.shape[1])
    return INPUTS.get(name)


def _text(dtype: str, shape: Shape) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _listed(tensors: Mapping[str, tuple[str, Shape]]) -> str:
    return ", ".join(f"{name} {_text(*tensor)}" for name, tensor in tensors.items())
