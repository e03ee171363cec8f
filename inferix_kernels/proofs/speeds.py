"""Which backend of `linear` is the fastest on a device that is here, as it was measured there; `auto` goes by it.

`python -m inferix_kernels fastest` (see race.py) times small and large layers and stores the outcome in the user's
cache, one file for each device by its name. A record of another torch or another build of the kernels is not used. This
file only reads and writes them; it is on the way of every call of `linear`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files
from . import stored

FOLDER = Path("~/.cache/inferix/speeds")
NEAR = 4  # a layer takes the outcome of the nearest one, no size of which is this many times another's

Order = Sequence[tuple[str, str]]


class Layer(NamedTuple):
    """The sizes of a call: x [M, K] in codes of this type, weight [N, K]."""

    codes: str  # "int8", "float8_e4m3fn"
    M: int
    N: int
    K: int


class Record(NamedTuple):
    device: str
    torch: str
    build: str
    seconds: Mapping[Layer, Mapping[str, float]]  # of each backend that gave the right result

    def order(self, layer: Layer) -> tuple[str, ...]:
        """Backends, fastest first, of the nearest layer that was measured; none if there is none near."""
        near = [(distance(layer, other), other) for other in self.seconds]
        found = min(near, default=(math.inf, layer))
        times = self.seconds[found[1]] if math.isfinite(found[0]) else {}
        return tuple(sorted(times, key=lambda name: times[name]))


def distance(a: Layer, b: Layer) -> float:
    """How far two layers' sizes are from each other; infinity if their codes differ, or a size by NEAR times."""
    sizes = [abs(math.log2(x / y)) for x, y in zip(a[1:], b[1:])]
    return math.inf if a.codes != b.codes or max(sizes) >= math.log2(NEAR) else sum(sizes)


def reordered(order: Order, device: torch.device, codes: Tensor, columns: int) -> Order:
    """Backends in the order of this device's record, if it has one, then the others; those that must not run last."""
    found = _order(device, codes.dtype, *codes.shape, columns)
    if not found:
        return order
    refused = {name for name, why in order if why}
    first = [(name, "") for name in found if name not in refused]
    return [*first, *((name, why) for name, why in order if (name, "") not in first)]


@functools.lru_cache(4096)
def _order(device: torch.device, codes: torch.dtype, rows: int, terms: int, columns: int) -> tuple[str, ...]:
    record = of_device(device)
    if record is None or not rows * terms * columns:
        return ()
    return record.order(Layer(str(codes).removeprefix("torch."), rows, columns, terms))


@functools.cache
def of_device(device: torch.device) -> Record | None:
    """The record of this device, torch and build; read once. None if there is none, or if it can not be read."""
    try:
        found = json.loads(path(name := name_of(device)).read_text())
        whole = {Layer(str(codes), int(m), int(n), int(k)): _times(times) for codes, m, n, k, times in found["layers"]}
        if any(min(layer[1:]) < 1 for layer in whole):
            raise ValueError("a layer has no numbers")
        record = Record(found["device"], found["torch"], found["build"], whole)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):  # RuntimeError: no home folder
        return None
    return record if record[:3] == (name, torch.__version__, stored.build()) else None


def _times(times: Any) -> dict[str, float]:
    return {str(name): float(seconds) for name, seconds in times.items()}


def save(device: torch.device, seconds: Mapping[Layer, Mapping[str, float]]) -> Path:
    """Store what was measured on a device for this user, and use it from now on.

    Raises:
        ValueError: the cache can not be written.
    """
    record = Record(name_of(device), torch.__version__, stored.build(), seconds)
    try:
        file = path(record.device)
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.unwritable(FOLDER, error, "record") from None
    except RuntimeError as error:
        raise ValueError(f"record: cannot write it to {FOLDER}: {error}") from None
    layers = [[*layer, times] for layer, times in seconds.items()]
    with files.atomic_write(file, "record") as part:
        part.write_text(json.dumps(record._replace(seconds={})._asdict() | {"layers": layers}, indent=1) + "\n")
    forget()
    return file


def forget() -> None:
    """Read records again at the next call."""
    of_device.cache_clear()
    _order.cache_clear()


def path(device: str) -> Path:
    return FOLDER.expanduser() / f"{hashlib.sha256(device.encode()).hexdigest()[:16]}.json"


@functools.cache
def name_of(device: torch.device) -> str:
    """ "NVIDIA H200", or of a CPU its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()
