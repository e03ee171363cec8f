"""How keys and values lie in memory: formats, pages, and lists of pages.

Plain tuples of tensors, so that they pass through torch.compile and cost nothing to build.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Codec(NamedTuple):
    """How one side of a page, its keys or its values, is stored.

    What shares a scale is a row of the (page, head) tile: one "token", or one "channel" over the page's valid tokens.
    x = code * scale, or code * scale + offset for 4-bit codes, which are unsigned and lie two to a byte, the even
    channel in the low half.
    """

    dtype: torch.dtype  # of the codes
    scaled_by: str | None = None  # "token", "channel" or, for floats stored as they are, None
    transposed: bool = False  # codes lie [width, page_size], as the 8-bit tensor cores read values

    @property
    def packed(self) -> bool:
        return self.dtype == torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        """4 bits leave no room for float32 scales: they would be a tenth of the page."""
        return torch.float16 if self.packed else torch.float32


PRECISIONS = ("auto", "exact", "8bit")  # of attention's products: see ops.paged_attention


class Format(NamedTuple):
    k: Codec
    v: Codec

    @property
    def quantized(self) -> bool:
        return self.k.scaled_by is not None

    @property
    def eight_bit(self) -> bool:
        """Can tensor cores multiply both sides' codes as they are?"""
        return self.k.scaled_by == "token" and not self.k.packed and self.v.transposed


_E4M3 = torch.float8_e4m3fn
FORMATS = {
    "fp32": Format(Codec(torch.float32), Codec(torch.float32)),
    "fp16": Format(Codec(torch.float16), Codec(torch.float16)),
    "bf16": Format(Codec(torch.bfloat16), Codec(torch.bfloat16)),
    "int8": Format(Codec(torch.int8, "token"), Codec(torch.int8, "channel")),
    "i8f8": Format(Codec(torch.int8, "token"), Codec(_E4M3, "channel", transposed=True)),
    "fp8": Format(Codec(_E4M3, "token"), Codec(_E4M3, "channel", transposed=True)),
    "int4": Format(Codec(torch.uint8, "channel"), Codec(torch.uint8, "token")),
    # Multi-head latent attention: 8-bit latent rows as keys, the rotated part of the key, kept exact, as values.
    "latent8": Format(Codec(torch.int8, "token"), Codec(torch.bfloat16)),
}
KV_FORMATS = tuple(name for name in FORMATS if name != "latent8")  # those that attention reads


