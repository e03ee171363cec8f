"""What was chosen, and that as text: what was assumed, the table that it was chosen from, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .costs import Costs, Layout, Option, Workload, ceil_div
from .presets import Device, Link

_HEAD = ("", "way", "GB a rank", "MB sent", "compute us", "exposed us", "total us", "first block us", "")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, of what, and for what.

    Attributes:
        workload, link, device, memory: as they were given; memory in bytes on a rank.
        options: all that are built, fitting or not.
        best: the fastest that fits, of blocks with the past that `keys` says.

    Example:
        >>> from inferix_kernels.distributed import Workload, plan_attention
        >>> choice = plan_attention(Workload.of("wan14b", ranks=8, kv_format="int8"), "pcie5")
        >>> str(choice.best.layout), choice.best in choice.options
        ('U4xG2', True)
    """

    workload: Workload
    link: Link
    device: Device
    memory: float
    options: tuple[Option, ...]
    best: Option

    @property
    def first(self) -> Option:
        """The fastest that fits, for a block without a past."""
        return min((one for one in self.options if one.fits), key=lambda one: (one.first, one.memory))

    @property
    def not_built(self) -> tuple[Option, Option]:
        """What a pipeline of layers and sharded weights would cost."""
        return Costs(self.workload, self.link, self.device, self.memory).not_built(self.best)

    def explain(self) -> str:
        """The table that it was chosen from, and the reason, to be read by people."""
        return explain(self)


def explain(choice: Choice) -> str:
    """See `Choice.explain`. Bytes and times are of one layer of one step, on the rank that has most to do."""
    w, best = choice.workload, choice.best
    count = f"{w.worlds} world{'s' * (w.worlds > 1)}, {w.branches} branch{'es' * (w.branches > 1)} each"
    heads = f"{w.heads} heads" if w.heads == w.kv_heads else f"{w.heads} heads over {w.kv_heads}"
    order = sorted(choice.options, key=lambda option: (not option.fits, option.seconds, option.memory))
    lines = [
        f"{w.ranks} ranks for {count}: blocks of {w.tokens} tokens that see {w.keys}, {heads} of {w.head_dim}, "
        f"{w.layers} layers, pages in {w.kv_format}",
        f"  link {choice.link}",
        f"  device {choice.device}",
        f"  memory of a rank: {choice.memory / 1e9:.3g} GB, of which the weights take {w.weights / 1e9:.3g}",
        "",
        "Modelled, not measured: one layer of one step, of all worlds. Bytes sent follow from the shapes.",
        *table([("*" if option is best else "", option, "" if option.fits else "does not fit") for option in order]),
        "",
        "Not built, modelled all the same:",
        *table([("", option, "" if option.fits else "does not fit") for option in choice.not_built]),
        "",
        *reasons(choice),
    ]
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, Option, str]]) -> list[str]:
    cells: list[tuple[str, ...]] = [_HEAD]
    for mark, o, said in rows:
        times = (f"{seconds * 1e6:.1f}" for seconds in (o.compute, o.exposed, o.seconds, o.first))
        cells.append((mark, str(o.layout), f"{o.memory / 1e9:.2f}", f"{o.sent / 1e6:.2f}", *times, said))
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, 1, 8) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def reasons(choice: Choice) -> list[str]:
    """Why this one, what the first block would rather have, what replicas would give, and what a ring waits for."""
    w, best = choice.workload, choice.best
    fitting = [option for option in choice.options if option.fits]
    others = sorted((option for option in fitting if option is not best), key=lambda option: option.seconds)
    said = f"Chosen: {best.layout}, the fastest in the model of {len(fitting)} that fit"
    said += f" ({len(choice.options) - len(fitting)} do not)." if len(fitting) < len(choice.options) else "."
    if others:
        said += f" Next is {others[0].layout}, {slower(others[0].seconds, best.seconds)}."
    lines = [said]
    faster = [option for option in choice.options if not option.fits and option.seconds < best.seconds]
    if faster:
        least = min(faster, key=lambda option: option.seconds)
        lines.append(
            f"With {least.memory / 1e9:.3g} GB a rank, {least.layout} would be: {best.layout} is "
            f"{slower(best.seconds, least.seconds)}."
        )
    if choice.first.first < 0.995 * best.first:
        more = slower(best.first, choice.first.first)
        lines.append(f"A block without a past: {choice.first.layout} would be fastest; {best.layout} is {more}.")
    if w.ranks > 1:
        lines += [alone(choice)]
    if w.past and any(option.layout.scheme == "R" for option in choice.options):
        lines += [ring(choice)]
    return lines


def slower(seconds: float, than: float) -> str:
    more = 100 * (seconds / than - 1)
    return f"{more:.0f}% slower" if more >= 0.5 else "as fast to within 0.5%"


def alone(choice: Choice) -> str:
    """What so many ranks would do with a world each."""
    w, best = choice.workload, choice.best
    single = dataclasses.replace(w, worlds=1, ranks=1)
    one = Costs(single, choice.link, choice.device, choice.memory).options([Layout("alone")])[0]
    gain = one.seconds * w.worlds / best.seconds
    said = f"One rank takes {one.seconds * 1e6:.1f} us for one world: {w.ranks} do {gain:.2f} times that work."
    if best.layout.replicas == w.ranks:
        return said
    if not one.fits:
        return f"{said} One world does not fit one, so there are no replicas."
    return f"{said} As replicas, with a world each, {w.ranks} times."


def ring(choice: Choice) -> str:
    """What a ring over all ranks of one branch waits for, and why."""
    w, costs = choice.workload, Costs(choice.workload, choice.link, choice.device, choice.memory)
    rings = [one for one in choice.options if one.layout.scheme == "R" and one.layout.heads == 1]
    option = max(rings, key=lambda one: one.layout.frames)
    _, replicas, branches, _, _, g = option.layout
    turns = ceil_div(w.worlds, replicas) * ceil_div(w.branches, branches)
    shard = ceil_div(costs.past_frames, g) * w.kv_heads * costs.frame_bytes
    part = costs.per_key * ceil_div(w.tokens, g) * w.past / g
    return (
        f"A ring of {g}: a hop takes {shard / 1e6:.2f} MB in {choice.link.seconds(shard) * 1e6:.1f} us, attention to a "
        f"shard {part * 1e6:.1f} us. The first hop comes behind the new keys, and there are {g} more partials: "
        f"{option.exposed / turns * 1e6:.1f} us of a branch are exposed."
    )
