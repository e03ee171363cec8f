"""How many bytes a world takes, its past and its network's weights, before anything is allocated.

print(plan_memory(layers=30, heads=12, head_dim=128, frame_tokens=frame_tokens(480, 832), block_frames=3,
                  policy=Policy(window=18, sink=3, format="int8"), worlds=2, budget=8 * GIB))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from .. import layout
from .._check import check_counts, check_page_size
from ..layout import FORMATS, tile_shapes
from .policy import Policy

GIB = 1 << 30


def frame_tokens(height: int, width: int, stride: int = 16) -> int:
    """Tokens of a latent frame of this many pixels: Wan's VAE shrinks by 8 and its patches by 2.

    Example:
        >>> from inferix_kernels.store.memory import frame_tokens
        >>> frame_tokens(480, 832)
        1560
    """
    for name, size in (("height", height), ("width", width)):
        if size < stride or size % stride:
            raise ValueError(f"{name} must be a positive multiple of {stride} pixels, got {size}")
    return (height // stride) * (width // stride)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, and the budget that they must fit.

    Attributes:
        parts: name -> bytes: weights, pools by format, scratch, key means, host memory.
        budget: bytes on the device, or None.
        largest_window: the longest window that would fit, in frames; None without a budget or a window.
    """

    parts: Mapping[str, int]
    budget: int | None
    largest_window: int | None

    @property
    def device(self) -> int:
        return sum(size for name, size in self.parts.items() if name != "host")

    @property
    def fits(self) -> bool:
        return self.budget is None or self.device <= self.budget

    def __str__(self) -> str:
        lines = [f"{name:>12}  {size / GIB:9.3f} GiB" for name, size in self.parts.items()]
        lines.append(f"{'on device':>12}  {self.device / GIB:9.3f} GiB")
        if self.budget is not None:
            verdict = "fits" if self.fits else f"does not fit: {(self.device - self.budget) / GIB:.3f} GiB too much"
            lines.append(f"{'budget':>12}  {self.budget / GIB:9.3f} GiB: {verdict}")
        if self.largest_window is not None:
            lines.append(f"the largest window that fits: {self.largest_window} frames")
        return "\n".join(lines)


def page_bytes(format: str, heads: int, page_size: int, head_dim: int | tuple[int, int]) -> int:
    """Bytes of one page in one layer, scales included."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    total = 0
    for codec, width in zip(FORMATS[format], head_dim if isinstance(head_dim, tuple) else (head_dim,) * 2):
        (rows, columns), (parameters,) = tile_shapes(codec, page_size, width)
        per_row = 0 if codec.scaled_by is None else codec.scale_dtype.itemsize * (2 if codec.packed else 1)
        total += rows * columns * codec.dtype.itemsize + parameters * per_row
    return heads * total


def plan_memory(
    *,
    layers: int,
    heads: int,
    head_dim: int | tuple[int, int],
    frame_tokens: int,
    block_frames: int,
    policy: Policy,
    worlds: int = 1,
    frames: int | None = None,
    archived: int = 0,
    scratch_blocks: int = 2,
    scratch_format: str | None = None,
    page_size: int = 64,
    device: torch.device | str = "cuda",
    budget: int | None = None,
    weights: int = 0,
) -> MemoryPlan:
    """What a KVStore of these sizes takes, for `worlds` worlds that share nothing, and the network beside it.

    Args:
        frames: length of the videos; needed for a policy without a window.
        archived: frames per world that wait in host memory.
        budget: bytes on the device.
        weights: bytes of the network on the device, as inferix.models.linears.weight_bytes counts them: with 8-bit
            layers about half of bfloat16's.
        Others: as for KVStore, but that `device` need not be there.

    Example:
        >>> from inferix_kernels.store.memory import GIB, frame_tokens, plan_memory
        >>> plan = plan_memory(layers=30, heads=12, head_dim=128, frame_tokens=frame_tokens(480, 832), block_frames=3,
        ...     policy=Policy(window=18, sink=3, format="int8"), budget=8 * GIB)
        >>> plan.fits, plan.largest_window
        (True, 52)
    """
    scratch_format = scratch_format or layout.scratch_format(device)
    counts = {"layers": layers, "heads": heads, "frame_tokens": frame_tokens, "block_frames": block_frames}
    counts |= {"head_dim": min(head_dim) if isinstance(head_dim, tuple) else head_dim}
    counts |= {"worlds": worlds, "scratch_blocks": scratch_blocks} | ({} if frames is None else {"frames": frames})
    check_counts(counts)
    check_counts({"archived": archived, "weights": weights}, least=0)
    check_page_size(page_size)
    pages = -(-frame_tokens // page_size)

    def size(format: str, count: int, depth: int) -> int:
        return depth * count * pages * page_bytes(format, heads, page_size, head_dim)

    def parts_of(policy: Policy) -> dict[str, int]:
        pools = {f: size(f, worlds * n, layers) for f, n in policy.capacity(frames).items()}
        parts = ({"weights": weights} if weights else {}) | pools
        parts["scratch"] = size(scratch_format, scratch_blocks * block_frames, 1)
        if any(FORMATS[format].quantized for format in pools) and not isinstance(head_dim, tuple):
            parts["key means"] = 4 * worlds * layers * heads * head_dim
        if archived:
            parts["host"] = size(policy.format_of(0, 0), worlds * archived, layers)
        return parts

    def fits(window: int) -> bool:
        return MemoryPlan(parts_of(dataclasses.replace(policy, window=window)), budget, None).fits

    largest = None
    if budget is not None and policy.window is not None:
        largest, step = 0, 1
        while step <= 1 << 20 and fits(step):
            step *= 2
        while step:
            if fits(largest + step):
                largest += step
            step //= 2
        largest = largest if largest >= block_frames else 0
    return MemoryPlan(parts_of(policy), budget, largest)
