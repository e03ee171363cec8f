"""One layer of attention shared by ranks: bytes sent, what is hidden of the communication, what the planner chooses.

Ranks are threads of this process over one CPU, with a link that is as slow as wanted; or, started by torchrun,
processes over gloo or NCCL (never run on a GPU). Each way to share is run three times in turn: as it is ("real"), with
all messages taken to be there at once ("alone"), and its messages without any work ("copy"); of each the best round,
of the rank that takes longest. "exposed %" is what messages add to the work, of the time that they take by themselves.

In one process each way gets a link on which its messages take SHARE of the time of attention to the past. Then all are
run on the same link, for the planner: it is given that link, measured, and this device's rate of attention. "regret %"
is by how much what it chooses is slower than the fastest. "modelled ms" is the planner's, not measured.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inferix_kernels import KVStore, Plan, Policy, paged_attention
from inferix_kernels.distributed import (
    Device,
    Gather,
    PassQ,
    Ring,
    Transport,
    Workload,
    in_process_group,
    measure_link,
    plan_attention,
    run_ranks,
    shard_for,
)
from inferix_kernels.distributed.agreement import exchanged
from inferix_kernels.distributed.planner import layouts
from inferix_kernels.distributed.sharding import Sizes, agreement_sent, layer_sent
from inferix_kernels.store import Shard
from inferix_kernels.store.attention import Attention, Local
from inferix_kernels.store.memory import page_bytes

from .harness import launched
from .harness.measure import MIN_ROUNDS, Settings
from .harness.messages import Silent, replay
from .harness.rows import Row
from .shapes import Shape, find_shape

LAYERS = 2
SHARE = 0.6
RANKS = (2, 4)
FORMATS = ("bf16", "int8")
SLOWER = (1, 4)  # links for the planner: one on which new keys take SHARE of attention to the past, and slower ones
MERGE = 8e-6  # seconds of one more partial, where it is not measured; see presets.Device
LIMIT = 5e-3  # relative error: outputs travel in bfloat16, and partials are merged in another order
SCHEDULES = {"U": "ulysses", "G": "gather", "R": "ring", "Q": "pass-q"}
STRATEGIES: dict[str, Callable[..., Attention]] = {"U": Gather, "G": Gather, "R": Ring, "Q": PassQ}


class Way(NamedTuple):
    """Attributes:
    name: as the planner calls it, with "-arrivals" where attention waits for pages itself.
    scheme, heads: of the planner's layout.
    """

    name: str
    scheme: str
    heads: int
    arrivals: bool = False

    def shard(self, transport: Transport, kv_heads: int) -> Shard:
        return shard_for(SCHEDULES[self.scheme], transport.rank, transport.size, kv_heads, self.heads)

    def strategy(self, transport: Transport) -> Attention:
        return STRATEGIES[self.scheme](transport, **({"arrivals": True} if self.arrivals else {}))


def ways(shape: Shape, ranks: int, device: str) -> Iterator[Way]:
    for alike in layouts(ranks, 1, 1, shape.heads, shape.kv_heads):
        for layout in alike:
            yield Way(str(layout), layout.scheme, layout.heads)
            if device == "cpu" and layout.scheme in ("G", "R"):
                yield Way(f"{layout}-arrivals", layout.scheme, layout.heads, True)


class World:
    """A world with a past, on one rank, and the passes over its next block.

    Attributes:
        log: the messages of a forward.
    """

    def __init__(self, shape: Shape, format: str, way: Way | None, transport: Transport, device: torch.device):
        self.shape, self.format, self.way, self.transport = shape, format, way, transport
        frames = shape.queries // shape.frame_tokens
        self.past = (shape.keys - shape.queries) // shape.queries * frames  # frames
        shard = Shard() if way is None else way.shard(transport, shape.kv_heads)
        self.store = KVStore(
            layers=LAYERS,
            heads=shape.kv_heads,
            head_dim=shape.head_dim,
            frame_tokens=shape.frame_tokens,
            block_frames=frames,
            page_size=shape.page_size,
            pools={format: self.past + frames + shard.frames},
            scratch_format="bf16",
            precision="exact",
            shard=shard,
            device=device,
        )
        self.table = self.store.open(Policy(window=self.past + frames))
        attention = Local() if way is None else way.strategy(transport)
        for block in range(self.past // frames):
            made = self.table.open_block(frames)
            self.forward(self.table.plan([made], commit=made, predict=False, attention=attention), self.inputs(block))
            self.table.seal(made)
        made, self.qkv = self.table.open_block(frames), self.inputs(self.past)
        self.real = self.table.plan([made], attention=attention)
        if way is not None:
            silent = Silent(transport)
            self.alone = self.table.plan([made], attention=way.strategy(silent))
            self.forward(self.alone, self.qkv)
            self.log = silent.stop()

    def inputs(self, block: int) -> list[Tensor]:
        """Of each layer, own rows."""
        generator, width = torch.Generator().manual_seed(block), (self.shape.heads + 2 * self.shape.kv_heads)
        size = self.shape.queries, width * self.shape.head_dim
        every = [torch.randn(size, generator=generator).bfloat16().to(self.store.device) for _ in range(LAYERS)]
        return [self.store.shard.own(x, self.shape.frame_tokens).contiguous() for x in every]

    def forward(self, passed: object, qkv: Sequence[Tensor]) -> Tensor | None:
        return [passed.attend(layer, x, None, None) for layer, x in enumerate(qkv)][-1]  # type: ignore[attr-defined]

    def formula(self) -> int:
        """Bytes that a forward sends."""
        shape, shard, store = self.shape, self.store.shard, self.store
        assert self.way is not None
        frames = shape.queries // shape.frame_tokens
        widths = shape.head_dim, shape.head_dim
        sizes = Sizes(frames, shape.frame_tokens, shape.heads, shape.kv_heads, widths, activation=2, scratch=2)
        past = [0] * shard.frames
        each = store.pages_per_frame * page_bytes(self.format, store.heads, shape.page_size, shape.head_dim)
        for slot in self.table.state.slots.values():
            past[slot.group] += each
        schedule = SCHEDULES[self.way.scheme]
        return agreement_sent(shard) + LAYERS * layer_sent(schedule, shard, sizes, past if shard.frames > 1 else ())

    def attend_past(self) -> None:
        """Own queries to all of the past, where it lies here: all heads, all frames."""
        plan, store = self.real.plan, self.store
        pages = self.past * store.pages_per_frame
        q = self.qkv[0].unflatten(1, (-1, self.shape.head_dim))[:, : self.shape.heads].contiguous()
        indptrs = (torch.tensor([0, count], dtype=torch.int32, device=store.device) for count in (len(q), pages))
        part = Plan(next(indptrs), next(indptrs), plan.page_ids[:pages], plan.page_lens[:pages])
        out = torch.empty(q.shape, device=store.device)
        for layer in store.layers:
            paged_attention(q, layer, part, out=out, precision="exact", backend=store.backend)


class Taken(NamedTuple):
    """Seconds: as time goes by, and of the processor."""

    wall: float
    cpu: float


def timed(transport: Transport, call: Callable[[], object]) -> Taken:
    """Of this rank, of a call that all begin at once."""
    exchanged(transport, b"begin")
    begun, cpu = launched.now(transport.device), time.thread_time()
    call()
    return Taken(launched.now(transport.device) - begun, time.thread_time() - cpu)


def slowest(transport: Transport, *seconds: float) -> list[float]:
    """Of several figures, each of the rank that takes longest."""
    form = "d" * len(seconds)
    return [*map(max, zip(*(struct.unpack(form, x) for x in exchanged(transport, struct.pack(form, *seconds)))))]


def check(world: World, whole: Tensor) -> Row:
    """One forward: what it sends, and whether every rank is right."""
    transport, shape, way = world.transport, world.shape, world.way
    assert way is not None
    before = transport.sent
    made = world.forward(world.real, world.qkv)
    assert made is not None
    sent, formula = transport.sent - before, world.formula()
    want = world.store.shard.own(whole, shape.frame_tokens).float()
    error = float((made.float() - want).norm() / want.norm()) if len(want) else 0.0
    facts = [struct.unpack("qqd", x) for x in exchanged(transport, struct.pack("qqd", sent, formula, error))]
    wrong = [f"rank {rank} sent {a} bytes, not {b}" for rank, (a, b, _) in enumerate(facts) if a != b]
    wrong += [f"rank {rank} is off by {e:.1e}" for rank, (*_, e) in enumerate(facts) if not e <= LIMIT]
    row = Row("parallel", f"{transport.size} ranks", shape.name, f"ours-{way.name}", world.format,
              transport.device.type, "wrong" if wrong else "ok", "; ".join(wrong))  # fmt: skip
    row.error = {"relative": max(e for *_, e in facts)}
    row.metrics = {"sent KiB a layer": max((a - agreement_sent(world.store.shard)) / LAYERS for a, *_ in facts) / 1024}
    return row


class Times(NamedTuple):
    """Seconds of one layer: as it is, without messages, of the messages; and the processor's of the first two."""

    real: float
    alone: float
    copy: float
    real_cpu: float
    alone_cpu: float

    @property
    def exposed(self) -> float:
        """Percent of the communication."""
        return 100 * (self.real - self.alone) / self.copy


