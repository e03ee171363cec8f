"""Measures a case: check every contender against the reference, then time those that are right, taking turns."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from inferix_kernels import Unsupported

from . import clocks, timing
from .case import Case, Contender, Prepared, error_of
from .memory import peak_of
from .rows import Row

RETRIES = 3  # of a short call that was disturbed
SHORT = 0.05  # seconds
MIN_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure, and what of it.

    Attributes:
        seconds: bound on what a case takes, but for MIN_ROUNDS rounds.
        rounds: 0 checks and times nothing.
        model, weights, blocks: of families that run a whole model.
        isa: of our CPU kernels, see harness/isa.py; "" is the best there is.
        small: the machine's own copy is of 4 MiB and empties no cache: for tests, whose times nobody reads.
    """

    device: str = "cpu"
    timer: str = "wall"
    cold: bool = True
    rounds: int = 20
    seconds: float = 60.0
    backends: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    model: str = "tiny"
    weights: str | None = None
    blocks: int = 12
    isa: str = ""
    small: bool = False

    def wants(self, contender: Contender) -> bool:
        """ "ours" means every backend of ours, "sdpa" every kind of it."""
        formats = not self.formats or any(f in contender.format.split("->") for f in self.formats)
        return formats and self.wants_name(contender.name)

    def wants_name(self, name: str) -> bool:
        return not self.backends or any(name == b or name.startswith(b + "-") for b in self.backends)


class Machine:
    """The machine's own speed, measured in the same rounds: a copy, which also empties the caches, and matmuls."""

    def __init__(self, device: torch.device, small: bool = False):
        self.device, self.cache = device, timing.cache_bytes(device)
        self.copied = max(2 * self.cache, 256 << 20 if device.type == "cuda" else 0) if not small else 4 << 20
        self.source, self.target = (torch.ones(self.copied, dtype=torch.uint8, device=device) for _ in range(2))
        self.side = 8192 if device.type == "cuda" else 128 if small else 1024
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        generator = torch.Generator(device).manual_seed(0)
        # Random numbers: a GPU that multiplies zeros draws less power, and is faster than it ever will be again.
        operands = torch.randn(2, self.side, self.side, device=device, generator=generator)
        self.matmuls = {name: operands.to(dtype) for name, dtype in dtypes.items()}

    def flush(self) -> None:
        self.target.copy_(self.source)

    def contenders(self) -> list[tuple[str, str, Callable[[], Any], float, int]]:
        """(name, format, call, flops, bytes)."""

        def matmul(pair: torch.Tensor) -> Callable[[], Any]:
            out = torch.empty_like(pair[0])
            return lambda: torch.mm(pair[0], pair[1], out=out)

        flops = 2.0 * self.side**3
        return [("peak-copy", "", self.flush, 0.0, 2 * self.copied)] + [
            ("peak-matmul", name, matmul(pair), flops, 0) for name, pair in self.matmuls.items()
        ]


@dataclasses.dataclass
class _Entrant:
    """What takes part in the rounds: a right contender, or the machine itself."""

    row: Row
    sampler: timing.Sampler
    call: Callable[[], Any]


