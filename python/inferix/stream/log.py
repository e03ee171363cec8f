"""What `inferix play` writes to its terminal: a line a second at most, whatever strangers do."""

from __future__ import annotations

import logging
import time
import traceback

PERIOD = 1.0  # seconds


class Sparing(logging.Filter):
    """Lets a record through each PERIOD, as one line that says how many were left out since."""

    def __init__(self) -> None:
        super().__init__()
        self._next, self._dropped = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            self._dropped += 1
            return False
        text = record.getMessage()
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            place = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            text += f" ({type(error).__name__}: {error}{place})"
        if self._dropped:
            text += f" [{self._dropped} more]"
        record.msg, record.args = " ".join(text.split())[:1000], None
        record.exc_info = record.exc_text = record.stack_info = None
        self._next, self._dropped = now + PERIOD, 0
        return True


def configure() -> None:
    """Log sparingly to stderr, unless the program that we are part of has its own way of logging."""
    handler = logging.StreamHandler()
    handler.addFilter(Sparing())
    logging.basicConfig(level=logging.WARNING, format="inferix play: %(message)s", handlers=[handler])
