"""Which slots of its cache a pass of a causal Wan attention writes and reads: arithmetic in frames, no tensors."""

from __future__ import annotations

from typing import NamedTuple

from ..._dispatch import Unsupported


class Rules(NamedTuple):
    """How an attention uses its cache.

    Attributes:
        sink: frames in the first slots, which rolling passes over.
        rolls: does the window move, once the cache is full?
        keeps_sink: do passes over frames that were made before leave the sink as it is?
        limit: frames that are read at most.
        sink_first: are the sink and the pinned frames among them, whatever the newest are?
        pinned: (first slot, how many) of frames that roll as all others do.
        bias, unbiased: added to the scores of what is read, but for its first frame and its newest `unbiased` frames.
    """

    sink: int = 0
    rolls: bool = False
    keeps_sink: bool = False
    limit: int = 1 << 31
    sink_first: bool = False
    pinned: tuple[int, int] = (0, 0)
    bias: float = 0.0
    unbiased: int = 0


class Span(NamedTuple):
    """A pass over the frames from `start` on: they belong to slots begin .. end - 1, of which first .. end - 1 are
    written."""

    start: int
    begin: int
    first: int
    end: int

    @property
    def frames(self) -> int:
        return self.end - self.begin


def place(made: int, held: int, start: int, frames: int, slots: int, rules: Rules) -> tuple[Span, int]:
    """Where a pass writes, and how many frames behind the sink are rolled out before.

    Args:
        made, held: frames that the cache counts (global_end_index) and holds (local_end_index).
        slots: of the cache.

    Raises:
        ValueError: the cache has no such slots; what to change is in the message.
    """
    advances = start + frames > made
    evicted = max(0, frames + held - slots) if rules.rolls and advances else 0
    end = held + start + frames - made - evicted
    begin = end - frames
    if end > slots or (evicted and rules.sink + evicted > held):
        raise ValueError(
            f"kv_cache must have slots for the sink and a block, and without a window for all frames, "
            f"got {slots} for a sink of {rules.sink}, {held} frames held and {frames} new ones"
        )
    if not 0 <= begin <= held - evicted:
        raise ValueError(
            f"current_start must be a frame that kv_cache holds or the next one, up to {made}, got frame {start}"
        )
    first = max(begin, min(rules.sink, end)) if rules.keeps_sink and not advances and start > 0 else begin
    return Span(start, begin, first, end), evicted


def read(span: Span, rules: Rules) -> list[int]:
    """The slots that the queries of a pass attend to, oldest first."""
    if span.end <= rules.limit:
        return list(range(span.end))
    sink = rules.sink if rules.sink_first else 0
    kept, (pin, count) = list(range(sink)), rules.pinned
    if sink <= pin < span.end - rules.limit:
        kept += range(pin, pin + count)
    newest = max(sink, span.end - (rules.limit - len(kept)))
    if newest > span.first:
        raise Unsupported(
            f"max_attention_size must hold the sink and the block that is made, got {rules.limit} frames for "
            f"a sink of {len(kept)} and {span.frames} new ones"
        )
    return [*kept, *range(newest, span.end)]


def biases(slots: int, rules: Rules) -> list[float]:
    """What is added to the scores of each of the slots that are read."""
    return [rules.bias if 1 <= place < slots - rules.unbiased else 0.0 for place in range(slots)]
