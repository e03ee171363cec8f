"""Attention over keys of which most are still coming: one call that waits for pages, against a call for each delivery.

A thread copies the pages of one delivery after the other into the pools, no faster than a link that takes SHARE of the
time which attention takes when all is there; the first delivery is there. "ours-arrivals": one call, whose plan has
arrivals. "ours-accumulate": a call for each delivery, when it has come, which merges it into what the earlier ones have
found. "ours-after": one call, when all have come. "ours-there": one call, with all there, and no link.

"hidden %" is the share of the link's time that a call does not add to that of "ours-there"; "of accumulate" how many
times faster than "ours-accumulate" it is: arrivals pay at deliveries of a size at which that is above 1.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inferix_kernels import Counters, KVPages, PageList, Plan, Segment, kv_append, make_plan, paged_attention

from .harness.measure import Settings
from .harness.rows import Row
from .shapes import Shape, find_shape

DELIVERIES = (2, 4, 8, 16, 32)  # the one that is there among them
SHARE = 0.6  # of attention's time, that the link takes for all deliveries
FORMATS = ("bf16", "int8")


@dataclasses.dataclass
class Link:
    """Brings pages from `source` to `target` in a thread, delivery by delivery, so many seconds apart.

    Attributes:
        bounds: of the deliveries: pages bounds[h] : bounds[h + 1] are delivery h.
    """

    source: KVPages
    target: KVPages
    bounds: Sequence[int]
    apart: float = 0.0

    def ready(self, tell: Callable[[int], object]) -> tuple[threading.Thread, threading.Event]:
        """The thread, which begins when the event is set. tell(h): delivery h has come."""
        begin = threading.Event()
        thread = threading.Thread(target=self._run, args=(begin, tell))
        thread.start()
        return thread, begin

    def _run(self, begin: threading.Event, tell: Callable[[int], object]) -> None:
        begin.wait()
        begun = time.perf_counter()
        for h in range(1, len(self.bounds) - 1):
            pages = slice(self.bounds[h], self.bounds[h + 1])
            for of, to in zip(self.source[1:], self.target[1:], strict=True):
                if isinstance(of, Tensor) and isinstance(to, Tensor):
                    to[pages].copy_(of[pages])
            time.sleep(max(0.0, begun + h * self.apart - time.perf_counter()))
            tell(h)


class Work:
    """One block's queries over so many deliveries of one layer's pages."""

    def __init__(self, shape: Shape, format: str, deliveries: int):
        generator = torch.Generator().manual_seed(0)
        count, size = -(-shape.keys // shape.page_size), (shape.keys, shape.kv_heads, shape.head_dim)
        lens = [shape.page_size] * (count - 1) + [shape.keys - shape.page_size * (count - 1)]
        source = KVPages.empty(format, count, shape.kv_heads, shape.page_size, shape.head_dim)
        k, v = (torch.randn(size, generator=generator) for _ in "kv")
        kv_append(k, v, source, PageList.of(range(count), lens))
        self.pool = source.map(torch.clone)
        self.link = Link(source, self.pool, [count * h // deliveries for h in range(deliveries + 1)])
        size = shape.queries, shape.heads, shape.head_dim
        self.q = torch.randn(size, generator=generator).to(torch.float32 if format == "fp32" else torch.bfloat16)
        self.out, self.lse = torch.empty(size), torch.empty(size[:2])
        self.counters = Counters(deliveries)

        def plan(first: int, end: int) -> Plan:
            """Of these deliveries."""
            pages = range(self.link.bounds[first], self.link.bounds[end])
            of = [h for h in range(first, end) for _ in range(self.link.bounds[h], self.link.bounds[h + 1])]
            arrivals = [(h or -1, 1) for h in of]
            return make_plan([Segment(shape.queries, pages, lens[pages.start : pages.stop], arrivals=arrivals)])

        self.coming = plan(0, deliveries)._replace(counters=self.counters.values)
        self.there = self.coming._replace(arrivals=None, counters=None)
        self.parts = [plan(h, h + 1)._replace(arrivals=None) for h in range(deliveries)]

    def attend(self, plan: Plan, accumulate: bool = False) -> None:
        paged_attention(self.q, [self.pool], plan, out=self.out, lse=self.lse, accumulate=accumulate)

    def time_there(self) -> float:
        begun = time.perf_counter()
        self.attend(self.there)
        return time.perf_counter() - begun

    def time_arrivals(self) -> float:
        self.counters.reset()
        return self._timed(lambda h: self.counters.raise_to(h, 1), lambda: self.attend(self.coming))

    def time_accumulate(self) -> float:
        come = [threading.Event() for _ in self.parts]
        come[0].set()

        def attend() -> None:
            for h, part in enumerate(self.parts):
                come[h].wait()
                self.attend(part, accumulate=h > 0)

        return self._timed(lambda h: come[h].set(), attend)

    def time_after(self) -> float:
        last = threading.Event()

        def attend() -> None:
            last.wait()
            self.attend(self.there)

        return self._timed(lambda h: last.set() if h == len(self.parts) - 1 else None, attend)

    def _timed(self, tell: Callable[[int], object], attend: Callable[[], None]) -> float:
        """From when the link begins to when attention is done."""
        thread, begin = self.link.ready(tell)
        begun = time.perf_counter()
        begin.set()
        attend()
        taken = time.perf_counter() - begun
        thread.join()
        return taken


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    for shape in map(find_shape, shapes):
        for format in settings.formats or FORMATS:
            for deliveries in DELIVERIES:
                if deliveries <= -(-shape.keys // shape.page_size):
                    yield from rows_of(settings, shape, format, deliveries)


def rows_of(settings: Settings, shape: Shape, format: str, deliveries: int) -> Iterator[Row]:
    op = f"{deliveries} deliveries"
    if settings.device != "cpu":
        yield Row("arrivals", op, shape.name, "ours-arrivals", format, settings.device, "unsupported",
                  "no kernel on a GPU waits for pages")  # fmt: skip
        return
    work = Work(shape, format, deliveries)
    calls = {f"ours-{name}": getattr(work, f"time_{name}") for name in ("there", "arrivals", "accumulate", "after")}
    calls = {name: call for name, call in calls.items() if name == "ours-there" or settings.wants_name(name)}
    there = min(work.time_there() for _ in range(3))
    work.link.apart = SHARE * there / max(deliveries - 1, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    status = {name: "ok" if right(work, call, name) else "wrong" for name, call in calls.items()}
    for _ in range(settings.rounds):
        for name, call in calls.items():
            seconds[name].append(call())
    medians = {name: statistics.median(taken) for name, taken in seconds.items() if taken}
    pages = work.link.bounds[1] - work.link.bounds[0]
    for name in calls:
        row = Row("arrivals", op, shape.name, name, format, "cpu", status[name], seconds=seconds[name])
        row.metrics = {"delivery KiB": pages * work.pool.nbytes / work.pool.pages / 1024}
        if medians:
            row.metrics["ms"] = 1e3 * medians[name]
            exposed = medians[name] - medians["ours-there"]
            row.metrics["hidden %"] = 100 * (1 - exposed / (work.link.apart * (deliveries - 1)))
            if "ours-accumulate" in medians:
                row.metrics["of accumulate"] = medians["ours-accumulate"] / medians[name]
        yield row


def right(work: Work, call: Callable[[], float], name: str) -> bool:
    """One call over all pages gives the same bits whenever they came; a call for each rounds otherwise."""
    work.attend(work.there)
    want, want_lse = work.out.clone(), work.lse.clone()
    work.out.fill_(torch.nan)
    call()
    if name != "ours-accumulate":
        return torch.equal(work.out, want) and torch.equal(work.lse, want_lse)
    error = (work.out - want).norm() / want.norm()
    return bool(error < (1e-5 if work.q.dtype == torch.float32 else 1e-2))
