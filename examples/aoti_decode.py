"""Decode a prompt with an AOTInductor export, on the runtime's plain pieces and without an engine.

.venv/bin/dllmc export ARTIFACT --format aoti --out FOLDER
MALLOC_MMAP_THRESHOLD_=1048576 .venv/bin/python examples/aoti_decode.py FOLDER --trust
"""

from pathlib import Path

import click
import numpy as np

from dllmc.errors import ExportError
from dllmc.export import aoti
from dllmc.ir.program import PAGES
from dllmc.runtime.batch import compose
from dllmc.runtime.params import CachePolicy, SamplingParams
from dllmc.runtime.request import RequestState
from dllmc.runtime.table import Table
from dllmc.runtime.tokenizer import load_tokenizer

ROW = np.array([0])


def decode(export: aoti.Export, prompt: list[int], params: SamplingParams, cache: CachePolicy) -> list[int]:
    """The completion of one request, which has the whole KV pool."""
    artifact, program = export.artifact, export.artifact.program
    state = RequestState(prompt, params, artifact.spec, cache=cache)
    has_cache = bool(program.caches)
    pages = np.arange(min(program.inputs["page_table"].shape[1].constant, program.maxima[PAGES]) if has_cache else 0)
    state.move(Table(1, state.length, pages.size), 0)
    state.table.page_table[0, 0] = pages
    while not state.finished:
        step = compose(state.table, ROW, program.maxima["rows"], artifact.spec.mask_id, has_cache)
        step.finish(**export.steps[step.phase].run(step.sizes, step.inputs))
        state.leave_full_blocks()
    return state.result().token_ids


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", default="sudoku:\n1040\n3401\n0004\n4012\n", show_default=True)
@click.option("--gen-length", default=20, show_default=True)
@click.option("--trust", is_flag=True, help="Load the folder's native code: only if you know who made it.")
def main(folder: Path, prompt: str, gen_length: int, trust: bool) -> None:
    """Decode one prompt with the export in FOLDER."""
    try:
        export = aoti.load(folder, trust=trust)
    except ExportError as error:
        raise click.ClickException(str(error)) from error
    tokenizer = load_tokenizer(export.artifact.path)
    params = SamplingParams(gen_length=gen_length, block_length=min(gen_length, 32))
    cache = CachePolicy() if export.artifact.program.caches else CachePolicy(mode="none")
    click.echo(tokenizer.decode(decode(export, tokenizer.encode(prompt), params, cache)))


if __name__ == "__main__":
    main()
