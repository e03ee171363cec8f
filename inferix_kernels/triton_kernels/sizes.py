"""Sizes of grids and tiles, on the host. Triton's own functions of such names take 1 to 2 microseconds a call there."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for what is less than that."""
    return 1 << max(n - 1, 0).bit_length()