def measure(worlds: Sequence[World], settings: Settings, pace: Callable[[World], object]) -> list[Times]:
    """Of each the best of the rounds, in which they take turns."""
    transport = worlds[0].transport
    found = [Times(*[float("inf")] * 5) for _ in worlds]
    copies = [replay(transport, world.log) for world in worlds]
    begun = time.perf_counter()
    for n in range(settings.rounds):
        if n >= MIN_ROUNDS and slowest(transport, time.perf_counter() - begun)[0] > settings.seconds:
            break
        for i, (world, copy) in enumerate(zip(worlds, copies, strict=True)):
            pace(world)
            calls = partial(world.forward, world.real, world.qkv), partial(world.forward, world.alone, world.qkv), copy
            real, alone, copied = (timed(transport, call) for call in calls)
            taken = real.wall, alone.wall, copied.wall, real.cpu, alone.cpu
            found[i] = Times(*(min(old, new / LAYERS) for old, new in zip(found[i], taken, strict=True)))
    return [Times(*slowest(transport, *times)) for times in found]


def rows_of(settings: Settings, shape: Shape, format: str, transport: Transport) -> list[Row]:
    """To be called by all ranks; all return the same."""
    device, hub = transport.device, getattr(transport, "hub", None)
    if hub is not None:
        torch.set_num_threads(1)  # of this thread: a rank is one processor
    with torch.inference_mode():
        whole = World(shape, format, None, transport, device)
        want = whole.forward(whole.real, whole.qkv)
        assert want is not None
        worlds = [World(shape, format, way, transport, device) for way in ways(shape, transport.size, device.type)]
        rows = [check(world, want) for world in worlds]
        if not settings.rounds:
            return rows
        one = next(world for world in worlds if world.way and world.way.name == "G")
        past = slowest(transport, min(timed(transport, one.attend_past).wall for _ in range(MIN_ROUNDS)) / LAYERS)[0]

        def own_pace(world: World) -> None:
            if hub is not None:
                hub.gigabytes_per_second = world.formula() / LAYERS / (SHARE * past) / 1e9

        for row, times in zip(rows, measure(worlds, settings, own_pace), strict=True):
            row.metrics |= {f"{name} ms".replace("_", " "): 1e3 * seconds for name, seconds in times._asdict().items()}
            row.metrics |= {"copy of past's %": 100 * times.copy / past, "exposed %": times.exposed}
        for slower in SLOWER if hub is not None else (1,):
            if hub is not None:
                hub.gigabytes_per_second = one.formula() / LAYERS / (slower * SHARE * past) / 1e9
            name = f"planner, {transport.size} ranks" + (f", {slower} x" if hub is not None else "")
            rows += planned(worlds, name, settings)
        return rows


