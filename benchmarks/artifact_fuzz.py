"""Artifacts that were tampered with: none may crash, hang, take more memory than it says, write, or run code.

    python -m benchmarks.artifact_fuzz --mutants 10000

Two ways: files are changed and hashes left, so that every mutant must be refused; or what is in the files is changed
and all hashes are made right again, so that a mutant is refused by name, or its steps finish in the memory that it
declares. Mutants run in processes of their own, so that one that dies, hangs or swells is noticed. Refusals are counted
by check: the function that refuses.
"""

import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import torch
from safetensors.torch import save_file

import dllmc
from benchmarks import mutations, report
from dllmc.errors import DllmcError

BASES = ("cached", "chunked", "linked")
ROOM_BYTES = (
    16 << 20
)  # beyond what the artifact itself declares; with a budget so large, mutants that want more are refused
SLACK_BYTES = 256 << 20  # that the process may grow by besides, for bindings and torch's own
PATIENCE_S = 60
FINISHED = "finished"
CONFIG = {
    "model_type": "llada",
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 40,
    "embedding_size": 40,
    "max_sequence_length": 64,
    "mask_token_id": 39,
    "eos_token_id": 0,
    "rope": True,
}


def build(folder: Path) -> dict[str, Path]:
    """Compile the artifacts that mutants are made of: with a cache, with loops, with linked weights."""
    from dllmc.models.llada import LLaDAConfig, LLaDAModel

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    model = LLaDAModel(LLaDAConfig.from_dict(CONFIG))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, checkpoint / "model.safetensors"
    )
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    sizes = {"max_tokens_per_step": 64, "max_requests": 2, "max_logit_rows": 16}
    total = dllmc.compile(checkpoint, folder / "cached", dllmc.CompileOptions(**sizes)).memory["total"]
    chunked = dllmc.CompileOptions(**sizes, memory_budget=total * 9 // 10)
    dllmc.compile(checkpoint, folder / "chunked", chunked)
    dllmc.compile(checkpoint, folder / "linked", dllmc.CompileOptions(**sizes, link_weights=True))
    return {name: folder / name for name in BASES}


def attempt(artifact: Path) -> dict[str, Any]:
    """Load an artifact as a server would, and decode with it: by which check it was refused, or that it finished."""
    from dllmc import artifact as artifacts

    seen: list[str] = []
    with _watched(seen):
        try:
            opened = artifacts.read(artifact)
            opened.load_trace()
            engine = dllmc.load(artifact, memory_budget=_declared(artifact.parent) + ROOM_BYTES)
            for policy in (dllmc.CachePolicy(retention=0.5), None):
                params = dllmc.SamplingParams(gen_length=4, block_length=4, steps=2, ignore_eos=True)
                engine.generate([[1, 2, 3, 4, 5]], params, policy)
            outcome = {"outcome": FINISHED}
        except DllmcError as error:
            outcome = {"outcome": type(error).__name__, "check": _check_of(error)}
    return outcome | {"deeds": seen}


def _declared(folder: Path) -> int:
    return int((folder / "declared").read_text())


def _check_of(error: BaseException) -> str:
    """The function that refused: the innermost frame of dllmc behind the first cause, helpers' callers for helpers."""
    while isinstance(error.__cause__, DllmcError):
        error = error.__cause__
    frames = list(_frames(error.__traceback__))
    ours = [(module, name) for module, name in frames if module.startswith("dllmc.") and name != "_require"]
    module, name = ours[-1]
    return f"{module.removeprefix('dllmc.')}.{name}"


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    while traceback is not None:
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        traceback = traceback.tb_next


# What no artifact may make a process do. `open` counts where it is for writing.
_DEEDS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen"),
    *("pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
)
_watching: list[list[str]] = []


class _watched:  # noqa: N801
    """A context in which forbidden deeds of this process are noted."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        _watching.append(self.seen)

    def __exit__(self, *_: object) -> None:
        _watching.pop()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+")
    if writes or event in _DEEDS:
        _watching[-1].append(f"{event} {arguments[0]!r:.80}")


def work(way: str, folder: Path, seed: int, start: int, stop: int) -> None:
    """The worker's side: mutants `start` to `stop`, a line of JSON on standard output for each."""
    torch.set_num_threads(1)
    sys.addaudithook(_audit)
    for base in BASES:  # whatever is loaded on first use is loaded now
        attempt(folder / base)
    resident = _peak()
    for index in range(start, stop):
        draw = random.Random(f"{seed}, {way}, {index}")
        base = draw.choice(BASES)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.copytree(folder / base, mutant := folder / Path(scratch).name / base)
            (mutant.parent / "declared").write_text(str(_declared(folder)))
            (mutant.parent / "checkpoint").symlink_to(folder / "checkpoint")
            change = mutations.damage if way == "altered" else mutations.forge
            what = next(told for told in iter(lambda: change(mutant, draw), "") if told is not None)  # noqa: B023
            try:
                found = attempt(mutant)
            except BaseException as error:
                found = {"outcome": "crash", "check": f"{type(error).__name__}: {error!s:.200}"}
        swollen = _peak() - resident > SLACK_BYTES + ROOM_BYTES
        print(json.dumps({"index": index, "what": f"{base}: {what}", "swollen": swollen, **found}), flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(way: str, folder: Path, mutants: int, seed: int) -> dict[str, Any]:
    """Run mutants one way ("altered" or "forged"): outcomes and refusals by check, and everything that is wrong."""
    outcomes, checks, wrong = Counter[str](), Counter[str](), []
    done = 0
    while done < mutants:
        command = [sys.executable, "-m", "benchmarks.artifact_fuzz", "--worker", way]
        command += ["--folder", str(folder), "--seed", str(seed), "--start", str(done), "--mutants", str(mutants)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as worker:
            assert worker.stdout is not None
            while done < mutants:
                ready, _, _ = select.select([worker.stdout], [], [], PATIENCE_S)
                line = worker.stdout.readline() if ready else b""
                if not line:  # it hangs, or it died
                    worker.kill()
                    wrong.append({"index": done, "outcome": "died" if ready else "hung"})
                    done += 1
                    break
                found = json.loads(line)
                done += 1
                outcomes[found["outcome"]] += 1
                if "check" in found:
                    checks[found["check"]] += 1
                harmless = found["outcome"] not in ("crash", *([FINISHED] if way == "altered" else []))
                if not harmless or found.get("deeds") or found.get("swollen"):
                    wrong.append(found)
    return {
        "mutants": mutants,
        "seed": seed,
        "outcomes": dict(outcomes.most_common()),
        "refused_by": dict(sorted(checks.items())),
        "wrong": wrong,
    }


@click.command()
@click.option("--mutants", default=10_000, show_default=True, help="Of each way.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS / "artifact_fuzz.json")
@click.option("--worker", type=click.Choice(("altered", "forged")), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--start", default=0, hidden=True)
def main(mutants: int, seed: int, out: Path, worker: str | None, folder: Path | None, start: int) -> None:
    """Run both ways, print what became of the mutants, write the JSON."""
    if worker is not None:
        assert folder is not None
        work(worker, folder, seed, start, mutants)
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        ways = {way: fuzz(way, Path(scratch), mutants, seed) for way in ("altered", "forged")}
    for way, found in ways.items():
        rows = [{"check": check, "refused": str(count)} for check, count in found["refused_by"].items()]
        report.print_table(f"{way}: {found['outcomes']}, wrong {len(found['wrong'])}", rows)
    report.write_json(out, {"benchmark": "artifact_fuzz", "environment": report.environment(), **ways})


def prepare(folder: Path) -> None:
    """The artifacts that mutants are made of, and how much memory they declare at most."""
    built = build(folder)
    totals = [json.loads((path / "manifest.json").read_text())["memory"]["total"] for path in built.values()]
    (folder / "declared").write_text(str(max(totals)))


if __name__ == "__main__":
    main()
