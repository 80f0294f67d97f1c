"""The shapes of calls: what operands must be beside each other, and what results they then have.

Torch's own rules, again: those that torch has for tensors without memory load its compiler. And those of dllmc's
operators, which read memory by the shapes that their files state.

Where a dimension grows with a step it is an `Affine` of the step's sizes, and equal to another only where both are the
same whatever the sizes: what fits here fits in every step.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllmc.ir.program import Affine
from dllmc.ops.keep import KEEPING_FIELDS

Given = Mapping[str, Any]
Dim = int | Affine
Shape = list[Dim]


@dataclass(frozen=True)
class Operand:
    """A tensor as rules see it. `shape`: dimensions that are the same in every step are ints."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]


def dim_of(size: Affine) -> Dim:
    """A dimension, as an int where it does not grow with a step."""
    return size if size.terms else size.constant


def affine_of(dim: Dim) -> Affine:
    """And back."""
    return Affine(dim) if isinstance(dim, int) else dim


# Parameter -> dtype and dimensions. "x": the dtype of the first operand; letters: the same number wherever they stand.
_NORM = {"x": "float [..., W]", "residual": "x [..., W]", "weight": "float [W]", "bias": "float [W]"}
OPERANDS: Mapping[str, Mapping[str, str]] = {
    "aten.embedding.default": {"weight": "float [V, W]", "indices": "int64 [...]"},
    "aten.linear.default": {"input": "float [..., K]", "weight": "x [N, K]", "bias": "x [N]"},
    "dllmc.add_layer_norm.default": _NORM,
    "dllmc.add_rms_norm.default": _NORM,
    "dllmc.attention.default": {
        "q": "float [Q, G, D]",
        "k": "x [T, H, D]",
        "v": "x [T, H, D]",
        "spans": "int64 [S, 2]",
        "segments": "int64 [S, 2]",
        "cache": "x [2, H, P, N, D]",
        "cached": "int64 [S]",
        "page_table": "int64 [S, B]",
    },
    "dllmc.decode_head.default": {
        "hidden": "float [R, D]",
        "weight": "x [V, D]",
        "bias": "float [V]",
        "row_segment": "int64 [R]",
        "row_position": "int64 [R]",
        "row_target": "int64 [R]",
        "temperature": "float32 [S]",
        "top_k": "int64 [S]",
        "top_p": "float32 [S]",
        "confidence_rule": "int64 [S]",
        "seed": "int64 [S]",
        "step": "int64 [S]",
        "suppressed": "int64 [S, K]",
    },
    "dllmc.glu.default": {"gate": "float [..., W]", "up": "x [..., W]"},
    "dllmc.guide_rows.default": {"hidden": "float [N, D]", "guided": "int64 [G]", "guidance": "float32 [G]"},
    "dllmc.keep.default": {
        "cache": "float [2, H, P, N, D]",
        "q": "x [A, G, D]",
        "k": "x [T, H, D]",
        "v": "x [T, H, D]",
        "segments": "int64 [S, 2]",
        "keeping": f"int64 [S, {KEEPING_FIELDS}]",
        "page_table": "int64 [S, B]",
    },
    "dllmc.rms_norm.default": _NORM,
    "dllmc.rope.default": {
        "x": "float [T, G, D]",
        "cos": "float [M, E]",
        "sin": "float [M, E]",
        "positions": "int64 [P]",
    },
}
# Operands that a call has all or none of.
TOGETHER: Mapping[str, tuple[str, ...]] = {"dllmc.attention.default": ("cache", "cached", "page_table")}
# What no pattern says: groups of heads are whole; tables of angles are as wide as a head or half as wide, and have a
# row for each token where no positions pick them.
CONDITIONS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "dllmc.attention.default": lambda n: n["H"] > 0 and n["G"] % n["H"] == 0,
    "dllmc.keep.default": lambda n: n["H"] > 0 and n["G"] % n["H"] == 0,
    "dllmc.rope.default": lambda n: n["D"] % 2 == 0 and n["D"] in (n["E"], 2 * n["E"]) and n.get("P", n["M"]) == n["T"],
}


