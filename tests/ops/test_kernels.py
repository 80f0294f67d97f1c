"""Triton kernels in general: who loads them, and that they compile, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dllmc.ops.kernels import attention, commit, glu, guide_rows, head_finish, head_reduce, head_select, keep, norm
from dllmc.ops.kernels import rope
from dllmc.ops.kernels.decode_head import Tile

def compiled(kernel, types, num_warps=4, **constants):
    # Operands of other names are int32.
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source, target = ASTSource(kernel, signature, values), GPUTarget("cuda", 90, 32)
    assert "cubin" in triton.compile(source, target=target, options={"num_warps": num_warps}).asm

def pointers(to, *names):
    return {f"{name}_ptr": f"*{to}" for name in names}

optional = pointers("bf16", "residual", "weight", "bias", "total")
needed = pointers("bf16", "x", "out") | {"eps": "fp32"}
compiled(norm._norm, needed | optional, centred=True, rows_at_once=2, block=512)
compiled(norm._norm, needed, **dict.fromkeys(optional), centred=False, rows_at_once=1, block=4096)

needed = pointers("bf16", "x", "out") | pointers("fp32", "cos", "sin")
compiled(rope._rope, needed | pointers("i64", "positions"), shared=True, heads_at_once=8, block=64)
compiled(rope._rope, needed, positions_ptr=None, shared=False, heads_at_once=8, block=64)

for activation in ("silu", "gelu", "gelu_tanh", "relu"):
    compiled(glu._glu, pointers("bf16", "gate", "up", "out"), activation=activation, block=1024)

tables = pointers("i64", "spans", "segments", "keeping", "cached", "table")
floats = pointers("fp32", "found", "sums", "scores") | pointers("i32", "order", "kept") | {"scale": "fp32"}

def attends(dtype, segments, absent, head_dim=128, **options):
    tile = attention.Tile.of(1000, segments, getattr(torch, dtype))
    constants = dict(head_dim=head_dim, group=7, page_tokens=16, least_part=256, lanes=segments, columns=128)
    constants |= dict(rows_at_once=tile.rows, keys_at_once=tile.keys, num_warps=tile.warps)
    constants |= dict(slot_stages=tile.stages[0], token_stages=tile.stages[1])
    types = pointers({"bfloat16": "bf16", "float32": "fp32"}[dtype], "q", "k", "v", "cache", "out") | tables | floats
    compiled(attention._attend, types, **constants, **dict.fromkeys(absent))

parts, of_cache = ("found_ptr", "sums_ptr"), ("cached_ptr", "table_ptr", "cache_ptr")
attends("bfloat16", 1, ["window"])
attends("bfloat16", 16, ["window", *parts], head_dim=80)
attends("bfloat16", 64, ["window", *parts, *of_cache])
attends("float32", 1, [*parts])
compiled(
    attention._add_parts, pointers("bf16", "out") | tables | floats,
    head_dim=80, least_part=256, lanes=1, heads_at_once=8, most_parts=16, columns=128,
)

types = pointers("bf16", "cache", "q", "k", "v") | tables | floats
sizes = dict(head_dim=80, at_once=64, lanes=1, columns=128)
compiled(keep._add, types, **sizes)
compiled(keep._score, types, group=7, **sizes)
compiled(keep._select, types, at_once=4096, lanes=1, num_warps=16)
compiled(keep._pack, types, page_tokens=16, **sizes)

types = pointers("bf16", "hidden", "out") | pointers("i64", "guided") | pointers("fp32", "guidance")
compiled(guide_rows._guide_rows, types, lanes=64, block=1024)

types = pointers("i64", "places", "token_ids", "rows", "row_spans", "row_segment", "row_position", "row_target")
types |= pointers("i64", "guided", "positions", "token") | pointers("fp32", "guidance", "confidence", "logprob")
types |= pointers("i32", "sequences", "counts", "committed")
compiled(commit._count, types, tile=64)
compiled(commit._select, types, lanes=64, tile=64)
compiled(commit._commit, types, lanes=64, deferred=64, tile=64)

tables = pointers("i64", "row_segment", "row_position", "row_target", "top_k", "rule", "seed", "step", "suppressed")
tables |= pointers("fp32", "temperature", "top_p") | pointers("i64", "keys", "token") | {"scale": "fp32"}
tables |= pointers("fp32", "logits", "statistics", "target_logit", "confidence", "logprob")
for dtype, name, rows, absent in (
    ("bfloat16", "bf16", 16, ["bias_ptr"]),
    ("bfloat16", "bf16", 64, []),
    ("float32", "fp32", 64, []),
    ("bfloat16", "bf16", 2048, ["hidden_ptr", "weight_ptr"]),
):
    tile = Tile.of(rows, getattr(torch, dtype), fused=rows <= 64)
    compiled(
        head_reduce.reduce_tile, pointers(name, "hidden", "weight", "bias") | tables, multiplies=rows <= 64,
        rows_at_once=tile.rows, part=128 if rows <= 64 else 2048, width_at_once=tile.width, suppressed_lanes=64,
        num_warps=tile.warps, **dict.fromkeys(absent),
    )
compiled(head_select.select_candidates, tables, most=1024, at_once=4096, num_warps=16)
compiled(head_finish.finish_rows, tables, most=1024, lanes=2048, num_warps=8)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of compute capability 9.0, with every optional operand present and absent."""
    run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_the_cpu_loads_no_triton() -> None:
    """Operators run on the CPU without it: kernels are imported where an operand is on a GPU."""
    loaded = run("""
import sys
import torch
import dllmc.ops.facts, dllmc.ops.registry
x = torch.ones(3, 2, 4)
torch.ops.dllmc.add_rms_norm(x, x, None, None, 1e-6)
torch.ops.dllmc.add_layer_norm(x, x, None, None, 1e-6)
torch.ops.dllmc.rope(x, x[:, 0], x[:, 0], None)
torch.ops.dllmc.glu(x, x, "silu")
torch.ops.dllmc.guide_rows(x[0], torch.tensor([0]), torch.ones(1))
print("triton" in sys.modules)
""")
    assert loaded.strip() == "False"
