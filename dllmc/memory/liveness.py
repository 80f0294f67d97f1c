"""Lifetimes of a program's buffers, from its instructions."""

from dllmc.ir.program import Program


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """Buffer -> half-open interval of instructions, from the one that writes it to behind its last use.

    What the program returns lives to its end. Buffers that no instruction touches have no entry.
    """
    spans: dict[str, tuple[int, int]] = {}
    for index, instruction in enumerate(program.instructions):
        touched = [view.base for view in (*instruction.reads(), *instruction.outputs)]
        if instruction.workspace is not None:
            touched.append(instruction.workspace)
        for base in touched:
            if base in program.buffers:
                spans[base] = (spans.get(base, (index, 0))[0], index + 1)
    for view in program.outputs.values():
        if view.base in spans:
            spans[view.base] = (spans[view.base][0], len(program.instructions))
    return spans
