"""Times the backends of `linear` on the device that is here, and stores which is the fastest for which layers.

A result is compared with the reference's first: what is wrong is not timed.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import ops
from .._check import CODES
from .._dispatch import AUTO, Unsupported
from ..layout import Quantized
from . import speeds, stored
from .cases import Wrong, require_close
from .speeds import Layer
from .stored import kernel

ROWS = (1, 16, 128, 1024, 4096)
# Of the tiny world, of Wan 1.3B and of Wan 14B: N, K.
SIZES = ((512, 512), (1536, 1536), (8960, 1536), (1536, 8960), (5120, 5120), (13824, 5120), (5120, 13824))
MOST = {"cpu": 2e10, "cuda": 1e13}  # multiplications of one layer: what is larger would take minutes
ROUNDS, SECONDS = 5, 0.2  # each is called so often, and for so long in all
HOPELESS = 20  # times as slow as the fastest: not timed at the sizes that follow
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def layers(device: torch.device) -> Iterator[tuple[torch.dtype, Layer]]:
    for codes in CODES:
        for columns, terms in SIZES:
            for rows in ROWS:
                if rows * columns * terms <= MOST[device.type]:
                    yield codes, Layer(str(codes).removeprefix("torch."), rows, columns, terms)


def contenders(device: torch.device, codes: torch.dtype) -> list[str]:
    """All but the reference, and but those that a proof says to be wrong here."""
    proof = stored.of_device(device) if device.type == "cuda" else None
    names = [name for name in dict.fromkeys((*AUTO[device.type], "torch")) if name != "reference"]
    said = {name: "" if proof is None else proof.outcome(name, [kernel("linear", FORMATS[codes])]) for name in names}
    return [name for name in names if not said[name].startswith("wrong")]


def times(
    codes: torch.dtype,
    layer: Layer,
    device: torch.device,
    names: Sequence[str],
    said: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of one call in each backend that takes it and is right: the least of all, which take turns."""
    random = torch.Generator().manual_seed(0)
    x, weight = (
        ops.quantize_rows(torch.randn(size, layer.K, generator=random), codes, backend="reference")
        for size in (layer.M, layer.N)
    )
    bias, some = torch.randn(layer.N, generator=random), slice(0, 16)  # rows that are compared
    want = ops.linear(Quantized(x.codes[some], x.scales[some]), weight, bias=bias, backend="reference")
    given = [Quantized(*(tensor.to(device) for tensor in rows)) for rows in (x, weight)]
    bias = bias.to(device)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name in names:
        run = functools.partial(ops.linear, *given, bias=bias, backend=name)
        try:
            require_close("out", run()[some], want, 2**-7)
            calls[name] = run
        except (Unsupported, Wrong) as error:
            said(f"{name}: {error}")
    found = dict.fromkeys(calls, float("inf"))
    spent, rounds = 0.0, 0
    while calls and (rounds < ROUNDS or spent < SECONDS * len(calls)):
        for name, call in calls.items():
            seconds = _seconds(call, device, clock)
            found[name] = min(found[name], seconds)
            spent += seconds
        rounds += 1
    return found


def _seconds(call: Callable[[], torch.Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    begun = now()
    call()
    return now() - begun


def command(device: str) -> int:
    """Time the backends on a device and store it: 0, or 2 if there is no such device here.

    Raises:
        ValueError: device is none of a machine's, or the record can not be written.
    """
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if named is None or (device != "cpu" and int(named[1] or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device must be cpu, cuda or cuda:N, a device that is here, got {device!r}")
    on = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(named[1] or 0))
    print(f"{speeds.name_of(on)}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    found: dict[Layer, dict[str, float]] = {}
    names = {codes: contenders(on, codes) for codes in CODES}
    for codes, layer in layers(on):
        found[layer] = times(codes, layer, on, names[codes], lambda line: print(line, flush=True))
        least = min(found[layer].values(), default=0.0)
        names[codes] = [name for name in names[codes] if found[layer].get(name, 0.0) <= HOPELESS * least]
        ranked = sorted(found[layer].items(), key=lambda item: item[1])
        shown = "  ".join(f"{name} {1e6 * seconds:,.0f} us" for name, seconds in ranked)
        print(f"{layer.codes} [{layer.M}, {layer.K}] x [{layer.N}, {layer.K}]  {shown}", flush=True)
    print(f"stored: {speeds.save(on, found)}")
    return 0
