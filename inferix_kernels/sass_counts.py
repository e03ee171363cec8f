"""How many instructions a kernel's hot loop has: the loop around its tensor-core products, as SASS.

Of a loop the shortest way round is counted, which is what a warp executes as long as no branch for a special case (a
page that is partly filled) is taken. `python -m inferix_kernels compile paged_attention` prints the counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from . import sass


def hot_loops(code: Sequence[sass.Line]) -> list[list[sass.Line]]:
    """The instructions of each innermost loop that has tensor-core products, in the order of a function's code."""
    following = sass.successors(code)
    heads: dict[int, int] = {}  # of each loop: its first line, and the last that jumps back there
    for tail, targets in enumerate(following):
        for head in targets:
            if head <= tail:
                heads[head] = tail
    found: dict[tuple[int, int], list[sass.Line]] = {}
    for head, tail in heads.items():
        path = [code[i] for i in _shortest(code, following, head, tail) if code[i].address]
        if any(map(is_product, path)):
            found[head, tail] = path
    return [path for loop, path in sorted(found.items()) if not any(_within(other, loop) for other in found)]


def is_product(line: sass.Line) -> bool:
    """Of the tensor cores: HMMA, IGMMA, UTCQMMA ..."""
    return line.opcode.split(".")[0].endswith("MMA")


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _shortest(
    code: Sequence[sass.Line], following: Sequence[Sequence[int]], start: int, stop: int
) -> list[int]:
    """The way with the fewest instructions; none: an empty list."""
    came: dict[int, int] = {}
    least = {start: 0}
    ahead = [(0, start)]
    while ahead:
        length, at = heapq.heappop(ahead)
        if at == stop:
            break
        for to in following[at]:
            longer = length + bool(code[to].address)
            if longer < least.get(to, len(code) + 1):
                least[to], came[to] = longer, at
                heapq.heappush(ahead, (longer, to))
    if stop not in least:
        return []
    way = [stop]
    while way[-1] != start:
        way.append(came[way[-1]])
    return way[::-1]
