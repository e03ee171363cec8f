"""A slice of the soak with viewers, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiortc", reason="needs the extra `stream`")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux shows in /proc")
def test_viewers_come_and_go_and_nothing_stays() -> None:
    """`python -m tests.soak.soak_viewers` takes as long as one likes."""
    command = [sys.executable, "-m", "tests.soak.soak_viewers", "--seconds", "12"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
