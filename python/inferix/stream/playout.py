"""When a picture is shown, and when a block is begun.

A model makes a block at once and then nothing for a while; who watches wants one picture after the other. Pictures are
shown at the model's pace by a clock that slips when one is late and never hurries to catch up. A block is begun as late
as it can be and still be ready in time: what is pressed until then steers it.
"""

from __future__ import annotations


class PlayoutClock:
    """Says when the next picture is due; all times are in seconds of one clock."""

    def __init__(self, fps: float):
        self.period = 1.0 / fps
        self.due = 0.0
        self.slips = 0
        self._started = False

    def next(self, now: float) -> float:
        """When to show a picture that is here at `now`: one period after the one before, or at once if it is late."""
        return max(now, self.due + self.period) if self._started else now

    def show(self, due: float) -> None:
        """A picture is shown, at the time that `next` gave."""
        if self._started and due > self.due + self.period:
            self.slips += 1
        self.due, self._started = due, True

    def left(self, queued: int, now: float) -> float:
        """Seconds from `now` until one more picture, behind `queued` ones, is due."""
        return queued * self.period + (max(0.0, self.due + self.period - now) if self._started else 0.0)

    def rest(self) -> None:
        """What comes next is not late: the world was paused or began anew."""
        self._started = False


class Lead:
    """How long before its first picture is due a block is begun: the time that blocks take, and a margin.

    A slow block is remembered and forgotten slowly; `limit` is how far the world may run ahead of what is shown.
    """

    def __init__(self, limit: float, margin: float = 0.01, forget: float = 0.06):
        self.limit, self.margin, self.forget = limit, margin, forget
        self.expected: float | None = None

    def made(self, seconds: float) -> None:
        """A block took this long, from its controls to its pictures."""
        expected = seconds if self.expected is None else self.expected
        self.expected = max(seconds, expected + self.forget * (seconds - expected))

    def wait(self, left: float) -> float:
        """Seconds to wait before beginning, if the first picture is due in `left` seconds; <= 0: now."""
        lead = self.limit if self.expected is None else min(self.limit, self.expected + self.margin)
        return left - lead
