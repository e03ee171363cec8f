"""What each way of sharing the work costs: a model, nothing in it is measured.

P ranks are cut into groups, from outside in: groups of worlds (replicas), groups of branches (guidance, each prediction
on ranks of its own), and within those the ranks that share one branch, in one of these ways:

- u x g: u ranks share the heads (Ulysses), and g such groups have the same pages each and gather the new block's keys
  and values from each other while attention to the past runs. g = 1 is U, u = 1 is G.
- R and Q: each rank holds some frames of all heads. R sends pages round a ring, Q sends queries and merges outputs.

Bytes are exact (`wire`). Times are these, per layer and step, with keys S = past + new:

- attention: 4 rows heads head_dim S FLOPs; linear layers: 2 rows linear; both in equal parts on all ranks of a branch.
- U: both of its collectives are waited for.
- G: the gather hides under attention to the past; two partials instead of one, if there is a past.
- R: of P - 1 hops, each hides under attention to one shard; a partial more for each.
- Q: the hops of the queries hide likewise; the collective that brings outputs back is waited for. Where P does not
  divide the frames, ranks wait for the one that holds most.

Left out: links that ranks share, what NCCL takes of a GPU's multiprocessors, packing, and what is done once a block.
Sources: the formulas of arXiv:2309.14509 (U), arXiv:2310.01889 (R), arXiv:2411.01783 (Q, and when a ring hides).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from . import wire
from .presets import MODELS, Device, Link

NOT_BUILT = ("layer pipeline", "weight sharding")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What P ranks have to do: attention of one block in one layer, of so many worlds.

    Attributes:
        tokens: of a block.
        keys: that it attends to, its own included.
        heads, kv_heads, head_dim: of attention; heads is a multiple of kv_heads.
        ranks: P.
        kv_format: of committed pages; scratch_format: of the new block's, in which q, k, v and outputs travel too.
        worlds: that are to run at once.
        branches: forwards of a step (guidance: 2); shared_past: they read one past (MAGI's), not one each.
        layers: of the network.
        linear: multiply-adds of one layer's linear layers for each token. 0: attention alone is planned.
        weights: bytes of the network, which every rank holds.
        frame_tokens: of a frame, which is never cut among ranks; None: a frame is a page.
        page_size: tokens of a page.
        prediction: bytes of a token's prediction, which the branches of a step send each other once a step.

    Raises:
        ValueError: a size that is none, or that does not go with another.

    Example:
        >>> from inferix_kernels.distributed import Workload
        >>> Workload(tokens=4680, keys=32760, heads=12, kv_heads=12, head_dim=128, ranks=4).past
        28080
    """

    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    ranks: int
    kv_format: str = "bf16"
    worlds: int = 1
    branches: int = 1
    shared_past: bool = False
    layers: int = 1
    linear: int = 0
    weights: int = 0
    frame_tokens: int | None = None
    page_size: int = 64
    scratch_format: str = "bf16"
    prediction: int = 256

    def __post_init__(self) -> None:
        least_0 = ("linear", "weights", "prediction")
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type not in ("int", "int | None") or (value is None and name == "frame_tokens"):
                continue
            least = 0 if name in least_0 else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
        if self.keys < self.tokens:
            raise ValueError(f"keys must be at least the block's own {self.tokens}, got {self.keys}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")
        for name, known in (("kv_format", wire.FORMATS), ("scratch_format", wire.ITEMSIZE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, model: str, ranks: int, **changes: Any) -> Workload:
        """What the ranks have to do for one of MODELS; any other field may be given otherwise than there.

        Example:
            >>> work = Workload.of("wan14b", ranks=8, kv_format="int8")
            >>> work.tokens, work.keys, work.heads
            (4680, 32760, 40)
        """
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
        sizes: dict[str, Any] = MODELS[model]._asdict()
        frames = {"tokens": sizes.pop("block_frames"), "keys": sizes.pop("window")}
        sizes |= {name: count * sizes["frame_tokens"] for name, count in frames.items()}
        return cls(**{**sizes, "ranks": ranks, **changes})

    @property
    def past(self) -> int:
        """Keys that do not change while the block is made."""
        return self.keys - self.tokens


class Layout(NamedTuple):
    """A way to cut P ranks into groups; P is the product of the five counts.

    Attributes:
        scheme: "alone", "U", "G", "UxG", "R" or "Q": how the ranks of one branch share it.
        replicas, branches: groups of ranks with worlds, and with branches, of their own.
        heads: ranks of a branch that share its heads; copies: groups of those, each of which holds the same pages.
        frames: ranks of a branch that share its frames.
    """

    scheme: str
    replicas: int = 1
    branches: int = 1
    heads: int = 1
    copies: int = 1
    frames: int = 1

    def __str__(self) -> str:
        """As "2 replicas of U4xG2"."""
        within = f"U{self.heads}xG{self.copies}" if self.scheme == "UxG" else self.scheme
        groups = [(self.replicas, "replicas"), (self.branches, "branches")]
        said = " of ".join(f"{count} {what}" for count, what in groups if count > 1)
        return f"{said} of {within}" if said and within != "alone" else said or within


class Option(NamedTuple):
    """What a layout costs. Bytes and times are of one layer of one step, of all that a rank has to do.

    Attributes:
        sent: bytes that a rank sends.
        compute: seconds of attention and linear layers on one rank.
        exposed: seconds in which it waits for others, or does what one rank alone need not do.
        first: compute + exposed of a block without a past.
        memory: bytes on a rank: weights, pages, scratch, what is on its way.
        fits: in the memory that there is.
    """

    layout: Layout
    sent: int
    compute: float
    exposed: float
    first: float
    memory: int
    fits: bool

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Costs:
    """The model that this module describes, for one workload on one machine."""

    def __init__(self, w: Workload, link: Link, device: Device, memory: float):
        self.w, self.link, self.memory, self.merge = w, link, memory, device.merge
        self.latency, self.bandwidth = link.latency, link.bandwidth
        self.item = wire.ITEMSIZE[w.scratch_format]
        self.per_key = 4 * w.heads * w.head_dim / device.attention  # seconds of a row and a key
        self.per_row = 2 * w.linear / device.linear
        frame = w.frame_tokens or w.page_size
        self.frame = frame
        self.past_frames, self.all_frames = ceil_div(w.past, frame), ceil_div(w.keys, frame)
        pages = ceil_div(frame, w.page_size)
        # Bytes of a frame in one layer and KV head, as committed and in scratch.
        self.frame_bytes = pages * wire.page_bytes(w.kv_format, 1, w.page_size, w.head_dim)
        scratch = pages * wire.page_bytes(w.scratch_format, 1, w.page_size, w.head_dim)
        self.block_bytes = ceil_div(w.tokens, frame) * scratch
        self.mean_bytes = 0 if w.kv_format in wire.ITEMSIZE else 4 * w.head_dim

    def option(self, layout: Layout) -> Option:
        w, (scheme, replicas, groups, u, g, f) = self.w, layout
        rows = -(-w.tokens // (u * g * f))  # of the rank that has most
        worlds, branches = -(-w.worlds // replicas), -(-w.branches // groups)  # of a rank, one after the other
        turns = worlds * branches
        sent, exposed, first = self.by_frames(scheme, rows, f) if f > 1 else self.by_heads(rows, u, g)
        if groups > 1:  # once a step, predictions of own rows to the ranks with the same rows in the other groups
            traded = rows * (groups - 1) * w.prediction // w.layers
            waited = self.latency / w.layers + traded / self.bandwidth
            sent, exposed, first = sent + traded, exposed + waited, first + waited
        per_key, linear = self.per_key * rows, self.per_row * rows
        compute, compute_first = per_key * w.keys + linear, per_key * w.tokens + linear
        memory = self.needed(scheme, worlds if w.shared_past else turns, u, f)
        times = turns * compute, turns * exposed, turns * (compute_first + first)
        return Option(layout, turns * sent, *times, memory, memory <= self.memory)

    def by_heads(self, rows: int, u: int, g: int) -> tuple[int, float, float]:
        """(bytes sent, seconds exposed, the same without a past) of one branch, in g groups of u ranks."""
        w, sent, exposed, first = self.w, 0, 0.0, 0.0
        if u > 1:
            sent = wire.to_heads(rows, u, w.heads, w.kv_heads, w.head_dim, self.item)
            sent += wire.from_heads(rows * (u - 1), u, w.heads, w.head_dim, self.item)
            exposed = first = 2 * self.latency + sent / self.bandwidth
        if g > 1:
            gathered = wire.gathered(rows * u, g, w.kv_heads // u, w.head_dim, self.item)
            flight = self.latency + gathered / self.bandwidth
            first += flight
            exposed += max(0.0, flight - self.per_key * rows * w.past) + self.merge if w.past else flight
            sent += gathered
        return sent, exposed, first

    def by_frames(self, scheme: str, rows: int, p: int) -> tuple[int, float, float]:
        """The same of one branch whose p ranks share the frames."""
        w = self.w
        latency, bandwidth, hops = self.latency, self.bandwidth, p - 1
        per_key = self.per_key * rows / p
        part, part_first = per_key * w.keys, per_key * w.tokens  # of attention, in which a hop hides
        if scheme == "R":
            own = rows * 2 * w.kv_heads * w.head_dim * self.item
            shard = ceil_div(self.past_frames, p) * w.kv_heads * self.frame_bytes + own
            late, late_first = latency + shard / bandwidth - part, latency + own / bandwidth - part_first
            return hops * shard, hops * (max(0.0, late) + self.merge), hops * (max(0.0, late_first) + self.merge)
        asked = wire.queries(rows, 2, w.heads, w.head_dim, self.item)
        answered = wire.partial_outputs(rows * hops, w.heads, w.head_dim, self.item)
        hop, back = latency + asked / bandwidth, latency + answered / bandwidth
        exposed = hops * (max(0.0, hop - part) + self.merge) + back
        first = hops * (max(0.0, hop - part_first) + self.merge) + back
        uneven = p * ceil_div(self.past_frames, p) - self.past_frames  # frames that some ranks have not, and wait for
        exposed += self.per_key * rows * uneven * self.frame
        return hops * asked + answered, exposed, first

    def needed(self, scheme: str, pasts: int, u: int, f: int) -> int:
        """Bytes on a rank that holds so many pasts, of 1 / u of the heads and 1 / f of the frames.

        As `inferix_kernels.store.memory.plan_memory` counts them (scratch of two blocks, a mean key for each head),
        and the two buffers of a ring.
        """
        w = self.w
        kv_heads, layer = w.kv_heads // u, -(-self.all_frames // f) * self.frame_bytes
        buffers = 2 * layer if scheme == "R" else 0
        scratch = -(-2 * self.block_bytes // f)
        return w.weights + kv_heads * (w.layers * pasts * (layer + self.mean_bytes) + scratch + buffers)

    def not_built(self, best: Option) -> tuple[Option, Option]:
        """What two ways that are not built would cost: a pipeline of layers, and weights cut among all ranks.

        A pipeline works at once on as many branches as there are, each in another stage; one branch alone goes through
        the stages one after the other, as fast as on one rank. Sharded weights are gathered layer by layer, while
        `best` computes the layer before.
        """
        w, p = self.w, self.w.ranks
        branches, hops = w.worlds * w.branches, p - 1
        turns = branches + hops  # of one stage, which is 1 / p of the layers
        block = w.tokens * w.heads * w.head_dim * self.item  # what one stage hands on to the next
        waited = turns * (self.latency + block / self.bandwidth) / w.layers if hops else 0.0
        linear = self.per_row * w.tokens
        compute, first = (turns / p * (self.per_key * w.tokens * keys + linear) for keys in (w.keys, w.tokens))
        needed = ceil_div(self.needed("alone", w.worlds * (1 if w.shared_past else w.branches), 1, 1), p)
        sent = branches * block // w.layers if hops else 0
        times = compute, waited, first + waited
        pipeline = Option(Layout(NOT_BUILT[0]), sent, *times, needed, needed <= self.memory)

        layer = ceil_div(w.weights, w.layers)
        gathered = layer * hops // p
        flight = self.latency + gathered / self.bandwidth if hops else 0.0
        needed = best.memory - w.weights + ceil_div(w.weights, p) + 2 * layer
        sharding = best._replace(
            layout=Layout(NOT_BUILT[1]),
            sent=best.sent + gathered,
            exposed=best.exposed + max(0.0, flight - best.seconds),
            first=max(best.first, flight),
            memory=needed,
            fits=needed <= self.memory,
        )
        return pipeline, sharding