def check_operands(op: str, given: Given) -> None:
    """Raise `ValueError` for operands that do not fit what is said of the operator above."""
    together = TOGETHER.get(op, ())
    if len({given.get(name) is None for name in together}) > 1:
        raise ValueError(f"expected {', '.join(together)}, or none of them")
    known: dict[str, Dim] = {}
    first: Operand | None = None
    for name, pattern in OPERANDS.get(op, {}).items():
        tensor = given.get(name)
        if tensor is None:
            continue
        first = tensor if first is None else first
        dtype, *dims = re.findall(r"[\w.]+", pattern)
        shape = list(tensor.shape)
        if dims[0] == "...":
            dims = dims[1:]
            shape = shape[len(shape) - len(dims) :]
        wanted = [
            int(dim) if dim.isdecimal() else known.setdefault(dim, n) for dim, n in zip(dims, shape, strict=False)
        ]
        if len(shape) != len(dims) or wanted != shape or not _is(tensor, dtype, first):
            sizes = ", ".join(f"{dim} = {n}" for dim, n in known.items())
            raise ValueError(f"expected {name} as {pattern} where {sizes}, found {tensor.dtype} {text(tensor.shape)}")
    if op in CONDITIONS and not CONDITIONS[op](known):
        found = ", ".join(f"{dim} = {n}" for dim, n in known.items())
        raise ValueError(f"expected heads and angles that fit each other, found {found}")


def results(op: str, given: Given) -> list[Shape]:
    """The shapes of what a call writes. Raises `ValueError` or `IndexError` for operands that do not fit."""
    if op in _RESULTS:
        return _RESULTS[op](given)
    return [_broadcast([list(value.shape) for value in given.values() if isinstance(value, Operand)])]


def text(shape: Sequence[Dim]) -> str:
    """A shape for people."""
    return f"[{', '.join(map(str, shape))}]"


def _is(tensor: Operand, dtype: str, first: Operand) -> bool:
    if dtype == "float":
        return tensor.dtype.is_floating_point
    return tensor.dtype == first.dtype if dtype == "x" else str(tensor.dtype) == f"torch.{dtype}"


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    padded: list[Shape] = [[*[1] * (rank - len(shape)), *shape] for shape in shapes]
    out: Shape = []
    for sizes in zip(*padded, strict=True):
        distinct = set(sizes) - {1}
        if len(distinct) > 1:
            raise ValueError(f"shapes {' and '.join(map(text, shapes))} do not broadcast")
        out.append(distinct.pop() if distinct else 1)
    return out


def _axis(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise IndexError(f"dimension {dim} of {rank}")
    return dim % rank


def _reduced(given: Given) -> list[Shape]:
    shape, dims = list(given["self"].shape), given.get("dim")
    axes = {_axis(dim, len(shape)) for dim in (range(len(shape)) if dims is None or dims == [] else dims)}
    if given.get("keepdim"):
        return [[1 if axis in axes else n for axis, n in enumerate(shape)]]
    return [[n for axis, n in enumerate(shape) if axis not in axes]]


def _along(given: Given) -> list[Shape]:
    shape = list(given["self"].shape)
    _axis(given["dim"], len(shape))
    return [shape]


def _normed(given: Given) -> list[Shape]:
    shape, trailing = list(given["input"].shape), given["normalized_shape"]
    affine = [list(given[name].shape) for name in ("weight", "bias") if given.get(name) is not None]
    if not trailing or shape[-len(trailing) :] != trailing or any(each != trailing for each in affine):
        found = ", ".join(map(text, [shape, *affine]))
        raise ValueError(f"normalized_shape {trailing} does not fit {found}")
    return [shape]


def _stacked(given: Given) -> list[Shape]:
    shapes = [list(tensor.shape) for tensor in given["tensors"]]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"expected tensors of one shape, found {', '.join(map(text, shapes))}")
    axis = _axis(given.get("dim", 0), len(shapes[0]) + 1)
    return [[*shapes[0][:axis], len(shapes), *shapes[0][axis:]]]


