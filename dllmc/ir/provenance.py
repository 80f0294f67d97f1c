"""Where a call came from in the user's model, for messages: the line, the repeated layer."""

import re
from pathlib import Path

import torch
from torch import fx

_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", "torch/", str(Path(__file__).parents[1] / "capture.py"))


def layer_of(node: fx.Node) -> str:
    """The path of the repeated layer that a call belongs to, `model.layers.3` say; empty outside of any."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    match = re.match(r"(?:module\.)?(.*?\.\d+)(?:\.|$)", max(paths, key=len, default=""))
    return match[1] if match else ""


def source_line(node: fx.Node) -> str:
    """`file:line, in function: code` of the user's model, the innermost frame of its own; empty if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', trace)
    return next((line_of(*frame) for frame in reversed(frames) if is_users(frame[0])), "")


def line_of(path: str, line: str | int | None, function: str, code: str | None) -> str:
    """A stack frame for messages."""
    return f"{path}:{line}, in {function}: {(code or '').strip()}"


def is_users(path: str) -> bool:
    """Whether a source file is the user's: neither torch's nor what `capture` wraps around the module."""
    return not path.startswith(_NOT_THE_USERS)


def describe(node: fx.Node) -> str:
    """A node for messages: its name, its operator and its line in the user's model."""
    line = source_line(node)
    return f"{node.name} ({node.target})" + (f" at {line}" if line else "")
