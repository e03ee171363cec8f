"""What a block asks of the host besides torch's launches, with kernels that do nothing.

Python of a layer: all that a layer of Wan 1.3B runs besides torch, in a pass over a block and in one over a clean block
and a noisy one (host_layer.py). "null": the network's own code, our checks, the choice of a backend and the store's
part, over a backend that returns at once. "triton": the same and what Triton's ops do up to each launch. Sizes do not
matter: nothing is computed. Of the noisy pass also its attention (prologue and attention), its four norms
(`Residual.before`), and the layer again with what torch.nn does to look up and call its modules.

Of a whole block: the rotary table of Wan's tokens at 480 x 832, and the tensors that its forwards make, send or read
back besides what torch's operations return.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inferix_kernels import Unsupported, ops
from inferix_kernels.quantize import fused

from . import e2e, host_layer
from .harness.measure import Settings
from .harness.rows import Row

TORCH = str(Path(torch.__file__).parent)
READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
SENDS = ("lift_fresh", "pin_memory")
RESULTS = {Path(ops.__file__), Path(fused.__file__)}  # where tensors are made for what our ops return


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    for contender in ("null", "triton"):
        if not settings.wants_name(f"ours-{contender}"):
            continue
        row = Row("host", "python of a layer", "wan", f"ours-{contender}", "int8+bf16", settings.device, "ok")
        if settings.device != "cpu":
            row.status, row.note = "unsupported", "kernels do nothing: there is no difference between devices"
        else:
            try:
                with host_layer.backend(contender) as name:
                    row.metrics = host_layer.metrics_of(max(1, settings.rounds), name)
            except (Unsupported, ImportError) as reason:
                row.status, row.note = "unsupported", str(reason)
        yield row
    if settings.device == "cpu" and settings.wants_name("ours"):
        row = Row("host", "of a block", "wan", "ours", "int8", "cpu", "ok")
        row.metrics = block_metrics(settings, max(1, settings.rounds))
        yield row


def block_metrics(settings: Settings, rounds: int) -> dict[str, float]:
    model, conditioning = e2e.load(dataclasses.replace(settings, model="self-forcing", weights=None))
    loop = e2e.open_loop("ours", model, conditioning, settings)
    for _ in range(3):  # the third one commits the block before it in its first forward, as all later ones do
        loop.decoder.step(conditioning())
    predict, found = model.predict, list[str]()

    def counted(*args: Any) -> Any:
        with OnTheDevice(found.append):
            return predict(*args)

    with mock.patch.object(model, "predict", counted):
        loop.decoder.step(conditioning())
    wide = copy.copy(model)
    wide.grid, wide.head_dim = (30, 52), host_layer.WIDTH
    times = {f"rope of {n} frames ms": 1e3 * min(seconds(wide.rope, range(n)) for _ in range(rounds)) for n in (3, 6)}
    return {**times, "made or moved": len(found)}


def seconds(call: Callable[..., object], *args: object) -> float:
    started = time.process_time()
    call(*args)
    return time.process_time() - started


def tensors_in(*values: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def makes_a_result() -> bool:
    """Is a tensor being made for what an op of ours returns? As torch's own ops make theirs, it comes from torch's
    allocator and, in a capture, from the graph's own memory."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith((TORCH, __file__)):  # the mode that watches, and what calls it
        frame = frame.f_back
    return Path(frame.f_code.co_filename) in RESULTS


class OnTheDevice(TorchDispatchMode):
    """While it is entered, hands to `complain` what operations of torch do besides being launched: make a tensor that
    is no op's result, bring numbers from the host or read them back, or go from one device to another.

    Args:
        complain: called with "zeros makes a tensor", "item reads from the device", ...
    """

    def __init__(self, complain: Callable[[str], None]):
        super().__init__()
        self.complain = complain

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        given, got = tensors_in(args, kwargs), tensors_in(made)
        makes = name.startswith("new_") or name.endswith("_like") or (got and not given)
        if name in READS:
            self.complain(f"{name} reads from the device")
        elif name in SENDS:
            self.complain(f"{name} brings numbers from the host")
        elif makes and not (name.startswith(("empty", "new_empty")) and makes_a_result()):
            self.complain(f"{name} makes a tensor")
        elif len(devices := {x.device for x in [*given, *got] if x.ndim}) > 1:
            self.complain(f"{name} goes from one device to another: {devices}")
        return made
