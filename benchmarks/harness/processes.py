"""Commands that may hang: each in a session of its own, ended as a whole, and given up if it can't be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 5.0  # seconds in which a killed process has to be gone


def search_path() -> str:
    """PATH, and then where CUDA's tools lie by default: they are often not on it."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])


class Process:
    """A command at work. What it prints goes to a file, so that nobody waits for the end of a pipe.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        # In memory where there is such a file, so that a full disk does not take what was said about it.
        memory = getattr(os, "memfd_create", None)
        self.file = os.fdopen(memory("output"), "w+b") if memory else tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """The exit code; None: it still runs after this many seconds."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def kill(self, grace: float = GRACE) -> bool:
        """End it with all that it has started. False: it is stuck in the driver, say, and was left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return gone(self.process, grace)

    def output(self, most: int) -> str:
        """The last bytes of what it printed."""
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(max(0, end - most))
        return self.file.read().decode(errors="replace")


def since_start() -> float:
    """Seconds that this process has been there, importing torch most of them; 0 where Linux's books are not."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


def gone(process: subprocess.Popen[str] | subprocess.Popen[bytes], grace: float = GRACE) -> bool:
    """Has a killed process ended, within the grace?"""
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        return False
    return True


def how(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "its output is closed"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
