"""Reading and writing one tile of a page in every format, for the kernels of the other modules.

A tile is one page of one head; a program works on a part of it, all of whose scales it can compute by itself:
a run of tokens where a scale belongs to a token, a run of channels where it belongs to a channel. Every rounding is
reference.encode's, to the bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..layout import Codec, KVPages, as_bytes
from .launch import INTERPRETED as _INTERPRETED
from .sizes import ceil_div, power_of_2

INTERPRETED = tl.constexpr(_INTERPRETED)
HALF_MAX = tl.constexpr(reference.HALF_MAX)
INFINITY = tl.constexpr(float("inf"))
INFINITY_BITS = tl.constexpr(0x7F800000)

_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.uint8: "u4"}
# Numbers of a tile that one program holds, 32 in each thread: registers last for three such programs on an SM.
_PART = 8192
# A part of fewer channels would read its tokens in pieces smaller than a sector of memory.
_LEAST_CHANNELS = 16


class Plane(NamedTuple):
    """The keys or the values of a pool, as every kernel gets them. 8-bit floats come as bits: sm_80 lacks them."""

    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None


def planes_of(pages: KVPages) -> tuple[Plane, Plane]:
    """Keys, values."""
    k, v = (Plane(as_bytes(side.codes), side.scales, side.offsets) for side in pages.sides)
    return k, v


class Tile(NamedTuple):
    """All that a kernel is compiled for about one side of a pool, its keys or its values."""

    kind: str  # "float", "int8", "e4m3" or "u4"
    axis: int  # of [tokens, channels] that a scale runs along: 1, a scale per token; 0, a scale per channel
    transposed: bool
    page_size: int
    width: int
    top: float  # the largest code
    floor: float  # of the largest number that a scale is made from; of the scale itself for u4
    least: float  # scale, of a row of zeros
    split: int  # the axis that a tile is cut along into parts: 0, runs of tokens; 1, runs of channels
    rows: int  # of a part: tokens and channels, powers of two
    cols: int
    parts: int  # of a tile
    strided: bool = False  # codes, which are floats, lie in another's cache:
    page_stride: int = 0  # in elements
    head_stride: int = 0
    row_stride: int = 0

    @property
    def warps(self) -> int:
        return min(16, max(1, self.rows * self.cols // 1024))


@lru_cache
def tile_of(codec: Codec, page_size: int, width: int, split: int | None = None, numbers: int | None = None) -> Tile:
    """To write, a tile must be cut so that no scale is shared by two parts, which is the default; to read, it need not.

    Parts have at most `numbers` numbers, unless a single row of them has more.
    """
    axis = 0 if codec.scaled_by == "channel" else 1
    split = 1 - axis if split is None else split
    rows, cols = power_of_2(page_size), power_of_2(width)
    numbers = _PART if numbers is None else numbers
    if split == 0:
        rows = min(rows, max(1, numbers // cols))
    else:
        cols = min(cols, max(_LEAST_CHANNELS, numbers // rows))
    top = reference.LARGEST.get(codec.dtype, 1.0)
    floor = reference.STEP_FLOOR if codec.packed else reference.AMAX_FLOOR
    least = floor if codec.packed else float(torch.tensor(floor, device="cpu") / top)
    parts = ceil_div(width, cols) if split else ceil_div(page_size, rows)
    kind = _KINDS.get(codec.dtype, "float")
    return Tile(kind, axis, codec.transposed, page_size, width, top, floor, least, split, rows, cols, parts)


def side_tile(pages: KVPages, side: int, split: int | None = None, numbers: int | None = None) -> Tile:
    """The tile of a pool's keys, side 0, or values, side 1."""
    codec, codes, *_ = pages.sides[side]
    tile = tile_of(codec, pages.page_size, pages.value_dim if side else pages.head_dim, split, numbers)
    if codes.is_contiguous():
        return tile
    page, head, row, _ = codes.stride()
    return tile._replace(strided=True, page_stride=page, head_stride=head, row_stride=row)


@triton.jit
def tile_index(page, head, HEADS: tl.constexpr, tile: tl.constexpr):
    """What read_codes and the like take for the tile of a page and head: its number, or where it begins if strided."""
    if tile.strided:
        return page.to(tl.int64) * tile.page_stride + head.to(tl.int64) * tile.head_stride
    else:
        return page.to(tl.int64) * HEADS + head


@triton.jit
def part_of(tile: tl.constexpr, part):
    """The first token and the first channel of a part."""
    if tile.split == 0:
        return part * tile.rows, 0
    else:
        return 0, part * tile.cols


