"""A tile of keys and values, as the attention kernels read it: part of a page, or several entries of the page list.

What belongs to a page (its number, its end) comes as a tuple, a number for each page that the tile spans; `spread`
gives every key that of its own page. So a tile of one page and one of several are the same code. Which of the keys lie
in which page is known when the kernel is compiled, so that `spread` costs no instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codecs import INTERPRETED, code_places, from_e4m3, round_to, tile_index
from .limits import place_of
from .work import entry_of


@triton.jit
def spread(numbers, which):
    """Of each key the number of its page; of a tile within one page that number itself. which: [keys], from 0."""
    x = numbers[0]
    for n in tl.static_range(1, len(numbers)):
        x = tl.where(which == n, numbers[n], x)
    return x


@triton.jit
def entries_from(i, last, plan, variant, pool, base, PAGE_SIZE: tl.constexpr, PAGES: tl.constexpr):
    """Of the entries i to i + PAGES - 1, a tuple each: pages of this pool, first valid slots, one past the last,
    biases, positions of the first valid tokens. An entry that is none, or of another pool or variant, ends at 0.
    """
    pages, starts, ends, biases, positions = (), (), (), (), ()
    for n in tl.static_range(PAGES):
        page, length, bias = entry_of(i + n, last, plan, variant, pool, base, PAGE_SIZE)
        start, position = place_of(i + n, last, plan)
        if plan.page_starts is not None:
            length = tl.where(length > 0, start + length, 0)
        pages += (page,)  # type: ignore[assignment]
        starts += (start,)  # type: ignore[assignment]
        ends += (length,)  # type: ignore[assignment]
        biases += (bias,)  # type: ignore[assignment]
        positions += (position,)  # type: ignore[assignment]
    return pages, starts, ends, biases, positions


@triton.jit
def any_ends_within(row, starts, ends, SPAN: tl.constexpr):
    """Whether one of the pages has fewer than SPAN valid slots from `row` of its valid ones on."""
    least = ends[0] - starts[0]
    for n in tl.static_range(1, len(ends)):
        least = tl.minimum(least, ends[n] - starts[n])
    return row + SPAN > least


@triton.jit
def load_codes(
    codes, pages, head, which, rows, col, ends, HEADS: tl.constexpr, tile: tl.constexpr, COLS: tl.constexpr,
    TO_THE_END: tl.constexpr,
):  # fmt: skip
    """[len(rows), COLS] codes of slots `rows` of each key's page; 0 where a page has no tokens and, TO_THE_END, past
    the valid ones. Else what is stored there: of a key the score is masked, of a value that is a code the weight is 0.
    """
    index = tile_index(spread(pages, which), head, HEADS, tile)
    places, mask = code_places(codes, index, rows, col, tile, COLS)
    end = spread(ends, which) + tl.zeros_like(rows)
    there = rows < end if TO_THE_END else end > 0
    return tl.load(places, mask=mask & there[:, None], other=0)


@triton.jit
def load_by_token(x, pages, head, which, rows, ends, HEADS: tl.constexpr, tile: tl.constexpr):
    """[rows] scales or offsets, float32; 0 past the valid tokens."""
    places = x + tile_index(spread(pages, which), head, HEADS, tile) * tile.page_size + rows
    return tl.load(places, mask=rows < spread(ends, which), other=0.0).to(tl.float32)


@triton.jit
def load_by_channel(
    x, pages, head, which, col, ends, HEADS: tl.constexpr, tile: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Scales or offsets, float32: [1, COLS] of the one page, or of each key those of its page; 0 of empty pages."""
    cols = col + tl.arange(0, COLS)
    found = tl.zeros([1, COLS], tl.float32)
    for n in tl.static_range(len(pages)):
        places = x + tile_index(pages[n], head, HEADS, tile) * tile.width + cols
        mine = tl.load(places, mask=cols < tl.where(ends[n] > 0, tile.width, 0), other=0.0)[None, :]
        found = tl.where((which == n)[:, None], mine, found) if n > 0 else mine
    return found.to(tl.float32)


@triton.jit
def load_along(
    x, pages, head, which, rows, col, ends, HEADS: tl.constexpr, tile: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Scales or offsets as the tile has them, to be broadcast."""
    if tile.axis == 1:
        return load_by_token(x, pages, head, which, rows, ends, HEADS, tile)[:, None]
    else:
        return load_by_channel(x, pages, head, which, col, ends, HEADS, tile, COLS)


@triton.jit
def load_floats(
    plane, pages, head, which, rows, col, ends, HEADS: tl.constexpr, tile: tl.constexpr, DTYPE: tl.constexpr,
    COLS: tl.constexpr, E4M3: tl.constexpr, SCALED: tl.constexpr, TO_THE_END: tl.constexpr,
):  # fmt: skip
    """As load_codes, as floats of this type: dequantized, or unless SCALED the codes, which are exact in every type."""
    codes = load_codes(plane.codes, pages, head, which, rows, col, ends, HEADS, tile, COLS, TO_THE_END)
    if tile.kind == "float" or not SCALED:
        return as_floats(codes, tile, DTYPE, E4M3)
    else:
        if tile.kind == "u4":
            codes = tl.reshape(tl.join(codes & 15, codes >> 4), [codes.shape[0], COLS])
        scales = load_along(plane.scales, pages, head, which, rows, col, ends, HEADS, tile, COLS)
        x = as_floats(codes, tile, tl.float32, E4M3) * scales
        if tile.kind == "u4":
            x += load_along(plane.offsets, pages, head, which, rows, col, ends, HEADS, tile, COLS)
        return round_to(x, DTYPE)


@triton.jit
def as_floats(codes, tile: tl.constexpr, DTYPE: tl.constexpr, E4M3: tl.constexpr):
    if codes.dtype == DTYPE:
        return codes
    elif tile.kind != "e4m3":
        return round_to(codes.to(tl.float32), DTYPE)
    elif E4M3 and not INTERPRETED:
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return round_to(from_e4m3(codes), DTYPE)
