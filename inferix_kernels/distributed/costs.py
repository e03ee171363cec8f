"""What each way of sharing the work costs: a model, nothing in it is measured.

P ranks are cut into groups, from outside in: groups of worlds (replicas), groups of branches (guidance, each prediction
on ranks of its own), and within those the ranks that share one branch: u of them share its heads (Ulysses), in g groups
of which each holds the same pages (G), or other frames than the others (R, Q). g = 1 is U alone.

Each rank computes a part of every frame's rows. Bytes are exact (`wire`). Times are these, per layer and step, with
keys S = past + new, and groups of u x g ranks:

- attention: 4 rows heads head_dim S FLOPs; linear layers: 2 rows linear; both in equal parts on all ranks of a branch.
- new keys and values, to everybody: on their way while the past is attended to. So there are two partials, if there is
  a past, and without one the flight is waited for.
- u > 1: queries before attention, and outputs after it, are waited for.
- R: g - 1 hops, each on its way while one shard is attended to; the first follows the new keys on the link. A partial
  more for each.
- Q: queries, behind the new keys, while own frames are attended to; answers are waited for, and merged. Where g does
  not divide the frames, ranks wait for the one that holds most.

Left out: links that ranks share, what NCCL takes of a GPU's multiprocessors, packing, and what is done once a block.
Sources: arXiv:2309.14509 (U), arXiv:2310.01889 (R), arXiv:2411.01783 (Q, and when a ring hides).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
        frame_tokens: of a frame: of the past it is never cut among ranks, of a block always. None: a block is one.
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
        if self.frame_tokens is not None and self.tokens % self.frame_tokens:
            raise ValueError(f"tokens must be whole frames of {self.frame_tokens}, got {self.tokens}")
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
        scheme: how the ranks of one branch share it: "alone", "U" (heads alone), "G", "R" or "Q".
        replicas, branches: groups of ranks with worlds, and with branches, of their own.
        heads: ranks of a branch that share its heads.
        copies, frames: groups of those, which hold the same pages, or different frames.

    Example:
        >>> from inferix_kernels.distributed import Layout
        >>> str(Layout("G", replicas=2, heads=4, copies=2))
        '2 replicas of U4xG2'
    """

    scheme: str
    replicas: int = 1
    branches: int = 1
    heads: int = 1
    copies: int = 1
    frames: int = 1

    def __str__(self) -> str:
        """As "2 replicas of U4xG2"."""
        both = self.heads > 1 and self.scheme != "U"
        within = f"U{self.heads}x{self.scheme}{self.copies * self.frames}" if both else self.scheme
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

    Example:
        >>> from inferix_kernels.distributed import Workload, plan_attention
        >>> best = plan_attention(Workload.of("wan1.3b", ranks=4)).best
        >>> best.fits, best.seconds == best.compute + best.exposed
        (True, True)
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
        self.w, self.link, self.device, self.memory, self.merge = w, link, device, memory, device.merge
        self.latency, self.bandwidth = link.latency, link.bandwidth
        self.item = wire.ITEMSIZE[w.scratch_format]
        self.per_key = 4 * w.heads * w.head_dim / device.attention  # seconds of a row and a key
        self.per_row = 2 * w.linear / device.linear
        self.frame = w.frame_tokens or w.tokens
        self.past_frames, self.all_frames = ceil_div(w.past, self.frame), ceil_div(w.keys, self.frame)
        self.block_frames = w.tokens // self.frame
        pages = ceil_div(self.frame, w.page_size)
        # Bytes of a frame in one layer and KV head, as committed; of two blocks in scratch; of a mean key.
        self.frame_bytes = pages * wire.page_bytes(w.kv_format, 1, w.page_size, w.head_dim)
        self.scratch = 2 * self.block_frames * pages * wire.page_bytes(w.scratch_format, 1, w.page_size, w.head_dim)
        self.mean_bytes = 0 if w.kv_format in wire.ITEMSIZE else 4 * w.head_dim

    def options(self, layouts: Sequence[Layout]) -> list[Option]:
        """Of layouts that differ in their scheme alone.

        Memory is what `inferix_kernels.store.memory.plan_memory` counts (scratch of two blocks, a mean key for each
        head), what arrives of the new keys and values, and the two buffers of a ring.
        """
        _, replicas, groups, u, copies, frames = layouts[0]
        g = copies * frames
        w, bandwidth, latency = self.w, self.bandwidth, self.latency
        rows = self.block_frames * -(-self.frame // (u * g))  # of the rank that has most
        worlds, branches = -(-w.worlds // replicas), -(-w.branches // groups)  # of a rank, one after the other
        turns, pasts = worlds * branches, worlds if w.shared_past else worlds * branches
        heads, kv_heads = w.heads // u, w.kv_heads // u
        per_key, linear = self.per_key * rows, self.per_row * rows
        compute, compute_first = per_key * w.keys + linear, per_key * w.tokens + linear
        always, waited = 0, 0.0  # bytes that every schedule sends, seconds that it waits for
        if u > 1:
            always = wire.queries(rows, u, heads, w.head_dim, self.item)
            always += wire.outputs(rows * (u - 1), heads, w.head_dim, self.item)
            waited = 2 * latency + always / bandwidth
        if groups > 1:  # once a step, predictions of own rows to the ranks with the same rows in the other groups
            traded = rows * (groups - 1) * w.prediction // w.layers
            always, waited = always + traded, waited + latency / w.layers + traded / bandwidth
        new = wire.keys(rows, u * g, kv_heads, 2 * w.head_dim, self.item)
        flight = latency + new / bandwidth if new else 0.0
        compute, first = turns * compute, turns * (compute_first + flight + waited)
        found = []
        layers = w.layers * pasts
        base = layers * self.mean_bytes + self.scratch + (w.tokens * 2 * w.head_dim * self.item if new else 0)
        for layout in layouts:
            scheme, f = layout[0], layout[5]
            sent, exposed, layer = new, flight, -(-self.all_frames // f) * self.frame_bytes
            if f > 1:
                sent, exposed = (self.ring if scheme == "R" else self.pass_q)(rows * u, new, heads, kv_heads, g)
            elif new and w.past:
                exposed = max(0.0, flight - per_key * w.past) + self.merge
            memory = w.weights + kv_heads * (base + layer * (layers + 2 if scheme == "R" else layers))
            seconds, sent = turns * (exposed + waited), turns * (sent + always)
            found.append(Option(layout, sent, compute, seconds, first, memory, memory <= self.memory))
        return found

    def ring(self, rows: int, new: int, heads: int, kv_heads: int, g: int) -> tuple[int, float]:
        """(bytes sent, seconds exposed) of a group with so many rows and heads, one of g; `new`: bytes of its keys."""
        shard = -(-self.past_frames // g) * kv_heads * self.frame_bytes
        if not shard:
            return new, self.latency + new / self.bandwidth
        part = self.per_key * rows * heads / self.w.heads * self.w.past / g
        hop = self.latency + shard / self.bandwidth - part
        first = hop + new / self.bandwidth
        exposed = max(0.0, first) + (g - 2) * max(0.0, hop) + g * self.merge
        return new + (g - 1) * shard, exposed

    def pass_q(self, rows: int, new: int, heads: int, kv_heads: int, g: int) -> tuple[int, float]:
        """The same."""
        w, past = self.w, self.w.past
        if not past:
            return new, self.latency + new / self.bandwidth
        asked = wire.queries(rows, g, heads, w.head_dim, self.item)
        answered = wire.outputs(rows * (g - 1), heads, w.head_dim, self.item, lse=True)
        per_key = self.per_key * rows * heads / w.heads
        late = self.latency + (new + asked) / self.bandwidth - per_key * past / g
        exposed = max(0.0, late) + self.latency + answered / self.bandwidth + g * self.merge
        uneven = g * -(-self.past_frames // g) - self.past_frames  # frames that some ranks have not, and wait for
        return new + asked + answered, exposed + per_key * uneven * self.frame

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
        (alone,) = Costs(dataclasses.replace(w, ranks=1), self.link, self.device, self.memory).options(
            [Layout("alone")]
        )
        needed = ceil_div(alone.memory, p)
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
