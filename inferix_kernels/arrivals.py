"""Pages that are on their way: counters that say which have come, and what is raised when one does not.

Whoever brings pages, a thread that receives or copies them, writes them and then raises a counter. An attention call
whose plan names counters (Plan.arrivals) begins with the pages that are there and waits for the others, in the order of
its lists. So one call takes the place of one for each group of pages that comes, and of the merges between them.
"""

from __future__ import annotations

import functools
import numbers
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._check import check_counts, check_index, whole

_lock = threading.Lock()
_MOST = 2**31 - 1
_SHOWN = 8  # page ids in a message


@functools.cache
def _raiser() -> Callable[[int, int], None] | None:
    """_C's, which is loaded when it is first needed. Where it is not built the reference alone reads counters: Python's
    lock is enough."""
    try:
        from . import _C
    except ImportError:
        return None
    return _C.raise_to


def check_deadline(deadline: float) -> None:
    if not isinstance(deadline, numbers.Real) or not 0 <= deadline < 1e9:
        raise ValueError(f"deadline must be a number of seconds, got {deadline!r:.80}")


class NotArrived(TimeoutError):
    """Pages that an attention call waits for did not come in time. What it writes to then holds nothing of use.

    Attributes:
        pages: their ids, sorted.
        deadline: how long was waited, in seconds from the start of the call.

    Example:
        >>> str(NotArrived([3, 7], 0.5))
        'pages 3, 7 did not come within 0.5 s'
    """

    def __init__(self, pages: Sequence[int], deadline: float):
        self.pages, self.deadline = list(pages), deadline
        more = f" and {len(pages) - _SHOWN} more" if len(pages) > _SHOWN else ""
        ids = ", ".join(map(str, pages[:_SHOWN])) + more
        super().__init__(f"pages {ids} did not come within {deadline:g} s")

    def __reduce__(self) -> tuple[type[NotArrived], tuple[list[int], float]]:
        return NotArrived, (self.pages, self.deadline)


class Counters:
    """Counters in host memory, which threads raise when what others wait for has been written. They begin at 0.

    Not for attention on a GPU yet: no kernel there waits for pages.

    Attributes:
        values: int32 [count]: what a plan has as its `counters`, whole, or of each layer a contiguous part.

    Example:
        >>> counters = Counters(2)
        >>> counters.raise_to(1, 3)
        >>> counters.raise_to(1, 2)  # is there already
        >>> counters.values.tolist()
        [0, 3]
    """

    def __init__(self, count: int):
        check_counts({"count": count}, 0)
        self.values: Tensor = torch.zeros(count, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.values)

    def raise_to(self, index: int, value: int) -> None:
        """Say that all is written that waits for `value` of a counter. It never falls: a lower value changes nothing.

        One atomic step that releases: a thread which then sees the counter there sees what was written before.

        Args:
            index: of the counter.
            value: at most 2^31 - 1.
        """
        index, value = check_index("index", index, len(self.values)), whole("value", value)
        if not -_MOST <= value <= _MOST:
            raise ValueError(f"value must be a number of 32 bits, got {value}")
        raise_to = _raiser()
        if raise_to is not None:
            raise_to(self.values.data_ptr() + 4 * index, value)
        else:
            with _lock:
                self.values[index] = max(int(self.values[index]), value)

    def reset(self) -> None:
        """To 0 again, for pages that come next: when nobody waits for them, nor raises them any more.

        Example:
            >>> counters = Counters(1)
            >>> counters.raise_to(0, 5)
            >>> counters.reset()
            >>> counters.values.tolist()
            [0]
        """
        self.values.zero_()
