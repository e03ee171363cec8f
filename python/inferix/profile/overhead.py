"""What the profiler costs: a world's blocks with and without it, taking turns until the difference is known.

Time is the processor's, of the whole process, so that other jobs on the machine add noise and no bias. What the thread
that samples the machine takes is in it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from inferix_kernels import profile
from inferix_kernels.verdict import Interval, paired

from .session import Profiling

ENOUGH = 20  # rounds


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one level.

    Attributes:
        level: "block" or "layer".
        interval: of a block's processor time over that of one without the profiler, 95 %.
        seconds: of a block without it, the median.
        spans: per block.
    """

    level: str
    interval: Interval
    seconds: float
    spans: float

    @property
    def width(self) -> float:
        """Half of the interval."""
        return (self.interval.high - self.interval.low) / 2

    def __str__(self) -> str:
        low, ratio, high = (100 * (x - 1) for x in (self.interval.low, self.interval.ratio, self.interval.high))
        return (
            f"level {self.level}: {ratio:+.3f} % of a block (95 %: {low:+.3f} to {high:+.3f}), {self.interval.rounds} "
            f"rounds of blocks of {1e3 * self.seconds:.1f} ms, {self.spans:.0f} spans each"
        )


def overhead(
    step: Callable[[], object],
    levels: Sequence[str] = ("block", "layer"),
    width: float = 0.001,
    seconds: float = 600.0,
    blocks: int = 1,
) -> list[Cost]:
    """Measure the loop `step`, one block a call, off and at each level in turn.

    Args:
        width: until each interval is narrower than plus or minus this share.
        seconds: or this long.
        blocks: per turn; what disturbs a turn disturbs the next one the more, the shorter they are.

    Example:
        >>> from inferix.profile.overhead import overhead
        >>> costs = overhead(lambda: sum(range(10_000)), ["block"], width=10.0)
        >>> costs[0].level, costs[0].interval.rounds >= 20
        ('block', True)
    """
    times: dict[str, list[float]] = {name: [] for name in ("off", *levels)}
    step()
    step()
    with Profiling("layer") as run:
        ended = dict.fromkeys(times, 0)
        began = time.monotonic()
        for number in range(10**6):
            names = list(times)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                run.set_level(name)
                run.sampler.paused = name == "off"
                before = _spans(run)
                times[name].append(_turn(step, blocks))
                ended[name] += _spans(run) - before
            costs = [_cost(name, times, ended[name] / blocks, blocks) for name in levels] if number >= ENOUGH else []
            if costs and (max(cost.width for cost in costs) <= width or time.monotonic() - began > seconds):
                break
    return costs


def _turn(step: Callable[[], object], blocks: int) -> float:
    began = time.process_time()
    for _ in range(blocks):
        step()
    return time.process_time() - began


def _spans(run: Profiling) -> int:
    return sum(track.ring.count for track in run.recording.tracks)


def _cost(level: str, times: dict[str, list[float]], spans: float, blocks: int) -> Cost:
    off = sorted(times["off"])
    interval = paired(times["off"], times[level])
    return Cost(level, interval, off[len(off) // 2] / blocks, spans / len(off))


def span_cost(count: int = 200_000, repeats: int = 7) -> dict[str, float]:
    """Microseconds of one span with an argument, and of one call of a decorated function, off and on: the best of
    several loops, those of an empty loop taken off. And of one sample of the machine, of which there are 2.5 a second.

    Example:
        >>> from inferix.profile.overhead import span_cost
        >>> sorted(span_cost(count=100, repeats=1))
        ['decorated off', 'decorated on', 'sample', 'span off', 'span on', 'timed on']
    """

    def nothing() -> None:
        pass

    decorated, few = profile.profiled(nothing), max(1, count // 1000)

    def empty() -> None:
        for _ in range(count):
            pass

    def spans() -> None:
        for _ in range(count):
            with profile.span("layer", layer=3):
                pass

    def timed() -> None:
        for _ in range(count):
            with profile.timed("denoise"):
                pass

    def calls() -> None:
        for _ in range(count):
            decorated()

    def plain_calls() -> None:
        for _ in range(count):
            nothing()

    def samples() -> None:
        for _ in range(few):
            run.sampler.sample()

    def best(loop: Callable[[], None]) -> float:
        found = []
        for _ in range(repeats):
            began = time.process_time()
            loop()
            found.append(time.process_time() - began)
        return 1e6 * min(found) / count

    around, called = best(empty), best(plain_calls)
    with Profiling("layer", capacity=1 << 12) as run:
        run.sampler.stop()
        on = {"span on": best(spans) - around, "timed on": best(timed) - around, "decorated on": best(calls) - called}
        run.set_level("off")
        off = {"span off": best(spans) - around, "decorated off": best(calls) - called}
        return on | off | {"sample": best(samples) * count / few}
