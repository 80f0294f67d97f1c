"""What is loaded when: a serving process needs no compiler, and help needs no torch."""

import subprocess
import sys
from pathlib import Path


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running some code."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_generating_loads_no_compiler(tiny_llada: Path) -> None:
    """After decoding text from an artifact, neither Inductor nor Dynamo nor any of dllmc's compiler is loaded."""
    loaded = modules_after(f"""
import dllmc
engine = dllmc.load({str(tiny_llada)!r})
engine.generate("sudoku:\\n1003\\n0300\\n3210\\n4132\\n", dllmc.SamplingParams(gen_length=4))
""")
    compiler = ("dllmc.passes", "dllmc.capture", "dllmc.models", "dllmc.compiler", "dllmc.ir.step_graph")
    unwanted = ("torch._inductor", "torch._dynamo", *compiler)
    assert not [name for name in loaded if name.startswith(unwanted)]
    assert "dllmc.runtime.engine" in loaded


def test_help_loads_no_torch() -> None:
    """`dllmc --help`, and every command's help, answer without loading torch, numpy or transformers."""
    loaded = modules_after("""
from click.testing import CliRunner
from dllmc.cli import main
for command in ([], *([name] for name in main.commands)):
    assert CliRunner().invoke(main, [*command, "--help"]).exit_code == 0
""")
    assert not loaded & {"torch", "numpy", "transformers"}


def test_public_names() -> None:
    """Everything in `dllmc.__all__` can be imported, and nothing else is offered."""
    import dllmc

    assert all(getattr(dllmc, name) is not None for name in dllmc.__all__)
    assert sorted(dllmc._HOME) == sorted(dllmc.__all__)
    assert not hasattr(dllmc, "nonsense")


def test_every_error_is_at_the_top() -> None:
    """`except dllmc.RequestError` works, for each class of dllmc/errors.py, without loading torch."""
    code = (
        "import inspect, sys, dllmc\n"
        "import dllmc.errors as errors\n"
        "names = [name for name, kind in vars(errors).items() if inspect.isclass(kind)]\n"
        "assert len(names) >= 16 and 'RequestError' in names\n"
        "assert all(getattr(dllmc, name) is getattr(errors, name) and name in dllmc.__all__ for name in names)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
