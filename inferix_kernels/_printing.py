"""What commands print, when nobody reads it any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

NOBODY_READS = 141  # what a shell says of a program that SIGPIPE ended


def while_read(run: Callable[[], int]) -> int:
    """What `run` returns or, quietly, 141, if whoever reads what it prints has gone (`| head`)."""
    try:
        try:
            return run()
        finally:  # also of --help, which ends with SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # the interpreter flushes them once more
            if stream is not None:
                os.dup2(nowhere, stream.fileno())
        return NOBODY_READS
