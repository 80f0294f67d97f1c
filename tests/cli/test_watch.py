"""The live view: its frames, its plain lines, and all of it in a pseudo-terminal as a user sees it."""

import io
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from fcntl import ioctl
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dllmc.cli import main, terminal
from dllmc.cli.watch import LIVE, Tally, cells, coloured, frame, plain_line
from dllmc.runtime.request import GenerationResult
from dllmc.runtime.snapshot import Snapshot
from tests.cli.test_commands import DLLMC, GRID, OTHER, PUZZLE, SOLUTION

SURE, FAIR, POOR = (math.log(p) for p in (0.99, 0.7, 0.2))
MASK, END, NEWLINE = 0, 1, 10
CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def pieces(ids: Sequence[int]) -> list[str]:
    """A letter a token: 97 is a. 1 is an end token, which has no text; 200 and 201 are the two halves of a snowman."""
    texts = [{END: "", 200: "", 201: "☃"}.get(token, chr(token)) for token in ids]
    return [*texts[:-1], "?"] if ids and ids[-1] == 200 else texts


def snapshot(text: str, index: int = 0, block: int = 0, passes: int = 1, finished: bool = False) -> Snapshot:
    """One in which _ is masked; capitals were committed with less confidence than small letters, `block` is the end."""
    ids = [MASK if c == "_" else ord(c) for c in text]
    logprobs = [0.0 if c == "_" else POOR if c.isdigit() else FAIR if c.isupper() else SURE for c in text]
    return Snapshot(index, ids, [c == "_" for c in text], logprobs, (0, block or len(text)), passes, finished)


def tally_of(*steps: Sequence[Snapshot], prompts: int = 1, gen_length: int = 4) -> Tally:
    """What is known after some steps, one second each; between them the view took a hundred."""
    times = iter([0.0, *(t for i in range(len(steps)) for t in (101.0 * i + 1, 101.0 * i + 101))])
    tally = Tally(prompts, gen_length, clock=lambda: next(times))
    for step in steps:
        tally.add(step)
        tally.resume()
    return tally


def screen(tally: Tally, width: int = 80, height: int = 24, colours: bool = False) -> str:
    """A frame as it is printed."""
    out = io.StringIO()
    system = {"force_terminal": True, "color_system": "standard"} if colours else {}
    console = Console(file=out, width=width, height=height, **system)  # type: ignore[arg-type]
    console.print(frame(tally, pieces, console), end="")
    return out.getvalue()


def test_only_decoding_takes_time() -> None:
    """Seconds and tokens a second leave out what the view takes."""
    tally = tally_of([snapshot("a___")], [snapshot("ab__")], [snapshot("abcd")])
    assert tally.figures() == "4 tokens in 3 steps, 3.00 s, 1 tokens/s"


def test_fresh_tokens_are_those_of_the_last_step() -> None:
    """Of its prompts; one that was not in the step has none."""
    tally = tally_of([snapshot("a___"), snapshot("__z_", index=1)], [snapshot("ab_c")], prompts=2)
    assert tally.fresh == {0: {1, 3}}
    assert tally.tokens == 4


def test_a_finished_prompt_is_all_done() -> None:
    """A stop token cut it short: there are two tokens, and of four positions none is left to do."""
    tally = tally_of([snapshot("a___")], [snapshot("ab", finished=True)])
    assert (tally.tokens, tally.done) == (2, 4)


def test_cells_are_coloured_by_confidence() -> None:
    """Green from 0.9, yellow from 0.5, red below; masked positions dim, later blocks as dots; fresh ones reversed."""
    shown = cells(snapshot("aB1__c_", block=5), {5}, pieces, LIVE)
    assert shown == [
        ("a", "green"),
        ("B", "yellow"),
        ("1", "red"),
        ("▒", "dim"),
        ("▒", "dim"),
        ("c", "bold reverse green"),
        ("·", "dim"),
    ]