class Contest:
    """A case with its contenders checked and those that are right in place; `round` measures each of them once.

    Attributes:
        rows: of all contenders that `settings` wants and, if any of them is timed, of the machine's peaks.
    """

    def __init__(self, case: Case, settings: Settings, machine: Machine):
        self.settings, self.machine, self.device = settings, machine, torch.device(settings.device)
        self.rows: list[Row] = []
        self._entrants: list[_Entrant] = []
        self._draw = random.Random(0)
        wanted = [c for c in case.contenders if settings.wants(c)]
        inputs = case.inputs(self.device)
        with torch.inference_mode():
            common = any(not c.absent and c.reference is None for c in wanted)
            want = case.reference(inputs) if common else ()
            for contender in wanted:
                row, prepared = _checked(case, contender, inputs, want, self.device)
                self.rows.append(row)
                if prepared is not None and settings.rounds:
                    self._entrants += _entrant(row, contender, prepared, inputs, settings, machine)
            if self._entrants:
                peaks = _peaks(case, settings, machine)
                self._entrants += peaks
                self.rows += [entrant.row for entrant in peaks]
                for entrant in self._entrants:
                    entrant.call()

    def round(self) -> None:
        """Everybody once, in an order drawn anew."""
        self._draw.shuffle(self._entrants)
        for entrant in self._entrants:
            self._measure(entrant)

    def sample(self, row: Row) -> float:
        """One of the timed rows, once more."""
        self._measure(next(entrant for entrant in self._entrants if entrant.row is row))
        return row.seconds[-1]

    @torch.inference_mode()
    def _measure(self, entrant: _Entrant) -> None:
        sample = _sample(entrant, self.settings, self.machine)
        entrant.row.seconds.append(sample.seconds)
        entrant.row.disturbed += sample.disturbed

    def close(self) -> list[Row]:
        """The rows, with their shares of the machine's peaks; the operands are let go."""
        self._entrants.clear()
        if any(row.peak and row.seconds for row in self.rows):
            _shares(self.rows)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.rows


def measure_case(case: Case, settings: Settings, machine: Machine) -> list[Row]:
    contest = Contest(case, settings, machine)
    started = time.monotonic()
    for number in range(settings.rounds):
        if number >= MIN_ROUNDS and time.monotonic() - started > settings.seconds:
            break
        contest.round()
    return contest.close()


class Alone:
    """A case whose contenders are checked and timed one after the other, each by itself rather than taking turns.

    Attributes:
        peaks: rows of the machine's peaks, timed first.
    """

    def __init__(self, case: Case, settings: Settings, machine: Machine, wanted: Sequence[Contender]):
        self.case, self.settings, self.machine = case, settings, machine
        self.device = torch.device(settings.device)
        self.inputs = case.inputs(self.device)
        with torch.inference_mode():
            common = any(not c.absent and c.reference is None for c in wanted)
            self.want = case.reference(self.inputs) if common else ()
        self.peaks = []
        for entrant in _peaks(case, settings, machine) if settings.rounds else ():
            entrant.call()
            self._rounds(entrant)
            self.peaks.append(entrant.row)

    @torch.inference_mode()
    def check(self, contender: Contender) -> tuple[Row, Prepared | None]:
        """Its first call, and whether it is right; None: it is not timed, and its row says why."""
        return _checked(self.case, contender, self.inputs, self.want, self.device)

    @torch.inference_mode()
    def time(self, row: Row, contender: Contender, prepared: Prepared) -> None:
        """Fill in the row. Where the timer asked for can't time it, a graph a call that can't be captured, say, events
        do, and the row says so."""
        for entrant in _entrant(row, contender, prepared, self.inputs, self.settings, self.machine):
            self._rounds(entrant)
        if row.status == "failed" and self.settings.timer == "graph":
            row.status, row.note = "ok", f"timed by events: {row.note}"
            self._rounds(_Entrant(row, timing.event([prepared.run]), prepared.run))
        row.metrics |= clocks.now(self.settings.device)
        if self.peaks and row.seconds:
            _shares([row, *self.peaks])

    def _rounds(self, entrant: _Entrant) -> None:
        started = time.monotonic()
        for number in range(self.settings.rounds):
            if number >= MIN_ROUNDS and time.monotonic() - started > self.settings.seconds:
                break
            sample = _sample(entrant, self.settings, self.machine)
            entrant.row.seconds.append(sample.seconds)
            entrant.row.disturbed += sample.disturbed


def row_of(case: Case, contender: Contender, device: str) -> Row:
    """Not yet checked."""
    return Row(
        case.family,
        case.op,
        case.shape,
        contender.name,
        contender.format,
        device,
        "ok",
        kernel=contender.kernel,
        flops=contender.flops,
        nbytes=contender.nbytes,
        metrics=dict(contender.metrics),
    )


