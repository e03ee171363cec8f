"""What is measured: a case is one op on one shape, and those that contend to do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inferix_kernels.layout import FORMATS, KV_FORMATS

Result = Tensor | tuple[Tensor, ...]


class Prepared(NamedTuple):
    """A contender with its operands in place: `run` is the timed call and makes nothing but the result."""

    run: Callable[[], Any]
    read: Callable[[Any], Result] = lambda result: result  # run's result in the reference's layout; not timed


class Limit(NamedTuple):
    """Error that a contender may have and still be called right.

    relative is over all numbers, |got - want| / |want|; worst is the largest |got - want| of any one row (last
    dimension) in units of the rows' mean size, so that one wrong row among thousands is not averaged away.
    """

    relative: float
    worst: float

    @classmethod
    def of(cls, relative: float) -> Limit:
        return cls(relative, 6 * relative)


DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # formats that store numbers as they are
EXACT = Limit(0.0, 0.0)
# Of an op that reads or writes K and V of unit variance in this format. What a number's rounding costs, in the mean
# over random data, with half as much again for the sums: bf16 keeps 8 bits, int8 steps are 1/127 of a row's largest
# number (3 to 4 sigma), e4m3 keeps 4 bits, 4-bit steps are 1/15 of a row's range.
_ROUNDING = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 6e-3,
    torch.int8: 2e-2,
    torch.float8_e4m3fn: 6e-2,
    torch.uint8: 2e-1,
}


def limit_of(format: str) -> Limit:
    """Errors of keys and of values are independent: the root of the mean square of the two."""
    k, v = (_ROUNDING[codec.dtype] for codec in FORMATS[format])
    return Limit.of(k if k == v else round(((k * k + v * v) / 2) ** 0.5, 3))


LIMITS = {format: limit_of(format) for format in KV_FORMATS}
# The same where products are of 8 bits: q is rounded to the codes of the keys, and the weights to e4m3.
LIMITS_8_BIT = {"i8f8": Limit.of(6e-2), "fp8": Limit.of(8e-2)}


class Error(NamedTuple):
    """How far a result is from the reference."""

    max: float  # largest difference of two numbers
    relative: float
    worst: float

    def within(self, limit: Limit) -> bool:
        return self.relative <= limit.relative and self.worst <= limit.worst  # False for NaN


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Attributes:
        name: "ours-compiled", "ours-triton", or a peer's.
        format: of the numbers it reads or writes, see inferix_kernels.layout.FORMATS.
        prepare: inputs -> Prepared; lays operands out and compiles, off the clock. Raises Unsupported if it can't.
        flops: 2 per multiply and add that the result needs; 0 for ops that move data.
        nbytes: that must be read and written once; also what it touches, for cold caches.
        limit: of its error.
        kernel: of ours, its name in the ledger (harness.ledger.KERNELS).
        absent: why it is not on this machine; it is then listed, not run.
        reference: the right result where it has one of its own; None: the case's.
        metrics: numbers for its row.
    """

    name: str
    format: str
    prepare: Callable[[Any], Prepared]
    flops: float
    nbytes: int
    limit: Limit
    kernel: str = ""
    absent: str = ""
    reference: Callable[[Any], Result] | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        inputs: device -> what `reference` and every contender's `prepare` are given. Never written to.
        reference: inputs -> the right result; computed by inferix_kernels.reference.
    """

    family: str
    op: str
    shape: str
    inputs: Callable[[torch.device], Any]
    reference: Callable[[Any], Result]
    contenders: Sequence[Contender]

    @property
    def name(self) -> str:
        return f"{self.family}/{self.op}/{self.shape}"


def error_of(got: Result, want: Result) -> Error:
    """The largest error over all parts of a result.

    Raises:
        ValueError: another number of parts or another shape.
    """
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        return _error(got, want)
    if isinstance(got, Tensor) or isinstance(want, Tensor) or len(got) != len(want):
        raise ValueError(f"the result must have the reference's parts, got {type(got).__name__}")
    parts = [_error(a, b) for a, b in zip(got, want, strict=True)]
    # max() would drop a NaN that is not first.
    return Error(*(torch.tensor(values).max().item() for values in zip(*parts, strict=True)))


def _error(got: Tensor, want: Tensor) -> Error:
    if got.shape != want.shape:
        raise ValueError(f"the result must have the reference's shape {list(want.shape)}, got {list(got.shape)}")
    if got.dtype == want.dtype and torch.equal(got, want):
        return Error(0.0, 0.0, 0.0)
    difference, want = (got.to(want.device).float() - want.float()), want.float()
    rows, sizes = difference.norm(dim=-1), want.norm(dim=-1)
    typical = sizes.square().mean().sqrt().clamp(min=1e-30)
    relative = difference.norm() / want.norm().clamp(min=1e-30)
    return Error(float(difference.abs().max()), float(relative), float(rows.max() / typical))