def _concatenated(given: Given) -> list[Shape]:
    shapes = [list(tensor.shape) for tensor in given["tensors"]]
    axis = _axis(given.get("dim", 0), len(shapes[0]) if shapes else 0)
    rests = [[*shape[:axis], *shape[axis + 1 :]] for shape in shapes]
    if any(rest != rests[0] for rest in rests):
        raise ValueError(f"expected tensors that differ along {axis} alone, found {', '.join(map(text, shapes))}")
    whole = dim_of(sum((affine_of(shape[axis]) for shape in shapes), Affine()))
    return [[*shapes[0][:axis], whole, *shapes[0][axis + 1 :]]]


def _selected(given: Given) -> list[Shape]:
    shape, (count,) = list(given["self"].shape), given["index"].shape
    axis = _axis(given["dim"], len(shape))
    return [[*shape[:axis], count, *shape[axis + 1 :]]]


def _product(given: Given) -> list[Shape]:
    """Of batches alike, or of one matrix with each of a batch: torch would copy batches to stretch them."""
    a, b = (list(given[name].shape) for name in ("self", "other"))
    if not a or not b:
        raise ValueError("a product of a number")
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    if a[-1] != b[-min(2, len(b))]:
        raise ValueError(f"{text(a)} by {text(b)}")
    if min(len(a), len(b)) > 2 and a[:-2] != b[:-2]:
        raise ValueError(f"expected batches of one shape, found {text(a)} by {text(b)}")
    return [_broadcast([a[:-2], b[:-2]]) + rows + columns]


def _guided(given: Given) -> list[Shape]:
    """Twins are fewer than rows in every step: what is left of the rows never shrinks."""
    (rows, width), (twins,) = given["hidden"].shape, given["guided"].shape
    left = affine_of(rows) - affine_of(twins)
    if any(number < 0 for number in (left.constant, *(coefficient for _, coefficient in left.terms))):
        raise ValueError(f"{twins} twins of {rows} rows")
    return [[dim_of(left), width]]


_RESULTS: Mapping[str, Callable[[Given], list[Shape]]] = {
    "copy": lambda given: [list(given["source"].shape)],
    "aten.amax.default": _reduced,
    "aten.cat.default": _concatenated,
    "aten.embedding.default": lambda given: [[*given["indices"].shape, given["weight"].shape[1]]],
    "aten.index_select.default": _selected,
    "aten.layer_norm.default": _normed,
    "aten.linear.default": lambda given: [[*given["input"].shape[:-1], given["weight"].shape[0]]],
    "aten.log_softmax.int": _along,
    "aten.matmul.default": _product,
    "aten.mean.dim": _reduced,
    "aten.rms_norm.default": _normed,
    "aten.softmax.int": _along,
    "aten.stack.default": _stacked,
    "aten.sum.dim_IntList": _reduced,
    "dllmc.add_layer_norm.default": lambda given: [_same(given, "x", "residual")] * 2,
    "dllmc.add_rms_norm.default": lambda given: [_same(given, "x", "residual")] * 2,
    "dllmc.attention.default": lambda given: [list(given["q"].shape)],
    "dllmc.decode_head.default": lambda given: [[given["hidden"].shape[0]]] * 3,
    "dllmc.glu.default": lambda given: [_same(given, "gate", "up")],
    "dllmc.guide_rows.default": _guided,
    "dllmc.keep.default": lambda given: [list(given["cache"].shape)],
    "dllmc.rms_norm.default": lambda given: [list(given["x"].shape)],
    "dllmc.rope.default": lambda given: [list(given["x"].shape)],
}


def _same(given: Given, *names: str) -> Shape:
    first, *others = (list(given[name].shape) for name in names)
    if any(other != first for other in others):
        raise ValueError(f"expected {' and '.join(names)} of one shape, found {', '.join(map(text, [first, *others]))}")
    return first