@triton.jit
def read_part(plane, index, row, col, length, tile: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tokens row .. row + ROWS and channels col .. col + COLS of tile `index`, dequantized: [ROWS, COLS] float32.

    0 for tokens past `length` and channels past the width.
    """
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    valid = (rows < length)[:, None] & (cols < tile.width)[None, :]
    stored = read_codes(plane.codes, index, row, col, length, tile, ROWS, COLS)
    if tile.kind == "u4":
        x = tl.reshape(tl.join(stored & 15, stored >> 4), [ROWS, COLS]).to(tl.float32)
    elif tile.kind == "e4m3":
        x = from_e4m3(stored)
    else:
        x = stored.to(tl.float32)
    if tile.kind != "float":
        along, mask = scale_places(index, rows, cols, length, tile)
        x *= tl.expand_dims(tl.load(plane.scales + along, mask=mask, other=0.0).to(tl.float32), tile.axis)
        if tile.kind == "u4":
            x += tl.expand_dims(tl.load(plane.offsets + along, mask=mask, other=0.0).to(tl.float32), tile.axis)
    return tl.where(valid, x, 0.0)


@triton.jit
def write_part(x, plane, index, row, col, length, tile: tl.constexpr):
    """Store x [rows, cols] float32 as tokens and channels from (row, col) on of tile `index`: reference.write_page.

    x must be 0 past `length` and past the width: that alone makes codes 0, the least scale and offset 0 of most
    unused slots.
    """
    rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
    if tile.kind == "float":
        write_codes(round_to(x, plane.codes.dtype.element_ty), plane.codes, index, row, col, tile)
    else:
        along, mask = scale_places(index, rows, cols, tile.page_size, tile)
        if tile.kind == "u4":
            numbers, scale, offset = encode_u4(x, rows, cols, length, tile)
            # Two codes to a byte, the even channel in the low half.
            low, high = tl.split(tl.reshape(numbers, [tile.rows, tile.cols // 2, 2]))
            write_codes((low | (high << 4)).to(tl.uint8), plane.codes, index, row, col, tile)
            tl.store(plane.scales + along, scale, mask=mask)
            tl.store(plane.offsets + along, offset, mask=mask)
        else:
            scale = scale_of(x, tile.axis, tile.floor, tile.top)
            x = tl.div_rn(x, tl.broadcast_to(tl.expand_dims(scale, tile.axis), [tile.rows, tile.cols]))
            x = tl.minimum(tl.maximum(x, -tile.top), tile.top)
            if tile.kind == "int8":
                write_codes(round_to_int(x).to(tl.int8), plane.codes, index, row, col, tile)
            else:
                write_codes(to_e4m3(x), plane.codes, index, row, col, tile)
            tl.store(plane.scales + along, scale, mask=mask)


@triton.jit
def max_magnitude(x, axis: tl.constexpr):
    """max |x| of float32 x along an axis, as bits. Infinity and NaN come last: a maximum of floats would ignore NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def scale_of(x, axis: tl.constexpr, floor: tl.constexpr, top: tl.constexpr):
    """The scale that maps max |x| of float32 x along an axis to the largest code; NaN if one number is not finite."""
    bits = max_magnitude(x, axis)
    scale = tl.div_rn(tl.maximum(bits.to(tl.float32, bitcast=True), floor), top)
    return tl.where(bits < INFINITY_BITS, scale, float("nan"))


@triton.jit
def encode_u4(x, rows, cols, length, tile: tl.constexpr):
    """4-bit codes int32, scales and offsets float16."""
    valid = (rows < length)[:, None] & (cols < tile.width)[None, :]
    if tile.axis == 1:  # past the length a row is all zeros, and becomes offset 0 with the least scale
        counted = tl.broadcast_to((cols < tile.width)[None, :], [tile.rows, tile.cols])
    else:  # a page without tokens has one of zeros
        counted = tl.broadcast_to((rows < tl.maximum(length, 1))[:, None], [tile.rows, tile.cols])
    low = tl.min(tl.where(counted, x, INFINITY), tile.axis)
    high = tl.max(tl.where(counted, x, -INFINITY), tile.axis)
    finite = max_magnitude(tl.where(counted, x, 0.0), tile.axis) < INFINITY_BITS
    offset = tl.where(finite, tl.minimum(tl.maximum(low, -HALF_MAX), HALF_MAX), 0.0).to(tl.float16)
    offset = (offset.to(tl.float32) + 0.0).to(tl.float16)  # -0 becomes 0
    span = tl.minimum(high, HALF_MAX) - offset.to(tl.float32)
    scale = tl.where(finite, tl.maximum(tl.div_rn(span, tile.top), tile.floor), float("nan")).to(tl.float16)
    above = x - tl.expand_dims(offset.to(tl.float32), tile.axis)
    steps = tl.broadcast_to(tl.expand_dims(scale.to(tl.float32), tile.axis), [tile.rows, tile.cols])
    # The reference rounds, then clamps: the same, since the bounds are whole numbers.
    codes = round_to_int(tl.minimum(tl.maximum(tl.div_rn(above, steps), 0.0), tile.top))
    valid &= tl.expand_dims(finite, tile.axis)
    return tl.where(valid, codes, 0), scale, offset


@triton.jit
def copy_part(plane, index, to, to_index, row, col, length, tile: tl.constexpr):
    """Bit for bit into a pool of the same format; slots past `length` as write_part leaves them."""
    stored = read_codes(plane.codes, index, row, col, length, tile, tile.rows, tile.cols)
    # Once more for transposed codes: read_codes reads them all.
    stored = tl.where((row + tl.arange(0, tile.rows) < length)[:, None], stored, 0).to(plane.codes.dtype.element_ty)
    write_codes(stored, to.codes, to_index, row, col, tile)
    if tile.kind != "float":
        rows, cols = row + tl.arange(0, tile.rows), col + tl.arange(0, tile.cols)
        along, mask = scale_places(index, rows, cols, length, tile)
        to_along, to_mask = scale_places(to_index, rows, cols, tile.page_size, tile)
        tl.store(to.scales + to_along, tl.load(plane.scales + along, mask=mask, other=tile.least), mask=to_mask)
        if tile.kind == "u4":
            tl.store(to.offsets + to_along, tl.load(plane.offsets + along, mask=mask, other=0.0), mask=to_mask)


@triton.jit
def scale_places(index, rows, cols, tokens, tile: tl.constexpr):
    """Where the scales of a part lie, and which of them exist among the first `tokens` tokens."""
    if tile.axis == 1:
        return index * tile.page_size + rows, (rows < tokens) & (rows < tile.page_size)
    else:
        return index * tile.width + cols, cols < tile.width


@triton.jit
def code_places(codes, index, rows, col, tile: tl.constexpr, COLS: tl.constexpr):
    """Where the codes of some tokens lie, [len(rows), COLS], and which of them exist; a packed pair is one place.

    index: the tile's, or of each token the one that it is in. It is added to the address first: what remains are 32-bit
    offsets.
    """
    PACK: tl.constexpr = 2 if tile.kind == "u4" else 1
    WIDTH: tl.constexpr = tile.width // PACK
    rows = rows[:, None]
    cols = (col // PACK + tl.arange(0, COLS // PACK))[None, :]
    mask = (rows < tile.page_size) & (cols < WIDTH)
    if len(index.shape) == 1:
        index = index[:, None]
    if tile.strided:
        return codes + index + (rows.to(tl.int64) * tile.row_stride + cols), mask
    elif tile.transposed:
        return codes + index * (tile.page_size * WIDTH) + (cols * tile.page_size + rows), mask
    else:
        return codes + index * (tile.page_size * WIDTH) + (rows * WIDTH + cols), mask


@triton.jit
def read_codes(codes, index, row, col, length, tile: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    places, mask = code_places(codes, index, rows, col, tile, COLS)
    if not tile.transposed:
        # Transposed, tokens lie side by side, and a mask at any length would break the wide loads.
        mask = mask & (rows < length)[:, None]
    return tl.load(places, mask=mask, other=0)


@triton.jit
def write_codes(values, codes, index, row, col, tile: tl.constexpr):
    places, mask = code_places(codes, index, row + tl.arange(0, tile.rows), col, tile, tile.cols)
    tl.store(places, values, mask=mask)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x as a float of this type, halves to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter (3.9 and before) rounds halves of bfloat16 up and loses the carry into the exponent.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_to_int(x):
    """|x| < 2^22, halves to even: 1.5 * 2^23 leaves no bit of the mantissa below the point."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def to_e4m3(x):
    """float32 |x| <= 448 -> the bits of float8_e4m3fn, halves to even. Spelled out: sm_80 has no such conversion, and
    Triton's interpreter rounds it wrong.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960 = (127 - 7) * 8: the exponents' biases
    # Below 2^-6 a code counts steps of 2^-9: the last bit of a float32 near 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(bits < 0x3C800000, small, normal) | sign).to(tl.uint8)


@triton.jit
def from_e4m3(codes):
    """The bits of float8_e4m3fn -> float32. Codes are finite: encode stores no NaN."""
    codes = codes.to(tl.int32)
    # As a float32's exponent and mantissa the code is 2^-120 of its value, subnormal or not.
    x = ((codes & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return (x.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)