def test_a_character_of_two_tokens_and_tokens_without_text() -> None:
    """A run is decoded as one; an end token is a square; half a character is nothing until it is whole."""
    ids = [97, 200, 201, END, MASK, 200]
    half = Snapshot(0, ids, [token == MASK for token in ids], None, (0, 6), 1, False)
    assert [text for text, _ in cells(half, set(), pieces, LIVE)] == ["a", "", "☃", "∎", "▒", "?"]


def test_a_committed_newline_breaks_the_line() -> None:
    """A fresh one is seen as an arrow."""
    before, after = snapshot("____"), snapshot("a\n__")
    assert screen(tally_of([before], [after])).splitlines()[:2] == ["a↵", "▒▒"]
    assert screen(tally_of([after], [after])).splitlines()[:2] == ["a", "▒▒"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    """A model may write an escape sequence; it is shown, not obeyed."""
    shown = screen(tally_of([snapshot("\x1b[2J\t\x07", finished=True)], gen_length=6))
    assert shown.startswith("␛[2J␉␇\n")


def test_a_frame_says_how_far_it_is() -> None:
    """Below one prompt: tokens of all, steps, time, rate, and what the colours mean; several have a line each."""
    assert screen(tally_of([snapshot("ab__")])) == (
        "▒▒\n".join(["ab", ""]) + "\n2 of 4 tokens in 1 step, 1.00 s, 2 tokens/s   confidence <50% <90% more\n"
    )
    several = screen(tally_of([snapshot("ab__"), snapshot("wxyz", 1, finished=True)], prompts=3))
    assert several.splitlines() == [
        *("prompt 1: 2 of 4, 1 forward pass", "ab▒▒"),
        *("prompt 2: done, 1 forward pass", "wxyz"),
        "",
        "6 of 12 tokens in 1 step, 1.00 s, 6 tokens/s, 1 waiting   confidence <50% <90% more"[:80],
    ]


def test_colours_and_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours there is no legend either; what is fresh still stands out."""
    tally = tally_of([snapshot("A___")], [snapshot("Ab__")])
    shown = screen(tally, colours=True)
    assert "\x1b[33mA" in shown
    assert "\x1b[1;7;32mb" in shown
    assert shown.count("\x1b[2m▒") == 2
    monkeypatch.setenv("NO_COLOR", "1")
    shown = screen(tally, colours=True)
    assert not re.search(r"\x1b\[[\d;]*3[1-7]", shown)
    assert "\x1b[1;7mb" in shown
    assert "confidence" not in shown


@pytest.mark.parametrize("height", [4, 6, 9, 24])
def test_a_frame_is_no_taller_than_the_terminal(height: int) -> None:
    """What is running goes before what is done; how many have no room is said."""
    prompts = [snapshot("ab__", i, finished=i < 3) for i in range(8)]
    lines = screen(tally_of(prompts, prompts=8), height=height).splitlines()
    assert len(lines) <= height
    shown = [int(line.split(":")[0].removeprefix("prompt ")) for line in lines if line.startswith("prompt ")]
    fitting = min(8, (height - 2) // 2)
    assert shown == sorted([4, 5, 6, 7, 8, 1, 2, 3][:fitting])
    assert (f"{8 - fitting} not shown" in lines[-1]) == (fitting < 8)


def test_a_long_completion_shows_its_current_block() -> None:
    """Broken at the width; where not all lines fit, the last ones up to the end of the block."""
    text = "".join(chr(97 + i // 10 % 26) for i in range(200)) + "_" * 100
    lines = screen(tally_of([snapshot(text, block=210)], gen_length=300), width=10, height=8).splitlines()
    assert len(lines) <= 8
    assert lines[:6] == [*(chr(97 + i % 26) * 10 for i in range(15, 20)), "▒" * 10]


def test_plain_lines() -> None:
    r"""Without a terminal: no glyphs, newlines as \n."""
    step = snapshot("a\n__b___", index=2, block=5)
    assert plain_line(tally_of([step]), step, pieces) == r"step 1, prompt 3: 3 of 8 tokens: a\n__b___"


def test_a_coloured_result_is_its_text() -> None:
    """Without the terminal's codes it is the text, to the character; white space is not coloured."""
    result = GenerationResult([97, 66, NEWLINE, 49, END], "aB\n1", 5, "stop", [SURE, FAIR, SURE, POOR, SURE])
    tokenizer = type("Letters", (), {"pieces": staticmethod(pieces)})()
    shown = coloured(result, tokenizer)
    assert shown == "\x1b[32ma\x1b[0m\x1b[33mB\x1b[0m\n\x1b[31m1\x1b[0m"
    assert CSI.sub("", shown) == result.text


class FakeTerminal(io.StringIO):
    """Standard error of a user who sits before it."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def drawn_while(report: Callable[[terminal.Show], object]) -> str:
    """What a progress bar writes to a terminal while something reports to it."""
    with redirect_stderr(FakeTerminal()) as user, terminal.progress("load") as show:
        report(show)
    return user.getvalue()


def test_a_bar_appears_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the delay, although nothing is reported; with label and counts; its line is cleared at the end."""

    def slowly(show: terminal.Show) -> None:
        time.sleep(0.3)
        show("cse", 1, 2)
        time.sleep(0.3)

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal, "DELAY_S", 0.01)
    drawn = drawn_while(slowly)
    assert "load" in drawn
    assert "cse (1 of 2)" in drawn
    assert drawn.rstrip("\r").endswith(("\x1b[2K", "\x1b[1A\x1b[2K"))
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_what_is_quick_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal, "DELAY_S", 60.0)
    assert drawn_while(lambda show: show("cse", 1, 2)) == ""


