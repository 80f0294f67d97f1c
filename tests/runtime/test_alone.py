"""The runtime stands alone: an artifact is served where the compiler, and what only the compiler needs, cannot be
imported.
"""

import subprocess
import sys
from pathlib import Path

COMPILER = (
    *("dllmc.capture", "dllmc.compiler", "dllmc.models", "dllmc.passes", "dllmc.cli", "dllmc.evaluate", "dllmc.tasks"),
    *("dllmc.ir.step_graph", "dllmc.memory.planner", "dllmc.memory.search", "torch._dynamo", "torch._inductor"),
)
PACKAGES = ("transformers", "tokenizers", "huggingface_hub", "networkx", "click", "rich", "matplotlib", "onnx")

SERVE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in {absent!r}):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from dllmc.runtime.loading import load
from dllmc.runtime.params import CachePolicy, SamplingParams

with load(sys.argv[1]) as engine:
    for policy in (None, CachePolicy()):
        [result] = engine.generate([[5, 6, 7, 8]], SamplingParams(gen_length=8, block_length=4), policy)
        print(result.token_ids, result.text)
assert "triton" not in sys.modules
"""


def test_token_ids_need_neither_the_compiler_nor_transformers(tiny_llada: Path) -> None:
    """Not even where the artifact has a tokenizer: then there is no text."""
    code = SERVE.format(absent=(*COMPILER, *PACKAGES))
    done = subprocess.run([sys.executable, "-c", code, tiny_llada], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dense, cached = done.stdout.splitlines()
    import dllmc

    [expected] = dllmc.load(tiny_llada).generate([[5, 6, 7, 8]], dllmc.SamplingParams(gen_length=8, block_length=4))
    assert dense == f"{expected.token_ids} None"
    assert cached.endswith(" None")
