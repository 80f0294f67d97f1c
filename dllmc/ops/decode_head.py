"""`dllmc::decode_head`: final linear, softmax and choice of a token in one, without a [rows, vocab] tensor.

    hidden [R, D] and weight [V, D] of one dtype, bias [V] or None; logits z = scale * (hidden @ weight.T + bias)
    row_segment [R] int64: a row's index in the per-segment tables; row_position [R] int64: in its sequence
    row_target [R] int64: the token whose logprob is wanted, -1 for the chosen one
    temperature [S] float32 (0: greedy), top_k [S] int64 (0: off, at most 1024), top_p [S] float32 (1 and more: off),
    confidence_rule, seed, step [S] int64, suppressed [S, K] int64 padded with -1
    -> token [R] int64, confidence [R] float32, logprob [R] float32 (clean, of the target or the chosen token)

Rules: semantics.md, "Commit". Statistics are float32, whatever the dtype of `hidden`; so are logits, but on a CPU with
instructions for that dtype, and of a single row, whose products torch rounds to it.
On a GPU: `dllmc.ops.kernels.decode_head`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllmc.errors import ProgramError
from dllmc.ops import noise
from dllmc.ops.chunks import bytes_of
from dllmc.ops.head_partials import finish, head_partials, merge
from dllmc.ops.head_rows import CANDIDATES, HeadRows
from dllmc.ops.head_rows import ConfidenceRule as ConfidenceRule
from dllmc.ops.head_tiles import CudaTiling, most_memory
from dllmc.ops.library import library, run_bound
from dllmc.ops.linear import FEW_ROWS, HALF, has_native_gemm, transposes

# Workspace in float32 elements: 4 MiB, so that a tile of logits stays in the second-level caches of a few cores.
BUDGET = 1 << 20
# Of a tile whose product, half as large, is beside it, 8 MiB together: such products are fast, so that calls count.
NATIVE_BUDGET = BUDGET * 4 // 3
# More rows are decoded in chunks, so that a tile keeps about this many columns and the GEMM its speed.
NARROWEST_TILE = 1024

_TABLES = (
    *("row_segment", "row_position", "row_target", "temperature", "top_k", "top_p"),
    *("confidence_rule", "seed", "step", "suppressed"),
)

library.define(
    "decode_head(Tensor hidden, Tensor weight, Tensor? bias, float scale, Tensor row_segment, Tensor row_position,"
    " Tensor row_target, Tensor temperature, Tensor top_k, Tensor top_p, Tensor confidence_rule, Tensor seed,"
    " Tensor step, Tensor suppressed) -> (Tensor token, Tensor confidence, Tensor logprob)"
)


@dataclass(frozen=True)
class Tiling:
    """How R rows by V tokens are cut: rows a chunk, columns a tile.

    A product that does not go straight into its tile is made of `part_rows` rows of the weight at a time, in `spare`
    float32 elements of workspace. Where it is `native`, the CPU multiplies the weight's dtype, and the product is in
    that dtype; else they hold those rows if the weight is not float32, and the product's transpose where that is
    faster.
    """

    rows: int
    columns: int
    part_rows: int = 0
    spare: int = 0
    native: bool = False

    @classmethod
    def of(cls, rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> "Tiling":
        """Cut at least one row so that it fits the `workspace_bytes` of as many rows, or of more."""
        native = dtype in HALF and (rows == 1 or has_native_gemm(dtype))  # torch multiplies a vector fast on any CPU
        of_a_row = (rows if transposes(rows, dtype) else 0) + (0 if dtype == torch.float32 else hidden_size)
        budget = NATIVE_BUDGET if native else BUDGET // 2 if of_a_row else BUDGET
        chunks = -(-rows * NARROWEST_TILE // budget)
        chunk = -(-rows // chunks)
        columns = budget // chunk
        columns = vocab if columns >= vocab else columns // 256 * 256
        if native:
            return cls(chunk, columns, columns, -(-chunk * columns // 2), native)
        part = min(columns, max(1, budget // of_a_row)) if of_a_row else 0
        return cls(chunk, columns, part, part * of_a_row)

    @property
    def elements(self) -> int:
        """Float32 elements of workspace in use."""
        return self.rows * self.columns + self.spare


def workspace_bytes(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of workspace that suffice for up to `rows` rows: a tile of logits, and what is beside it.

    About 4 MiB, 8 MiB in half precision.
    """
    few = min(rows, FEW_ROWS)
    if dtype == torch.float32:
        return 4 * min(BUDGET, max(rows, 2 * few) * vocab)
    half, of_a_row = BUDGET // 2, few + hidden_size
    widened = min(half, rows * vocab) + min(max(half, of_a_row), vocab * of_a_row)
    native = min(NATIVE_BUDGET, rows * vocab)
    return 4 * max(widened, native + -(-native // 2))


def cuda_workspace_bytes(rows: int, vocab: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of workspace that suffice for up to `rows` rows on any GPU: at most 56 MiB and 28 bytes a token.

    It depends on neither `hidden_size` nor `dtype`: logits leave the product in float32, whatever they are.
    """
    return bytes_of(most_memory(rows, vocab))


def workspace_of(tensors: Sequence[Tensor], device: str) -> int:
    """Bytes for a call on tensors like these, on a device of that kind; what is for a GPU suffices on a CPU too."""
    hidden, weight = tensors[:2]
    sizes = hidden.shape[0], weight.shape[0], weight.shape[1], hidden.dtype
    on_cpu = workspace_bytes(*sizes)
    return on_cpu if device == "cpu" else max(on_cpu, cuda_workspace_bytes(*sizes))


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    row_segment: Tensor,
    row_position: Tensor,
    row_target: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    confidence_rule: Tensor,
    seed: Tensor,
    step: Tensor,
    suppressed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, over full logits, in the dtype of `hidden` (float32, or float64 for tests)."""
    z = hidden @ weight.T
    z = scale * (z if bias is None else z + bias)
    for row, segment in enumerate(row_segment.tolist()):
        z[row, suppressed[segment, suppressed[segment] >= 0]] = -torch.inf
    token = torch.empty(z.shape[0], dtype=torch.int64)
    confidence = z.new_empty(z.shape[0])
    for row, s in enumerate(row_segment.tolist()):
        key = seed[s], torch.arange(z.shape[1]), row_position[row], step[s]
        scores = z[row]
        if temperature[s] > 0:
            kept = _kept(z[row] / temperature[s], int(top_k[s]), float(top_p[s]))
            scores = (z[row] / temperature[s] + noise.gumbel(*key)).masked_fill(~kept, -torch.inf)
        token[row] = scores.argmax()
        p = z[row].softmax(0)
        match ConfidenceRule(int(confidence_rule[s])):
            case ConfidenceRule.LOW_CONFIDENCE:
                confidence[row] = p[token[row]]
            case ConfidenceRule.TOPK_MARGIN:
                first, second = p.topk(2).values
                confidence[row] = first - second
            case ConfidenceRule.ENTROPY:
                confidence[row] = -torch.special.entr(p).sum()
            case ConfidenceRule.RANDOM:
                confidence[row] = noise.uniform(seed[s], row_position.new_zeros(()), *key[2:], noise.CONFIDENCE_STREAM)
    wanted = torch.where(row_target >= 0, row_target, token)
    return token, confidence, z.log_softmax(1).gather(1, wanted[:, None])[:, 0]


def _kept(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which of the logits z / t [V] top-k and top-p leave to choose from; bool [V]."""
    order = scaled.argsort(descending=True, stable=True)
    rank = torch.arange(len(scaled))
    p = scaled.softmax(0)[order]
    kept = torch.ones_like(rank, dtype=torch.bool)
    if top_k > 0:
        kept &= rank < min(top_k, CANDIDATES)
    if top_p < 1:
        kept &= (p.cumsum(0) - p <= top_p) & (rank < CANDIDATES)
    return torch.empty_like(kept).scatter_(0, order, kept)


def decode_head_out(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    row_segment: Tensor,
    row_position: Tensor,
    row_target: Tensor,
    *tables: Tensor,
    token: Tensor,
    confidence: Tensor,
    logprob: Tensor,
    workspace: Tensor,
) -> None:
    """CPU: the operator into given outputs; `tables` are its seven per-segment arguments, in order.

    workspace: uint8, contiguous, at least `workspace_bytes` of the call or of one with more rows. It holds a tile of
    logits and what `Tiling` says: rows of a weight that is not float32 are cast, since torch's CPU GEMM would round
    bfloat16 and float16 logits to their 8 or 11 bits. Transient besides it: `hidden` in float32 where it is cast,
    three times [rows, 1024] candidates, int64, where top-p asks for them, and what `head_partials` says.
    Raises `ProgramError` for a workspace that is too small, `RequestError` for an unknown confidence rule.
    """
    if not hidden.shape[0]:
        return
    tiling = Tiling.of(hidden.shape[0], weight.shape[0], weight.shape[1], hidden.dtype)
    needed = 4 * tiling.elements
    if workspace.numel() < needed:
        raise ProgramError(
            f"decode_head: {hidden.shape[0]} rows by {weight.shape[0]} tokens need a workspace of {needed} bytes, "
            f"found {workspace.numel()}; plan it with `workspace_bytes` for the largest number of rows"
        )
    floats = workspace[:needed].view(torch.float32)
    for start in range(0, hidden.shape[0], tiling.rows):
        part = slice(start, start + tiling.rows)
        rows = HeadRows.of(row_segment[part], row_position[part], row_target[part], *tables)
        token[part], confidence[part], logprob[part] = decode_tiles(
            hidden[part], weight, bias, scale, rows, tiling, floats
        )


def decode_tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, rows: HeadRows, tiling: Tiling, floats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of at most `tiling.rows` rows over all tiles of the vocabulary; `floats`: float32 workspace."""
    count, vocab = hidden.shape[0], weight.shape[0]
    hidden = hidden if tiling.native else hidden.float()
    merged = None
    for start in range(0, vocab, tiling.columns):
        stop = min(start + tiling.columns, vocab)
        tile = floats[: count * (stop - start)].view(count, stop - start)
        _project(hidden, weight[start:stop], tile, tiling, floats[tiling.rows * tiling.columns :])
        if bias is not None:
            tile += bias[start:stop]
        if scale != 1.0:
            tile *= scale
        partials = head_partials(tile, start, rows)
        merged = partials if merged is None else merge(merged, partials, rows)
        del partials  # its candidates, before the next tile has some
    assert merged is not None, "a head has at least one token"
    return finish(merged, rows)


def _project(hidden: Tensor, weight: Tensor, tile: Tensor, tiling: Tiling, spare: Tensor) -> None:
    """Fill `tile` [rows, columns] float32 with hidden @ weight.T; hidden is float32, but for a native product."""
    if not tiling.part_rows:
        torch.mm(hidden, weight.T, out=tile)
        return
    if tiling.native:
        product = spare[: -(-tile.numel() // 2)].view(hidden.dtype)[: tile.numel()].view(tile.shape)
        tile.copy_(torch.mm(hidden, weight.T, out=product))
        return
    rows = hidden.shape[0]
    for part, logits in zip(weight.split(tiling.part_rows), tile.split(tiling.part_rows, dim=1), strict=True):
        taken = 0
        if part.dtype != torch.float32:
            taken = part.numel()
            part = spare[:taken].view(part.shape).copy_(part)
        if transposes(tiling.rows, weight.dtype):
            product = spare[taken : taken + rows * len(part)].view(len(part), rows)
            logits.copy_(torch.mm(part, hidden.T, out=product).T)
        else:
            torch.mm(hidden, part.T, out=logits)


def bind(args: Sequence[Any], outs: Sequence[Tensor], workspace: Tensor | None) -> Callable[[], object]:
    """Resolve a call over fixed memory.

    On a GPU nothing is read back, so an unknown confidence rule is not found: it counts as low_confidence. Raises
    `ProgramError` there for float64, for a workspace that is too small, and for tables that are not dense.
    """
    assert workspace is not None, "decode_head declares a workspace"
    token, confidence, logprob = outs
    if args[0].is_cuda:
        from dllmc.ops.kernels.decode_head import decode_head

        _require_cuda(args, workspace)
        hidden, weight, bias, scale, segment, position, target, *tables = args
        rows = segment, position, target
        return partial(decode_head, hidden, weight, bias, scale, *rows, tables, token, confidence, logprob, workspace)
    return partial(decode_head_out, *args, token=token, confidence=confidence, logprob=logprob, workspace=workspace)


def _require_cuda(args: Sequence[Any], workspace: Tensor) -> None:
    """What the kernels rely on."""
    hidden, weight = args[:2]
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ProgramError(f"decode_head takes float32, bfloat16 or float16 on a GPU, found {hidden.dtype}")
    rows, vocab = hidden.shape[0], weight.shape[0]
    needed = bytes_of(CudaTiling.of(rows, vocab).memory()) if rows else 0
    if workspace.numel() < needed:
        raise ProgramError(
            f"decode_head: {rows} rows by {vocab} tokens need a workspace of {needed} bytes on a GPU, found "
            f"{workspace.numel()}; plan it with `cuda_workspace_bytes` for the largest number of rows"
        )
    for name, table in zip(_TABLES, args[4:], strict=True):
        if not table.is_contiguous():
            raise ProgramError(f"decode_head: {name} is dense on a GPU, found strides {list(table.stride())}")


def _decode_head(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    outs = _fake(hidden, weight, *args)
    run_bound(bind, (hidden, weight, *args), outs, partial(workspace_of, device=hidden.device.type))
    return outs


def _fake(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    token = hidden.new_empty(rows, dtype=torch.int64)
    return token, hidden.new_empty(rows, dtype=torch.float32), hidden.new_empty(rows, dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    library.impl("decode_head", _decode_head, _device)
torch.library.register_fake("dllmc::decode_head", _fake, lib=library)
