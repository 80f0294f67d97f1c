"""A program as text: one line an instruction, one a buffer."""

from dllmc.ir.program import CHUNK, Affine, DType, ForRows, Instruction, Operand, Program, View, dense_strides


def text_of(program: Program) -> str:
    """The whole program, for people; `to_json` is what tools read."""
    lines = [f"program {program.name}"]
    for title, tensors in (("input", program.inputs), ("weight", program.weights), ("buffer", program.buffers)):
        for name, tensor in tensors.items():
            shape = ", ".join(map(str, tensor.shape))
            place = "" if tensor.offset is None else f" at {tensor.offset}"
            life = "" if tensor.lifetime is None else f", alive [{tensor.lifetime[0]}, {tensor.lifetime[1]})"
            lines.append(f"  {title} {name}: {tensor.dtype}[{shape}]{place}{life}")
    index = 0
    for item in program.instructions:
        body: tuple[Instruction, ...] = (item,) if isinstance(item, Instruction) else item.body
        indent = ""
        if isinstance(item, ForRows):
            indent = "  "
            lines.append(f"        for {program.maxima[CHUNK]} rows of {item.extent}:")
        for instruction in body:
            lines.append(f"  {index:4d}  {indent}{_line(program, instruction)}")
            index += 1
    lines += [f"  return {name} = {_text(program, view)}" for name, view in program.outputs.items()]
    return "\n".join(lines)


def _line(program: Program, instruction: Instruction) -> str:
    outputs = ", ".join(_text(program, view) for view in instruction.outputs)
    inputs = ", ".join(_text(program, operand) for operand in instruction.inputs)
    workspace = "" if instruction.workspace is None else f", workspace {instruction.workspace}"
    return f"{outputs} = {instruction.op}({inputs}){workspace}"


def _text(program: Program, operand: Operand) -> str:
    if isinstance(operand, View):
        whole = program.tensor(operand.base).shape
        if operand == View(operand.base, whole, dense_strides(whole)):
            return operand.base
        shape = ", ".join(map(str, operand.shape))
        if operand.strides == dense_strides(operand.shape) and operand.offset == Affine():
            return f"{operand.base}[{shape}]"
        return f"{operand.base}[{shape}; strides {', '.join(map(str, operand.strides))}; from {operand.offset}]"
    if isinstance(operand, Affine):
        return str(operand)
    if isinstance(operand, DType):
        return operand.name
    if isinstance(operand, tuple):
        return f"[{', '.join(_text(program, item) for item in operand)}]"
    return repr(operand)
