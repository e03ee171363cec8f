"""How keys and values lie in memory: formats, pages, lists of pages, and the plan that an attention call follows.

Plain tuples of tensors, so that they pass through torch.compile and cost nothing to build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
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


def scratch_format(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """How a store keeps the keys and values of blocks that are not clean yet, unless its caller says otherwise.

    On a GPU, in the precision of the network that computes them, since its 16-bit kernels read no other: with float32
    scratch no call of a bfloat16 network reaches the Hopper kernel. On a CPU in float32, where bfloat16 gains nothing.

    Args:
        device: of the store; anything but a CPU counts as a GPU.
        dtype: of q, k and v. Half precisions keep theirs; anything wider is float32, the widest that pages hold.
    """
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return half.get(dtype, "fp32") if torch.device(device).type != "cpu" else "fp32"


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
    def of(cls, ids: Sequence[int], lens: Sequence[int], device: torch.device | str = "cpu") -> PageList:
        """A page list from Python lists of the same length.

        Example:
            >>> PageList.of([3, 1], [16, 9]).lens.tolist()
            [16, 9]
        """
        _check_list("ids", ids, lens)
        return cls(_int32(ids, device), _int32(lens, device))


UNLIMITED = 2**30  # in a plan's windows: further than any key


class Plan(NamedTuple):
    """Which pages each query attends to. One plan serves all layers and all passes over a block.

    Segment s is the queries q_indptr[s] : q_indptr[s+1]. It has one page list for all KV heads, or one for each: list
    l is the pages page_indptr[l] : page_indptr[l+1], with l = s or l = s * H + head. A query attends to every valid
    token of its list's pages and to nothing else. The page list is the mask.

    Where that is too coarse, among tokens that see only what came before them, a segment has a window too: query i of
    it sees the tokens at positions i - left to i + right, of those that its list holds.

    Example:
        >>> plan = make_plan([(4, [3, 1], [16, 9]), (6, [3], [16])])
        >>> plan.q_indptr.tolist(), plan.page_indptr.tolist(), plan.page_ids.tolist()
        ([0, 4, 10], [0, 2, 3], [3, 1, 3])
    """

    q_indptr: Tensor  # [S+1] int32, from 0 to T
    page_indptr: Tensor  # [L+1] int32, from 0 to N; L is S, or S * H
    page_ids: Tensor  # [N] int32, counted through the pools in the order a call gives them
    page_lens: Tensor  # [N] int32, valid tokens of each page
    page_bias: Tensor | None = None  # [N] float32, added to the scaled scores of a page's keys; -inf leaves it out
    page_variants: Tensor | None = None  # [N] int32 in [0, V): which of q's variants meets the page
    page_starts: Tensor | None = None  # [N] int32, the slot of each page's first valid token; None: 0
    windows: Tensor | None = None  # [S, 2] int32, (left, right) in tokens, at most UNLIMITED
    page_positions: Tensor | None = None  # [N] int32, of each page's first valid token; with windows. 0 is query 0's own


class Segment(NamedTuple):
    """A run of queries and the pages they attend to, on the host.

    Example:
        >>> segment = Segment(queries=4, ids=[3, 1], lens=[16, 9], bias=[0.0, -1.0])
        >>> make_plan([segment]).page_bias.tolist()
        [0.0, -1.0]
    """

    queries: int
    ids: Sequence[int]
    lens: Sequence[int]  # valid tokens of each page
    bias: Sequence[float] | None = None
    variants: Sequence[int] | None = None
    starts: Sequence[int] | None = None  # slot of the first of them
    window: tuple[int, int] | None = None  # (left, right) in tokens, -1 for any number: (-1, 0) is causal


def make_plan(
    segments: Sequence[Segment | tuple], device: torch.device | str = "cpu", *, lists_per_segment: int = 1
) -> Plan:
    """Build a plan from segments, or plain tuples of a Segment's fields, (queries, ids, lens[, bias[, ...]]), in query
    order.

    An empty page list is allowed: its queries get out = 0 and lse = -inf. With lists_per_segment = H every H entries
    in a row are one segment: the same number of queries and window, and the page list of KV head 0, 1, ...

    Windows are aligned bottom-right, as FlashAttention means them: a segment's last query stands at the last token of
    its list, whatever their numbers.

    Raises:
        ValueError: a negative count, id or length; fields of a segment that differ in length; bias, variants or starts
            in some segments only; entries that make no whole segments. Ids and lengths are checked with the pools when
            the plan is used, since one plan may serve pools of several layers.

    Example:
        >>> plan = make_plan([(4, [3, 1], [16, 9]), (6, [3], [16])])  # two segments: (queries, page ids, lens)
        >>> plan.page_lens.tolist()
        [16, 9, 16]
    """
    lists = [Segment(*segment) for segment in segments]
    _check_segments(lists, lists_per_segment)

    def flat(field: str, dtype: torch.dtype = torch.int32) -> Tensor | None:
        if not lists or getattr(lists[0], field) is None:
            return None
        numbers = [x for segment in lists for x in getattr(segment, field)]
        return torch.tensor(numbers, dtype=dtype, device=device)

    windows = positions = None
    if any(segment.window is not None for segment in lists):
        limits = [UNLIMITED if side == -1 else side for x in lists[::lists_per_segment] for side in x.window or (-1, -1)]
        windows = _int32(limits, device).view(-1, 2)
        positions = _int32([position for segment in lists for position in _positions(segment)], device)
    return Plan(
        _int32(list(accumulate((segment.queries for segment in lists[::lists_per_segment]), initial=0)), device),
        _int32(list(accumulate((len(segment.ids) for segment in lists), initial=0)), device),
        _int32([x for segment in lists for x in segment.ids], device),
        _int32([x for segment in lists for x in segment.lens], device),
        flat("bias", torch.float32),
        flat("variants"),
        flat("starts"),
        windows,
        positions,
    )


def _positions(segment: Segment) -> list[int]:
    """Of each page's first valid token, counted from the segment's first query: its last query is at the last token."""
    return list(accumulate(segment.lens[:-1], initial=segment.queries - sum(segment.lens))) if segment.lens else []


def even_plan(q_indptr: Tensor, pages: PageList, lists: int) -> Plan:
    """A plan of so many page lists of one length, as select_pages makes them; nothing is read from the device.

    Example:
        >>> runs = torch.tensor([0, 64, 100], dtype=torch.int32)
        >>> even_plan(runs, PageList.of([3, 1, 3, 2], [16, 9, 16, 16]), lists=2).page_indptr.tolist()
        [0, 2, 4]
    """
    if lists < 1 or len(pages.ids) % lists:
        raise ValueError(f"lists must be a divisor of the {len(pages.ids)} pages, got {lists}")
    steps = torch.arange(lists + 1, dtype=torch.int32, device=pages.ids.device)
    return Plan(q_indptr, steps * (len(pages.ids) // lists), pages.ids, pages.lens, page_starts=pages.starts)


def _check_segments(lists: list[Segment], lists_per_segment: int) -> None:
    if len(lists) % lists_per_segment:
        raise ValueError(f"segments must be a multiple of {lists_per_segment} page lists, got {len(lists)}")
    for s, segment in enumerate(lists):
        if segment.queries < 0:
            raise ValueError(f"segments[{s}]: the number of queries must not be negative, got {segment.queries}")
        for field in ("queries", "window"):
            want, got = (getattr(x, field) for x in (lists[s - s % lists_per_segment], segment))
            if got != want:
                raise ValueError(f"segments[{s}]: {field} must be {want} in all lists of one segment, got {got}")
        if segment.window is not None and not all(-1 <= side <= UNLIMITED for side in segment.window):
            raise ValueError(f"segments[{s}]: window must be two numbers of tokens, or -1, got {segment.window}")
        _check_list(f"segments[{s}]: page ids", segment.ids, segment.lens)
        for field in ("bias", "variants", "starts"):
            numbers = getattr(segment, field)
            if (numbers is None) != (getattr(lists[0], field) is None):
                raise ValueError(f"segments[{s}]: {field} must be given for all segments or for none")
            if numbers is not None and len(numbers) != len(segment.ids):
                raise ValueError(f"segments[{s}]: {field} must be {len(segment.ids)} numbers, got {len(numbers)}")


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


def _check_list(name: str, ids: Sequence[int], lens: Sequence[int]) -> None:
    if len(ids) != len(lens):
        raise ValueError(f"{name} must be as many as their lens, got {len(ids)} ids and {len(lens)} lens")
    for i, (page, length) in enumerate(zip(ids, lens, strict=True)):
        if page < 0 or length < 0:
            raise ValueError(f"{name}[{i}] and its len must not be negative, got page {page} with {length} tokens")


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