def test_no_bar_where_lines_cannot_be_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(terminal, "DELAY_S", 0.0)
    assert drawn_while(lambda show: time.sleep(0.2)) == ""


class Session:
    """A command in a pseudo-terminal of 30 lines of 100 columns; `piped` keeps standard output apart from it."""

    def __init__(self, *arguments: str, piped: bool = False, **environment: str) -> None:
        self._terminal, inner = pty.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        unset = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"}
        kept = {key: value for key, value in os.environ.items() if key not in unset}
        self.process = subprocess.Popen(
            (*DLLMC, *arguments),
            stdin=inner,
            stdout=subprocess.PIPE if piped else inner,
            stderr=inner,
            env={**kept, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
            start_new_session=True,
        )
        os.close(inner)
        self.seen = ""

    def read(self, until: str | None = None) -> str:
        """Everything shown so far: up to some text, or to the end of the command."""
        deadline = time.monotonic() + 120
        while until is None or until not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if not select.select([self._terminal], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(self._terminal, 65536)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            if not chunk:
                break
            self.seen += chunk.decode(errors="replace")
        if until is None:
            self.process.wait(timeout=60)
            os.close(self._terminal)
        return self.seen.replace("\r\n", "\n")


def frames_of(shown: str) -> list[str]:
    """What was drawn between two moves of the cursor back to the top, without colours."""
    parts = re.split(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*", shown)
    return [CSI.sub("", part) for part in parts if " tokens in " in part]


def test_watch_in_a_terminal(tiny_llada: Path) -> None:
    """A frame a step, each with one token more; then the completion stays, in colour, with its cost below.

    The grid has 19 positions, each a character: a digit or the end of a line.
    """
    session = Session("generate", str(tiny_llada), "--prompt", PUZZLE, "--watch", "--gen-length", "19")
    shown = session.read()
    assert session.process.returncode == 0
    live, _, rest = shown.rpartition("\x1b[?25h")  # the cursor is shown again when the live view has gone
    shown_by_step = {
        int(counts[2]): (int(counts[1]), text.replace("↵", "")[:19])
        for text in frames_of(live)
        if (counts := re.search(r"(\d+) of 19 tokens in (\d+) steps?, ", text)) is not None
    }
    assert sorted(shown_by_step) == list(range(20))
    del shown_by_step[0]  # before the first step there is no grid yet
    for step, (tokens, grid) in shown_by_step.items():
        assert tokens == step
        assert grid.count("▒") == 19 - step
        assert all(seen in (right, "▒") for seen, right in zip(grid, SOLUTION[:19], strict=True)), grid
    assert re.search(r"\x1b\[1;7;3[123]m", live)
    assert re.search(r"\x1b\[3[123]m\d", rest)
    figures, *after = CSI.sub("", rest).lstrip("\r").splitlines()
    assert re.fullmatch(r"\[19 tokens in 19 steps, [\d.]+ s, \d+ tokens/s\]", figures)
    assert after == [*SOLUTION.splitlines(), "[19 tokens, 19 forward passes, length]"]


def test_watch_with_standard_output_elsewhere_and_without_colours(tiny_llada: Path) -> None:
    """The view stays on the terminal, the file gets the plain completions; NO_COLOR is respected."""
    prompts = ("--prompt", PUZZLE, "--prompt", OTHER)
    session = Session("generate", str(tiny_llada), *prompts, "--watch", *GRID, piped=True, NO_COLOR="1")
    shown = session.read()
    assert session.process.stdout is not None
    with session.process.stdout as stream:
        assert stream.read().decode().startswith(SOLUTION)
    assert "38 of 38 tokens in " in shown
    assert re.search(r"prompt 2: done, \d+ forward pass", CSI.sub("", shown))
    live = shown[shown.index("0 of 38 tokens") :]  # before that, the spinner of loading
    assert not re.search(r"\x1b\[(?:\d+;)*3[0-8]", live)


def test_ctrl_c_leaves_the_terminal_as_it_was(tiny_llada: Path) -> None:
    """The live view goes, the cursor is back, one word stays; the exit code is 130."""
    session = Session("generate", str(tiny_llada), "--prompt", "x", "--watch", "--gen-length", "400", "--ignore-eos")
    session.read(until=" of 400 tokens in 2 steps")
    session.process.send_signal(signal.SIGINT)
    shown = session.read()
    assert session.process.returncode == 130
    _, _, rest = shown.rpartition("\x1b[?25h")
    assert CSI.sub("", rest).split() == ["interrupted"]


def test_progress_in_a_terminal(tiny_llada: Path) -> None:
    """Loading takes over half a second: a bar says so, and is gone when the completion is printed."""
    session = Session("generate", str(tiny_llada), "--prompt", PUZZLE, *GRID)
    shown = session.read()
    bars, _, rest = shown.rpartition("\x1b[?25h")
    assert f"load {tiny_llada}"[:40] in CSI.sub("", bars)
    *completion, cost = CSI.sub("", rest).strip().splitlines()
    assert completion == SOLUTION.split()
    assert cost.startswith("[19 tokens, ")


def test_watch_without_a_terminal(tiny_llada: Path) -> None:
    """A line a step and prompt on standard error; standard output is as without it."""
    arguments = ["generate", str(tiny_llada), "--prompt", PUZZLE, "--prompt", OTHER, "--gen-length", "19"]
    plain, watched = (CliRunner().invoke(main, [*arguments, *more]) for more in ((), ("--watch",)))
    assert watched.stdout == plain.stdout
    lines = watched.stderr.splitlines()
    assert len(lines) == 2 * 19 + 1 + 2
    for step in range(19):
        for prompt in (1, 2):
            line = lines[2 * step + prompt - 1]
            assert line.startswith(f"step {step + 1}, prompt {prompt}: {step + 1} of 19 tokens: ")
            assert line.rpartition(": ")[2].count("_") == 18 - step
    first = SOLUTION.rstrip("\n").replace("\n", "\\n")
    assert lines[36].endswith(f": {first}")
    assert not CSI.search(watched.stderr)
