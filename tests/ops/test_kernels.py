"""Triton kernels in general: who loads them, and that they compile, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dllmc.ops.kernels import glu, norm, rope

def compiled(kernel, types, **constants):
    # Operands of other names are int32.
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    assert "cubin" in triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32)).asm

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
print("triton" in sys.modules)
""")
    assert loaded.strip() == "False"
