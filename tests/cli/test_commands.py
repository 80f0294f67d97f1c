"""The command line: what a user types and reads. The live view has tests of its own, in test_watch.py."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dllmc
from dllmc.cli import main
from dllmc.cli.options import CHOICES, DEFAULTS
from dllmc.ir.graph_printer import size
from dllmc.ir.program import DEVICES
from tests.golden.cases import ROOT

PUZZLE = r"sudoku:\n1003\n0300\n3210\n4132\n"
SOLUTION = "1423\n2341\n3214\n4132\n"
OTHER, OTHER_SOLUTION = r"sudoku:\n1040\n3401\n0004\n4012\n", "1243\n3421\n2134\n4312\n"
GRID = ("--gen-length", "19", "--block-length", "19", "--threshold", "0.9")
DLLMC = (sys.executable, "-c", "from dllmc.cli import main; main(prog_name='dllmc')")
TINY_LLADA = Path(__file__).parents[2] / "examples" / "tiny-llada"


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    """Run `dllmc ARGUMENTS`."""
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin, prog_name="dllmc")


def newlines(prompt: str) -> str:
    return prompt.replace("\\n", "\n")


@pytest.fixture(scope="module")
def chat_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template that makes a Sudoku prompt of a grid."""
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = shutil.copytree(TINY_LLADA, folder / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(
        "{% for message in messages if message.role == 'user' %}sudoku:\n{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    return dllmc.compile(checkpoint, folder / "out").path


def test_compile_prints_the_memory_equation(tmp_path: Path) -> None:
    """Prints weights + arena + kv_pool + state = total, what each pass did, and where the artifact is."""
    result = run("compile", ROOT / "llada-mha", tmp_path / "out", "--max-tokens-per-step", "512")
    assert result.exit_code == 0, result.output
    memory = dllmc.load(tmp_path / "out").artifact.memory
    parts = [memory[name] for name in ("weights", "arena", "kv_pool", "state")]
    assert sum(parts) == memory["total"]
    assert (
        f"weights {size(parts[0])} + arena {size(parts[1])} + kv_pool {size(parts[2])} + state {size(parts[3])}"
        in result.output
    )
    assert "fuse-head" in result.output
    assert f"wrote {tmp_path / 'out'}" in result.output


def test_compile_json_is_what_inspect_says(tmp_path: Path) -> None:
    """One JSON document and nothing else on stdout, the same as `inspect --json` prints of that artifact."""
    compiled = run("compile", ROOT / "llada-mha", tmp_path / "out", "--max-requests", "3", "--json")
    assert compiled.exit_code == 0
    assert compiled.stdout == run("inspect", tmp_path / "out", "--json").stdout
    assert json.loads(compiled.stdout)["options"]["max_requests"] == 3


def test_compile_tells_its_stages(tmp_path: Path) -> None:
    """`on_stage` is called as each stage begins: numbered, as many as announced, every pass among them."""
    told: list[tuple[str, int, int]] = []
    dllmc.compile(ROOT / "llada-mha", tmp_path / "out", on_stage=lambda *stage: told.append(stage))
    names, done, totals = zip(*told, strict=True)
    passes = dllmc.CompileOptions().passes.split(",")
    assert list(names) == ["load the model", "capture a step", *passes, "write the artifact"]
    assert list(done) == list(range(len(told)))
    assert set(totals) == {len(told)}


def test_inspect(tiny_llada: Path) -> None:
    """The model, the program and its limits, the pass log, the memory; with --program every instruction."""
    short, full = run("inspect", tiny_llada), run("inspect", tiny_llada, "--program")
    for wanted in ("mask 1", "4096 tokens", "select-logit-rows", "weights", "kv_pool", "optimal"):
        assert wanted in short.output
    assert full.output.startswith(short.output)
    assert "dllmc.decode_head.default(" in full.output


def test_inspect_json(tiny_llada: Path) -> None:
    """The documented fields, with the artifact's own numbers; --program adds the stored programs."""
    artifact = dllmc.load(tiny_llada).artifact
    short, full = (json.loads(run("inspect", tiny_llada, "--json", *more).stdout) for more in ((), ("--program",)))
    assert list(short) == [
        *("artifact", "schema", "versions", "model", "options", "programs", "passes", "trace", "memory_bytes"),
    ]
    assert short["memory_bytes"] == dict(artifact.memory)
    assert short["model"]["mask_id"] == artifact.spec.mask_id
    [program] = [program for program in short["programs"] if program["name"] == "dense"]
    assert [entry["name"] for entry in short["programs"]] == ["dense", "mixed", "refresh", "reuse"]
    assert list(program) == ["name", "instructions", "buffers", "maxima", "arena_bytes", "lower_bound_bytes"]
    assert program["instructions"] == len(artifact.programs["dense"].instructions)
    stored = json.loads((tiny_llada / "programs" / "dense.json").read_text())
    assert {**program, "program": stored} in full["programs"]


def test_generate_text(tiny_llada: Path) -> None:
    r"""A text prompt with \n escapes gives the completion on stdout, the count of passes on stderr."""
    result = run("generate", tiny_llada, "--prompt", PUZZLE, "--gen-length", "19", "--block-length", "19")
    assert result.stdout == SOLUTION
    assert "19 tokens, 19 forward passes" in result.stderr


def test_generate_token_ids(tiny_llada: Path) -> None:
    """Several prompts, as ids or text, come out in order of their kinds; options reach the decoder."""
    tokenizer = dllmc.load(tiny_llada).tokenizer
    assert tokenizer is not None
    ids = ",".join(map(str, tokenizer.encode(newlines(OTHER))))
    result = run("generate", tiny_llada, "--prompt-ids", ids, "--prompt", PUZZLE, *GRID)
    assert result.stdout == SOLUTION + OTHER_SOLUTION


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_prompts_from_a_text_file(tiny_llada: Path, tmp_path: Path, line_end: str) -> None:
    r"""One prompt a line, \n for a newline; empty lines and a byte order mark do not count; after --prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\N{BYTE ORDER MARK}{OTHER}{line_end}{line_end}{PUZZLE}".encode())
    result = run("generate", tiny_llada, "--file", file, "--prompt", PUZZLE, *GRID)
    assert result.stdout == SOLUTION + OTHER_SOLUTION + SOLUTION


def test_prompts_from_json_lines(tiny_llada: Path, tmp_path: Path) -> None:
    """`input` is text as it is, or ids; without it `token_ids` is the prompt; other fields are ignored."""
    tokenizer = dllmc.load(tiny_llada).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(newlines(OTHER))
    objects = [{"input": newlines(PUZZLE), "token_ids": [5], "id": 7}, {"token_ids": ids}, {"input": ids}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, objects)))
    result = run("generate", tiny_llada, "--file", file, *GRID)
    assert result.stdout == SOLUTION + OTHER_SOLUTION * 2


@pytest.mark.parametrize("options", [(), ("--file", "-")])
def test_prompts_from_standard_input(tiny_llada: Path, options: tuple[str, ...]) -> None:
    """Lines, as of a text file, when no prompt is given, or where the file is -."""
    result = run("generate", tiny_llada, *options, *GRID, stdin=f"{PUZZLE}\n{OTHER}\n")
    assert result.stdout == SOLUTION + OTHER_SOLUTION


def test_standard_input_is_left_alone_when_there_is_a_prompt(tiny_llada: Path) -> None:
    """As in a `while read` loop, whose input a command must not swallow."""
    assert run("generate", tiny_llada, "--prompt", PUZZLE, *GRID, stdin=OTHER).stdout == SOLUTION


def test_chat(chat_artifact: Path) -> None:
    """With --chat a prompt is a message in the checkpoint's template, which ends where the answer begins."""
    message = PUZZLE.removeprefix(r"sudoku:\n").removesuffix(r"\n")
    result = run("generate", chat_artifact, "--chat", "--prompt", message, "--json", *GRID)
    document = json.loads(result.stdout)
    assert document["output"] + "\n" == SOLUTION
    assert document["input"] == newlines(message)


def test_generate_json(tiny_llada: Path) -> None:
    """One object a prompt on stdout, with the documented fields, and nothing else anywhere."""
    result = run("generate", tiny_llada, "--prompt", PUZZLE, "--prompt-ids", "5 6,7", "--json", *GRID)
    text, ids = map(json.loads, result.stdout.splitlines())
    engine = dllmc.load(tiny_llada)
    params = dllmc.SamplingParams(gen_length=19, block_length=19, threshold=0.9)
    for document, prompt in ((text, newlines(PUZZLE)), (ids, [5, 6, 7])):
        [expected] = engine.generate(prompt, params)
        assert document == {
            "input": prompt,
            "output": expected.text,
            "token_ids": expected.token_ids,
            "forward_passes": expected.forward_passes,
            "finish_reason": expected.finish_reason,
        }
    assert result.stderr == ""


def test_without_a_tokenizer_a_completion_is_ids(tmp_path: Path) -> None:
    """Text is null in JSON; printed, a completion looks as --prompt-ids takes it."""
    artifact = dllmc.compile(ROOT / "llada-mha", tmp_path / "out").path
    options = ("--prompt-ids", "1,2,3", "--gen-length", "4", "--block-length", "4")
    document = json.loads(run("generate", artifact, *options, "--json").stdout)
    assert document["output"] is None
    assert run("generate", artifact, *options).stdout == ",".join(map(str, document["token_ids"])) + "\n"


def test_out_is_what_json_prints(tiny_llada: Path, tmp_path: Path) -> None:
    """--out writes the lines of --json instead of completions; an older file is replaced, and nothing else is left."""
    file = tmp_path / "results.jsonl"
    file.write_text("older\n" * 9)
    command = ("generate", tiny_llada, "--prompt", PUZZLE, "--prompt", OTHER, *GRID)
    written = run(*command, "--out", file)
    printed = run(*command, "--json")
    assert file.read_text() == printed.stdout
    assert written.stdout == ""
    assert f"wrote 2 completions to {file}" in written.stderr
    assert list(tmp_path.iterdir()) == [file]
    assert run(*command, "--out", file, "--json").stdout == printed.stdout


def test_a_failure_keeps_the_older_out(tiny_llada: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("older\n")
    assert run("generate", tiny_llada, "--prompt", "a" * 600, "--out", file).exit_code == 2
    assert file.read_text() == "older\n"
    assert list(tmp_path.iterdir()) == [file]


def test_results_can_be_prompts_again(tiny_llada: Path, tmp_path: Path) -> None:
    """A file that --out wrote gives the same prompts to --file, ids and text."""
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    run("generate", tiny_llada, "--prompt", PUZZLE, "--prompt-ids", "5,6,7", *GRID, "--out", first)
    run("generate", tiny_llada, "--file", first, *GRID, "--out", second)
    assert second.read_text() == first.read_text()
    assert len(first.read_text().splitlines()) == 2


def is_one_line(result: Result) -> bool:
    """Exit code 2, an empty stdout, and one line on stderr that says "error"."""
    text = result.stderr
    return (
        result.exit_code == 2
        and result.stdout == ""
        and text.startswith("error: ")
        and text.endswith("\n")
        and text.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compil",), "No such command 'compil'."),
        (("--nonsense",), "Try 'dllmc --help'"),
        (("generate", "ARTIFACT", "--stepz", "4"), "--steps"),
        (("compile", "nowhere/at/all", "out"), "nowhere/at/all: expected an existing folder or a hub id"),
        (("compile", "CHECKPOINT"), "Missing argument 'OUT'"),
        (("compile", "CHECKPOINT", "."), "is no artifact; choose another output directory"),
        (("compile", "CHECKPOINT", "out", "--dtype", "int8"), "'float32', 'bfloat16', 'float16'"),
        (("compile", "CHECKPOINT", "out", "--passes", "fuse-everything"), "no pass is named 'fuse-everything'"),
        (("compile", "CHECKPOINT", "out", "--max-requests", "0"), "max_requests"),
        (("inspect", "nowhere"), "nowhere: no such directory; give a directory that `dllmc compile` wrote"),
        (("inspect", "."), "has no manifest.json"),
        (("generate", "nowhere", "--prompt", "x"), "nowhere: no such directory"),
        (("generate", "ARTIFACT"), "standard input: no prompts in it"),
        (("generate", "ARTIFACT", "--prompt-ids", "1,x"), "expected token ids such as 12,7,300"),
        (("generate", "ARTIFACT", "--prompt-ids", "1,5000"), "--prompt-ids 1,5000: prompt[1] is 5000"),
        (("generate", "ARTIFACT", "--prompt", ""), "--prompt '': the prompt is empty"),
        (("generate", "ARTIFACT", "--prompt", "\udcff"), "give valid UTF-8"),
        (("generate", "ARTIFACT", "--prompt-ids", "1", "--steps", "3", "--threshold", "0.5"), "at most one"),
        (("generate", "ARTIFACT", "--prompt-ids", "1", "--gen-length", "9999"), "512"),
        (("generate", "ARTIFACT", "--prompt", "x", "--remasking", "best"), "'low_confidence'"),
        (("generate", "ARTIFACT", "--prompt", "x", "--top-k", "0"), "[1, 1024]"),
        (("generate", "ARTIFACT", "--file", "nowhere.txt"), "nowhere.txt: No such file or directory"),
        (("generate", "ARTIFACT", "--file", "."), ".: Is a directory"),
        (("generate", "ARTIFACT", "--prompt", "x", "--out", "."), "exists and is no file"),
        (("generate", "ARTIFACT", "--prompt", "x", "--out", "no/folder/x.jsonl"), "give a file in a folder that"),
        (("generate", "ARTIFACT", "--prompt", "x", "--chat"), "--chat: the tokenizer has no chat template"),
        (("generate", "ARTIFACT", "--prompt-ids", "1,2", "--chat"), "--chat takes text, found token ids"),
        (("completion", "csh"), "'bash', 'zsh', 'fish'"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: tuple[str, ...], message: str, tiny_llada: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake gets a line with what to do next, no traceback, exit code 2, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    known = {"ARTIFACT": str(tiny_llada), "CHECKPOINT": str(ROOT / "llada-mha")}
    result = run(*(known.get(a, a) for a in arguments))
    assert is_one_line(result), result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", "p.txt: no prompts in it"),
        ("p.txt", b"good\n\xff\n", "p.txt: byte 5 is not UTF-8"),
        ("p.json", b"[]", "p.json: expected one prompt a line"),
        ("p.txt", b"good\n\n" + b"a" * 500, "p.txt, line 3: the prompt's 500 tokens and gen_length = 128"),
        ("p.jsonl", b'{"input": "good"}\n\n{"input": ', "p.jsonl, line 3: not JSON"),
        ("p.jsonl", b'{"input": "good"}\n{"prompt": "x"}\n', 'p.jsonl, line 2: expected an object such as {"input"'),
        ("p.jsonl", b'"text"\n', "p.jsonl, line 1: expected an object"),
        ("p.jsonl", b'{"input": 3}\n', "p.jsonl, line 1: expected an object"),
        ("p.jsonl", b'{"token_ids": [1, true]}\n', "p.jsonl, line 1: expected an object"),
        ("p.jsonl", b'{"token_ids": []}\n', "p.jsonl, line 1: expected an object"),
        ("p.jsonl", b'{"token_ids": [1, 9999]}\n', "p.jsonl, line 1: prompt[1] is 9999"),
        ("p.jsonl", b'{"input": "\\ud800"}\n', "p.jsonl, line 1: character 0 is half of a surrogate pair"),
        ("p.jsonl", b"[" * 100_000 + b"\n", "p.jsonl, line 1: not JSON"),
    ],
)
def test_a_bad_line_is_named(name: str, content: bytes, message: str, tiny_llada: Path, tmp_path: Path) -> None:
    """What is wrong with a file of prompts is told with the file and the line."""
    (tmp_path / name).write_bytes(content)
    result = run("generate", tiny_llada, "--file", tmp_path / name)
    assert is_one_line(result), result.output
    assert message in result.stderr


def test_ctrl_c_ends_a_command_with_130(tiny_llada: Path, tmp_path: Path) -> None:
    """One word instead of a traceback, and no half-written file."""
    file = tmp_path / "results.jsonl"
    command = (*DLLMC, "generate", str(tiny_llada), "--prompt", "x", "--gen-length", "400", "--ignore-eos", "--watch")
    process = subprocess.Popen((*command, "--out", str(file)), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("step 1, ")
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest.endswith("\ninterrupted\n")
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(tiny_llada: Path) -> None:
    """As with `| head`: no message, no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        (*DLLMC, "inspect", str(tiny_llada), "--program"), stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_is_in_sections_with_an_example() -> None:
    """Options stand under headings in the order of their use; every command's help ends with examples."""
    text = run("generate", "--help").stdout
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Prompts", "Decoding", "Sampling", "Tokens", "Cache", "Loading", "Output", "Other"]
    for name in main.commands:
        text = run(name, "--help").stdout
        assert f"    dllmc {name} " in text or f"dllmc {name} bash" in text
        assert max(map(len, text.splitlines())) <= 90
    assert run().stdout == run("--help").stdout


def test_help_is_quick() -> None:
    """Under 0.3 s of a processor, the best of five: nothing large is imported, rich neither."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run((*DLLMC, "--help"), check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3
    script = "import sys; import dllmc.cli; sys.exit(bool({'rich', 'numpy', 'torch'} & set(sys.modules)))"
    subprocess.run((sys.executable, "-c", script), check=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """The script calls dllmc back under the variable that it answers to."""
    script = run("completion", shell).stdout
    assert f"_DLLMC_COMPLETE={shell}_complete" in script
    assert "dllmc" in run("completion", "--help").stdout


def test_completion_in_bash(tiny_llada: Path) -> None:
    """bash, having run the script, asks dllmc for commands, options and values."""
    folder = Path(sys.executable).parent
    script = run("completion", "bash").stdout

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        ask = f'{script}\n{line}\n_dllmc_completion dllmc; echo "${{COMPREPLY[@]}}"'
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(("bash", "-c", ask), capture_output=True, text=True, env=environment, check=True)
        return done.stdout.split()

    assert completed("dllmc", "comp") == ["compile", "completion"]
    assert completed("dllmc", "generate", "x", "--th") == ["--threshold", "--threads"]
    assert completed("dllmc", "generate", "x", "--remasking", "e") == ["entropy"]


def test_defaults_are_those_of_the_api() -> None:
    """--help shows the defaults and choices of CompileOptions and SamplingParams without importing them."""
    from dllmc import compiler
    from dllmc.runtime import params

    api = {f.name: f.default for cls in (dllmc.CompileOptions, dllmc.SamplingParams) for f in fields(cls)}
    assert {name: api[name] for name in DEFAULTS} == DEFAULTS
    chosen = {"dtype": compiler.DTYPES, "device": DEVICES, "schedule": params.SCHEDULES}
    chosen |= {"remasking": params.CONFIDENCE_RULES, "mode": params.CACHE_MODES, "selection": params.SELECTIONS}
    assert chosen == CHOICES


def test_every_field_of_a_cache_policy_has_an_option() -> None:
    for command in ("generate", "eval"):
        assert {f.name for f in fields(dllmc.CachePolicy)} <= {p.name for p in main.commands[command].params}


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ((), dllmc.CachePolicy(mode="none")),
        (("--cache", "block"), dllmc.CachePolicy()),
        (
            ("--retention", "0.5", "--selection", "shared", "--pool", "5", "--delay", "1", "--refresh-interval", "2"),
            dllmc.CachePolicy(retention=0.5, selection="shared", pool=5, delay=1, refresh_interval=2),
        ),
    ],
    ids=["dense", "block", "every field"],
)
def test_the_policy_of_generate(
    tiny_llada: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], policy: dllmc.CachePolicy
) -> None:
    """Dense unless something is said of a cache."""
    policies = []

    def generate(engine: dllmc.Engine, *given: Any, **_: Any) -> list[Any]:
        policies.append(given[2])
        return []

    monkeypatch.setattr(dllmc.Engine, "generate", generate)
    result = run("generate", tiny_llada, "--prompt", PUZZLE, *options)
    assert policies == [policy], result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--retention", "1.5"), "CachePolicy.retention is 1.5; expected a number in (0, 1]"),
        (("--cache", "none", "--delay", "1", "--pool", "3"), "--cache none decodes dense, so --pool, --delay would do"),
        (("--selection", "all"), "'all' is not one of 'per_head', 'shared'"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(tiny_llada: Path, options: tuple[str, ...], message: str) -> None:
    result = run("generate", tiny_llada, "--prompt", PUZZLE, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_every_sampling_parameter_has_an_option() -> None:
    """All but `logprobs`, which `--watch` sets."""
    names = {parameter.name for parameter in main.commands["generate"].params}
    assert {f.name for f in fields(dllmc.SamplingParams)} - names == {"logprobs"}