def _checked(
    case: Case, contender: Contender, inputs: Any, want: Any, device: torch.device
) -> tuple[Row, Prepared | None]:
    """Run a contender once. A wrong, missing or failing one gives a row that says so, and is not timed."""
    row = row_of(case, contender, device.type)
    if contender.absent:
        row.status, row.note = "absent", contender.absent
        return row, None
    try:
        prepared = contender.prepare(inputs)
        prepared.run()  # compiles
        row.memory, result = peak_of(prepared.run, device.type)
        own = contender.reference
        error = error_of(prepared.read(result), want if own is None else own(inputs))
    except Unsupported as reason:
        row.status, row.note = "unsupported", str(reason)
        return row, None
    except Exception as reason:  # a peer's failure is a finding, not the end of the run
        row.status, row.note = "failed", f"{type(reason).__name__}: {reason}".splitlines()[0][:300]
        return row, None
    row.error = {**error._asdict(), "limit": contender.limit.relative}
    if error.within(contender.limit):
        return row, prepared
    row.status = "wrong"
    limit = contender.limit
    row.note = (
        f"error {error.relative:.1e}, worst row {error.worst:.1e}; allowed {limit.relative:.1e}, {limit.worst:.1e}"
    )
    return row, None


def _entrant(
    row: Row, contender: Contender, prepared: Prepared, inputs: Any, settings: Settings, machine: Machine
) -> Iterator[_Entrant]:
    count = timing.copies_needed(settings.timer, settings.cold, contender.nbytes, machine.cache)
    calls = [prepared.run, *(contender.prepare(inputs).run for _ in range(count - 1))]
    try:
        yield _Entrant(row, timing.TIMERS[settings.device][settings.timer](calls), prepared.run)
    except Exception as reason:  # a call that can't be captured in a graph, say
        row.status, row.note = "failed", f"not timed by {settings.timer}: {reason}".splitlines()[0][:300]


def _peaks(case: Case, settings: Settings, machine: Machine) -> list[_Entrant]:
    timer = timing.TIMERS[settings.device]["wall" if settings.device == "cpu" else "event"]
    if settings.timer == "cpu":
        timer = timing.cpu
    return [
        _Entrant(
            Row(case.family, case.op, case.shape, name, format, settings.device, "ok", flops=flops, nbytes=nbytes),
            timer([call]),
            call,
        )
        for name, format, call, flops, nbytes in machine.contenders()
    ]


def _sample(entrant: _Entrant, settings: Settings, machine: Machine) -> timing.Sample:
    for _ in range(RETRIES):
        machine.flush() if settings.cold else entrant.call()
        sample = entrant.sampler()
        if not sample.disturbed or sample.seconds > SHORT:
            break
    return sample


def bounding_peak(row: Row, peaks: Sequence[Row]) -> Row | None:
    """Of the machine's copy and its matmul in the row's precision, the one at which the row's work takes longer."""
    kinds = [peak for peak in peaks if peak.flops == 0 or peak.format == ("fp32" if row.format == "fp32" else "bf16")]
    return max(kinds, key=lambda peak: least_time(row, peak), default=None)


def least_time(row: Row, peak: Row) -> float:
    """Seconds that a row's work would take at a peak."""
    return (row.flops / peak.flops if peak.flops else row.nbytes / peak.nbytes) * peak.median


def _shares(rows: Sequence[Row]) -> None:
    """Of the machine's peak in these rounds: the least time that a row's work can take, over what it took."""
    peaks = [row for row in rows if row.peak]
    for row in rows:
        if row.seconds and not row.peak:
            bound = bounding_peak(row, peaks)
            assert bound is not None
            row.share = least_time(row, bound) / row.median


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest right row that is not ours."""
    peers = [row for row in rows if row.seconds and not row.ours and not row.peak]
    return min(peers, key=lambda row: statistics.median(row.seconds), default=None)
