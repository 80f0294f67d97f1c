"""No kernel reads or writes outside of its operands, and none races with itself: compute-sanitizer sees to it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITES = ("attention_cached", "commit_kernel", "decode_head_kernel", "glu", "guide_rows", "keep", "norms", "rope")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool: str, suite: str) -> None:
    """Each tensor is an allocation of its own, so that what lies behind it is not another's."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "gpu and not slow", f"tests/ops/test_{suite}.py"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, *tests], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