def scratch_format(device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """How a store keeps the keys and values of blocks that are not clean yet, unless its caller says otherwise.

    On a GPU, in the precision of the network that computes them, since its 16-bit kernels read no other: with float32
    scratch no call of a bfloat16 network reaches the Hopper kernel. On a CPU in float32, but for a bfloat16 network
    where the CPU has tile registers (AMX), which multiply bfloat16 numbers several times as fast.

    Args:
        device: of the store; anything but a CPU counts as a GPU.
        dtype: of q, k and v. Half precisions keep theirs; anything wider is float32, the widest that pages hold. None:
            not known, as bfloat16 on a GPU and float32 on a CPU.
    """
    if torch.device(device).type == "cpu":
        return "bf16" if dtype == torch.bfloat16 and _has_tile_registers() else "fp32"
    return {torch.bfloat16: "bf16", None: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


@functools.cache
def _has_tile_registers() -> bool:
    try:
        from . import _C
    except ImportError:
        return False
    return _C.best_isa() >= _C.Isa.amx


class Side(NamedTuple):
    """The keys or the values of a pool: one Codec's tensors."""

    codec: Codec
    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None


class KVPages(NamedTuple):
    """A pool of P pages, each with room for page_size tokens of H KV heads; keys D wide, values Dv wide.

    One (page, head) tile is contiguous: it is what a kernel loads at once. Its codes are [page_size, width],
    [page_size, width / 2] packed, or [width, page_size] transposed, as the format's codecs say; scales and offsets
    hold one number per token, [P, H, page_size], or per channel, [P, H, width].

    Dv differs from D in stores of latent rows (MLA): H = 1, the latent as keys and its rotary part as values.

    Floats may also lie as somebody else's cache has them, anyhow strided but for the last dimension: a cache
    [P, page_size, H, D] is a pool by k.transpose(1, 2), and stays where it is.

    Example:
        >>> pages = KVPages.empty("int4", pages=2, heads=4, page_size=16, head_dim=32)
        >>> pages.format, pages.pages, pages.heads, pages.page_size, pages.head_dim, pages.nbytes
        ('int4', 2, 4, 16, 32, 5632)
    """

    format: str  # a name in FORMATS; two may store the same dtypes
    k: Tensor  # [P, H, page_size, D] codes
    v: Tensor  # [P, H, page_size, Dv] codes
    k_scales: Tensor | None = None  # float32, float16 for 4-bit codes; None for floats
    v_scales: Tensor | None = None
    k_offsets: Tensor | None = None  # float16, for 4-bit codes only
    v_offsets: Tensor | None = None

    @classmethod
    def empty(
        cls,
        format: str,
        pages: int,
        heads: int,
        page_size: int,
        head_dim: int | tuple[int, int],
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
    ) -> KVPages:
        """Allocate a pool. Its contents are undefined: a slot means something once an op has written its page.

        head_dim is the width of keys and values, or the two widths (D, Dv).

        Example:
            >>> KVPages.empty("fp8", pages=2, heads=4, page_size=16, head_dim=32).k.dtype
            torch.float8_e4m3fn
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        widths = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
        sizes = {"pages": pages, "heads": heads, "page_size": page_size, "head_dim": min(widths)}
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}")
        sides = []
        for codec, width in zip(FORMATS[format], widths, strict=True):
            if codec.packed and width % 2:
                raise ValueError(f"head_dim must be even for {format} pages, got {width}")
            tile, parameters = tile_shapes(codec, page_size, width)
            sides.append(
                [
                    torch.empty(pages, heads, *shape, dtype=dtype, device=device, pin_memory=pin_memory)
                    if present
                    else None
                    for shape, dtype, present in (
                        (tile, codec.dtype, True),
                        (parameters, codec.scale_dtype, codec.scaled_by is not None),
                        (parameters, codec.scale_dtype, codec.packed),
                    )
                ]
            )
        return cls(format, *(tensor for both in zip(*sides, strict=True) for tensor in both))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that the format has, by name."""
        return {name: x for name, x in zip(self._fields[1:], self[1:], strict=True) if x is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> KVPages:
        """A pool of what `function` makes of each tensor: pages.map(torch.clone)."""
        return KVPages(self.format, **{name: function(x) for name, x in self.tensors.items()})

    @property
    def sides(self) -> tuple[Side, Side]:
        codecs = FORMATS[self.format]
        return (
            Side(codecs.k, self.k, self.k_scales, self.k_offsets),
            Side(codecs.v, self.v, self.v_scales, self.v_offsets),
        )

    @property
    def pages(self) -> int:
        return self.k.shape[0]

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]  # keys are never transposed

    @property
    def head_dim(self) -> int:
        """D, the width of keys."""
        return self.k.shape[3] * (2 if FORMATS[self.format].k.packed else 1)

    @property
    def value_dim(self) -> int:
        """Dv, the width of values."""
        codec = FORMATS[self.format].v
        return self.v.shape[2 if codec.transposed else 3] * (2 if codec.packed else 1)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def part(self, start: int, stop: int) -> KVPages:
        """Pages start .. stop - 1 as a pool of their own, in the same memory."""
        return self.map(lambda tensor: tensor[start:stop])


def tile_shapes(codec: Codec, page_size: int, width: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes of the codes of one (page, head) tile, and of its scales."""
    stored = width // 2 if codec.packed else width
    codes = (stored, page_size) if codec.transposed else (page_size, stored)
    return codes, (page_size if codec.scaled_by == "token" else width,)


def rows_of(x: Tensor) -> Tensor:
    """[..., K] -> [M, K], the same memory: rows must lie evenly apart."""
    return x if x.ndim == 2 else x.view(x.shape[:-1].numel(), x.shape[-1])


def as_bytes(x: Tensor) -> Tensor:
    """8-bit floats as their bits, which torch can slice and copy anywhere; other tensors as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


class PageList(NamedTuple):
    """Tokens fill, or are read from, these pages in order: lens[i] tokens in the first slots of page ids[i], or from
    slot starts[i] on.

    Example:
        >>> where = PageList.of([3, 1], [16, 9])  # 16 tokens in page 3, then 9 in page 1
        >>> where.ids.dtype
        torch.int32
    """

    ids: Tensor  # [n] int32
    lens: Tensor  # [n] int32, each in [0, page_size]
    starts: Tensor | None = None  # [n] int32, the slot of each page's first token; None: 0. starts + lens <= page_size

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        lens: Sequence[int],
        device: torch.device | str = "cpu",
        starts: Sequence[int] | None = None,
    ) -> PageList:
        """A page list from Python lists of the same length.

        Example:
            >>> PageList.of([3, 1], [16, 9]).lens.tolist()
            [16, 9]
        """
        check_list("ids", ids, lens)
        if starts is not None and len(starts) != len(ids):
            raise ValueError(f"starts must be as many as ids, got {len(starts)} and {len(ids)}")
        return cls(int32(ids, device), int32(lens, device), None if starts is None else int32(starts, device))


class Quantized(NamedTuple):
    """A matrix in 8 bits, each row with a scale of its own: x = codes * scales[:, None].

    Rows are tokens of an activation, or output channels of a weight.

    Example:
        >>> x = quantize_rows(torch.tensor([[1.0, -0.5], [0.0, 127.0]]))
        >>> x.codes.tolist()
        [[127, -64], [0, 127]]
    """

    codes: Tensor  # [rows, K] int8 or float8_e4m3fn
    scales: Tensor  # [rows] float32


def check_list(name: str, ids: Sequence[int], lens: Sequence[int]) -> None:
    if len(ids) != len(lens):
        raise ValueError(f"{name} must be as many as their lens, got {len(ids)} ids and {len(lens)} lens")
    for i, (page, length) in enumerate(zip(ids, lens, strict=True)):
        if page < 0 or length < 0:
            raise ValueError(f"{name}[{i}] and its len must not be negative, got page {page} with {length} tokens")


def int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