def planned(worlds: Sequence[World], op: str, settings: Settings) -> list[Row]:
    """All ways on one link; what the planner makes of them, and what it would choose."""
    transport, shape, format = worlds[0].transport, worlds[0].shape, worlds[0].format
    link = measure_link(transport)
    each = zip(worlds, measure(worlds, settings, lambda world: None), strict=True)
    found = {world.way.name: times for world, times in each if world.way}
    frames = shape.queries // shape.frame_tokens
    keys = worlds[0].past * shape.frame_tokens + shape.queries
    rows = frames * -(-shape.frame_tokens // transport.size)
    merge, work = MERGE, found["G"].alone
    if transport.device.type == "cpu":  # by the processor's time: a machine that others use says no other
        work = found["G"].alone_cpu
        merge = max(0.0, work - found["G-arrivals"].alone_cpu)
    rate = 4 * rows * keys * shape.heads * shape.head_dim / (work - merge)
    device = Device("this one", rate, rate, 1e15, merge, known="measured")
    sizes: dict[str, Any] = {name: getattr(shape, name) for name in ("heads", "kv_heads", "head_dim")}
    sizes |= {name: getattr(shape, name) for name in ("frame_tokens", "page_size")}
    workload = Workload(tokens=shape.queries, keys=keys, ranks=transport.size, kv_format=format, **sizes)
    choice = plan_attention(workload, link, 1e15, device)
    options = {str(option.layout): option for option in choice.options}
    best = min(found[name].real for name in options)
    made = []
    for name, option in options.items():
        row = Row("parallel", op, shape.name, f"ours-{name}", format, transport.device.type, "ok")
        row.metrics = {"real ms": 1e3 * found[name].real, "modelled ms": 1e3 * option.seconds}
        if option is choice.best:
            row.note, row.metrics["regret %"] = "chosen", 100 * (found[name].real / best - 1)
            row.metrics |= {"link GB/s": link.bandwidth / 1e9, "link us": 1e6 * link.latency, "merge us": 1e6 * merge}
        made.append(row)
    return made


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    if settings.device != "cpu" and launched.rank() is None:
        yield Row("parallel", "", "", "ours", "", settings.device, "unsupported",
                  "on GPUs: torchrun --nproc-per-node N -m benchmarks run parallel")  # fmt: skip
        return
    with launched.group(settings.device) as transport:
        for shape in map(find_shape, shapes):
            for format in settings.formats or FORMATS:
                if transport is not None:
                    yield from rows_of(settings, shape, format, transport)
                    continue
                for ranks in RANKS:  # more ranks than processors take turns: of them no time says anything
                    timed = settings if ranks <= (os.cpu_count() or 1) else dataclasses.replace(settings, rounds=0)
                    yield from run_ranks(in_process_group(ranks), partial(rows_of, timed, shape, format))[0]
