"""Which implementation of an op runs: the tables below and, on a GPU, what was proved there (proofs/)."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._remembered import Accepted
from .layout import FORMATS, Codec, KVPages, Quantized
from .plans import Plan
from .proofs import speeds, stored

BACKENDS = {
    "compiled": f"{__package__}.compiled",  # C++ on CPU tensors, CUDA on CUDA tensors
    "triton": f"{__package__}.triton_kernels",
    "reference": f"{__package__}.reference",
}
# Other libraries' kernels under our ops' names. FlashAttention's run only when they are asked for.
PEERS = {"flash-attn": f"{__package__}.flash_attn_backend", "torch": f"{__package__}.torch_backend"}
# What "auto" tries, fastest first. On a GPU the reference must be asked for by name: slow is never a surprise. There
# AUTO is the order of kernels that are unproved on the device, those whose instructions a compiler chose before those
# that we wrote ourselves; PROVED that of kernels whose results were compared with the reference's there (proofs/).
AUTO = {"cpu": ("compiled", "reference"), "cuda": ("triton", "compiled")}
PROVED = ("compiled", "triton")
ROWS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # the formats whose proofs hold for 8-bit rows, by their codes
# Of 8-bit layers on a GPU, torch's product stands before kernels of ours that are unproved there; its quantizing, which
# is several passes of plain torch, behind them. A record of the device's own times goes before both (proofs/speeds.py).
AUTO_CUDA = {"linear": ("torch", *AUTO["cuda"]), "quantize_rows": (*AUTO["cuda"], "torch")}


class Unsupported(RuntimeError):
    """Raised by a backend, before it writes anything: it cannot take these arguments, and why.

    Example:
        >>> scores = torch.rand(1, 1, 3)
        >>> select_pages(scores, PageList.of([0, 1, 2], [16, 16, 16]), k=2, backend="compiled")
        Traceback (most recent call last):
        inferix_kernels...Unsupported: select_pages: ...
    """


def run(
    op: str,
    backend: str,
    device: torch.device,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    accepted: Accepted | None = None,
) -> Any:
    """Call an op's function with these arguments: of the backend that is named, or of the first that takes them.

    accepted: what the check of the arguments made.
    """
    if backend != "reference" and type_of(device) not in AUTO:  # an address means nothing to another device's kernel
        raise Unsupported(f"{op}: no backend runs on {device.type} tensors, only on {' and '.join(AUTO)}")
    if backend != "auto":
        return implementation(op, backend)(*args, **kwargs)
    reasons = []
    order = None if accepted is None else accepted.order
    if order is None or order[0] is not stored.read:
        order = order_of(op, device, args, kwargs, accepted)
    for name, refusal in order[1]:
        try:
            if refusal:
                raise Unsupported(refusal)
            return implementation(op, name)(*args, **kwargs)
        except Unsupported as error:
            reasons.append(f"{name}: {error}")
    raise Unsupported(f"{op} cannot run here. " + "; ".join(reasons))


def order_of(
    op: str, device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any], accepted: Accepted | None
) -> tuple[object, Sequence[tuple[str, str]]]:
    """By which proofs, and `candidates`: on a GPU the same for all calls of a kind, until proofs are read again."""
    order = stored.read, candidates(op, device, args, kwargs.get("precision") == "8bit")
    if accepted is not None and op != "linear" and type_of(device) == "cuda":  # linear goes by another record, too
        accepted.order = order
    return order


def prepared_plan(q: torch.Tensor, pools: Sequence[KVPages], plan: Plan, backend: str = "auto") -> Plan:
    """The plan, with what the Hopper kernel makes of it where paged_attention would take that kernel."""
    if q.device.type != "cuda":
        return plan
    order = candidates("paged_attention", q.device, (q, pools)) if backend == "auto" else [(backend, "")]
    for name in (name for name, refusal in order if not refusal):
        if name != "compiled":
            return plan
        try:
            prepared: Plan = implementation("prepare_attention", name)(q, pools, plan)
        except Unsupported:
            continue  # the next one runs; or paged_attention says why none does
        return prepared
    return plan


def runs_compiled(op: str, backend: str, device: torch.device) -> bool:
    """Whether this backend means the compiled kernel of a CPU, whatever the call's sizes."""
    if type_of(device) != "cpu":
        return False
    return backend == "compiled" or (backend == "auto" and (op != "linear" or speeds.of_device(device) is None))


def candidates(
    op: str, device: torch.device, args: Sequence[Any], eight_bit: bool = False
) -> Sequence[tuple[str, str]]:
    """Backends in the order that "auto" tries them, each with "" or the reason why it must not run."""
    kind = type_of(device)
    if kind != "cuda":
        order = _unrefused(AUTO[kind])
    else:
        given = AUTO_CUDA.get(op, AUTO["cuda"])
        order = stored.candidates(op, device, formats_of(args), eight_bit, given, PROVED)
    return speeds.reordered(order, device, args[0].codes, len(args[1].codes)) if op == "linear" else order


@functools.cache
def type_of(device: torch.device) -> str:
    """torch makes the word anew each time, which takes as long as all the rest."""
    return device.type


@functools.cache
def _unrefused(names: tuple[str, ...]) -> Sequence[tuple[str, str]]:
    return tuple((name, "") for name in names)


def formats_of(args: Sequence[Any]) -> tuple[str, ...]:
    """Of the pools among an op's arguments; of 8-bit rows, the format whose keys have such codes; of an op without
    either, the format that holds its first tensor's dtype."""
    found: dict[str, None] = {}
    for x in args:
        if isinstance(x, KVPages):
            found[x.format] = None
        elif isinstance(x, (list, tuple)) and x and isinstance(x[0], KVPages):
            found |= dict.fromkeys(pages.format for pages in x)
        elif isinstance(x, (Quantized, torch.dtype)):
            dtype = x.codes.dtype if isinstance(x, Quantized) else x
            found |= {ROWS[dtype]: None} if dtype in ROWS else {}
    if not found and isinstance(args[0], torch.Tensor):
        found |= {name: None for name, format in FORMATS.items() if format.k == format.v == Codec(args[0].dtype)}
    return tuple(found)


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function of this name in a backend's module, or Unsupported with the reason."""
    name = BACKENDS.get(backend) or PEERS.get(backend)
    if name is None:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS | PEERS)}, got {backend!r}")
    try:
        module = sys.modules.get(name) or importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(str(error)) from error
    function: Callable[..., Any] | None = getattr(module, op, None)
    if function is None:
        raise Unsupported(f"{op}: no {backend.title()} kernel yet")
    return function
