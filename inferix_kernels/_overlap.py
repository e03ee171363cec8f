"""Whether what an op writes lies apart from what it reads: by addresses, in each call anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .layout import rows_of


def check_overlap(read: Mapping[str, Tensor | None], written: Mapping[str, Tensor | None]) -> None:
    """What is written, [..., K] each, must share no memory with any other of these; with one that is read it may share
    all: the same numbers in the same places. Tensors whose rows lie as far apart may lie between each other's rows."""
    places = [(name, _place(x)) for name, x in {**read, **written}.items() if x is not None]
    for i, (name, one) in enumerate(places):
        for other_name, other in places[:i]:
            if name not in written or (one == other and other_name in read) or not _overlap(one, other):
                continue
            if one == other:
                raise ValueError(f"{other_name} must be another tensor than {name}, got the same")
            raise ValueError(f"{name} must share no memory with {other_name}, got tensors that overlap")


class _Place(NamedTuple):
    """Of rows that lie evenly apart, in bytes."""

    first: int
    rows: int
    stride: int
    width: int


def _place(x: Tensor) -> _Place:
    size = x.element_size()
    width = ((x.shape[-1] - 1) * abs(x.stride(-1)) + 1) * size if x.numel() else 0
    rows = rows_of(x)
    return _Place(x.data_ptr(), len(rows), rows.stride(0) * size if len(rows) > 1 else width, width)


def _overlap(a: _Place, b: _Place) -> bool:
    if not a.width * b.width * a.rows * b.rows:
        return False
    if any(x.first + (x.rows - 1) * x.stride + x.width <= y.first for x, y in ((a, b), (b, a))):
        return False
    if a.stride != b.stride:
        return True
    apart = (b.first - a.first) % a.stride if a.stride else 0
    return apart < a.width or a.stride - apart < b.width
