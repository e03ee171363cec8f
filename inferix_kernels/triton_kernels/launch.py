"""Launching a Triton kernel on a GPU or in the interpreter; or only compiling it, for a GPU that is not here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .._dispatch import Unsupported
from ..layout import KVPages
from ..plans import Plan


@triton.jit
def _probe() -> None:
    pass


# TRITON_INTERPRET=1 makes Triton's decorator hand out Python functions in place of kernels. Triton reads the variable
# when it is imported, so what it did is the only trustworthy answer.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
_ahead: Ahead | None = None


class Ahead(NamedTuple):
    """For a GPU that is not here: its architecture, and what becomes of a launch (kernel, programs, args, options)."""

    target: int
    take: Callable[[Any, int, Sequence[Any], dict[str, Any]], None]


class TooMuch(Unsupported):
    """The configuration needs more shared memory or registers than the GPU has."""


class Case(NamedTuple):
    """A call of real widths, to be compiled ahead of time and, on a GPU, tuned."""

    op: str
    format: str  # of the pages or codes it writes, or else reads
    what: str  # the rest
    call: Callable[[], object]
    shape: str = "any"  # the class of shapes that it asks the op's configuration for


class Call(NamedTuple):
    """What an attention op was asked for: the arguments of ops.paged_attention."""

    q: Tensor
    pools: Sequence[KVPages]
    plan: Plan
    scale: float
    out: Tensor
    lse: Tensor
    accumulate: bool = False
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None


def check_device(op: str, like: Tensor) -> None:
    if not like.is_cuda and not INTERPRETED and _ahead is None:
        raise Unsupported(
            f"{op}: Triton takes {like.device.type} tensors only in its interpreter: set TRITON_INTERPRET=1 before "
            "triton is imported"
        )


def architecture(device: torch.device) -> int | None:
    """90 for sm_90; None in the interpreter."""
    if _ahead is not None:
        return _ahead.target
    return _capability(device) if device.type == "cuda" else None


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, num_warps: int, fma: bool = False, **kwargs: Any
) -> None:
    """Without fma, products and sums are rounded separately, as in the reference.

    Raises:
        TooMuch: the program needs more shared memory or registers than the GPU has.
    """
    if programs == 0:
        return  # CUDA refuses an empty grid
    options = {**kwargs, "num_warps": num_warps, "enable_fp_fusion": fma}
    if _ahead is not None:
        _ahead.take(kernel, programs, args, options)
        return
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # Triton's: the current
            kernel[(programs,)](*args, **options)
    except OutOfResources as error:
        raise TooMuch(f"{kernel.__name__}: {error}") from error


@contextlib.contextmanager
def compile_only(target: int) -> Iterator[list[Any]]:
    """Inside, ops on CPU tensors compile what they would launch on a GPU of this architecture, and run nothing.

    Yields the list of compiled kernels, which grows. Works without a GPU, and not in Triton's interpreter.
    """
    from triton.backends.compiler import GPUTarget

    class Driver:
        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", target, 32))

    compiled: list[Any] = []

    def take(kernel: Any, programs: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        compiled.append(kernel.warmup(*args, **options, grid=(programs,)))

    if INTERPRETED:
        raise Unsupported("Triton compiles nothing in its interpreter: unset TRITON_INTERPRET")
    triton.runtime.driver.set_active(Driver())
    try:
        with _given_to(Ahead(target, take)):
            yield compiled
    finally:
        triton.runtime.driver.set_active(None)  # the machine's own again, if it has one


@contextlib.contextmanager
def launch_nothing(target: int) -> Iterator[list[str]]:
    """Inside, ops on CPU tensors do what the host does for a GPU of this architecture, up to each launch.

    Yields the names of the kernels that would have been launched, which grows.
    """
    names: list[str] = []
    with _given_to(Ahead(target, lambda kernel, *_: names.append(kernel.__name__))):
        yield names


@contextlib.contextmanager
def _given_to(ahead: Ahead) -> Iterator[None]:
    global _ahead
    _ahead = ahead
    try:
        yield
    finally:
        _ahead = None
