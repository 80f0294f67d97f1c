"""Lifetimes of a program's buffers, from its instructions."""

from dllmc.ir.program import ForRows, Instruction, Program


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """Buffer -> half-open interval of `program.calls()`, from the one that writes it to behind its last use.

    What is whole in a `ForRows`, and not a chunk of it, lives all through it: each iteration reads or writes rows of
    its own. What the program returns lives to its end. Buffers that no instruction touches have no entry.
    """
    spans: dict[str, tuple[int, int]] = {}
    index = 0
    for item in program.instructions:
        body = (item,) if isinstance(item, Instruction) else item.body
        around = index, index + len(body)
        for instruction in body:
            views = (*instruction.reads(), *instruction.outputs)
            touched = {view.base: isinstance(item, ForRows) and not program.is_chunk(view.base) for view in views}
            if instruction.workspace is not None:
                touched[instruction.workspace] = False
            for base, whole in touched.items():
                if base in program.buffers:
                    first, last = around if whole else (index, index + 1)
                    begun = spans.get(base, (first, last))
                    spans[base] = min(begun[0], first), max(begun[1], last)
            index += 1
    for view in program.outputs.values():
        if view.base in spans:
            spans[view.base] = (spans[view.base][0], index)
    return spans
