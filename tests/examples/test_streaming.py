"""The example of an asyncio program runs, and its requests share steps."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "streaming.py"


def test_it_streams_three_requests() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True)
    assert "\n\n1423\n2341\n3214\n4132\n" in done.stdout
    assert "a sum    '5798'" in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["3", "requests,"]
    assert int(last[5]) < int(last[2])
