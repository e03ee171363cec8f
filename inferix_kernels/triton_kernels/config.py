"""How large the tiles of a kernel are, for a device and a class of shapes: chosen ahead, in configs/*.json.

configs/sm_90.json serves all GPUs of that architecture, and of later ones up to the next file; a file that `python -m
inferix_kernels tune` wrote on one, configs/nvidia_h200.json, goes before it. Nothing is tuned when an op is called.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from .._dispatch import Unsupported
from .launch import Architecture, architecture

FOLDER = Path(__file__).parent / "configs"
AMD = tuple(sorted(path.stem for path in FOLDER.glob("gfx*.json")))
Config = dict[str, int]
_trials: dict[tuple[str, str], Config] = {}  # what the tuner tries, before the table


def config(op: str, shape: str, device: torch.device) -> Config:
    """The entry of this op and class of shapes; where it has none, the op's "any"."""
    if (op, shape) in _trials:
        return _trials[op, shape]
    entries = _table(device, architecture(device))[op]
    return entries.get(shape) or entries["any"]


def rows_and_warps(op: str, cols: int, device: torch.device) -> tuple[int, int]:
    """For a kernel whose programs hold whole rows of so many numbers, a power of two: rows of a program, and warps."""
    entry = config(op, "any", device)
    rows = max(1, entry["numbers"] // cols)
    return rows, warps_of(rows * cols, entry)


def warps_of(numbers: int, entry: Config) -> int:
    return min(16, max(1, numbers // (32 * entry["numbers_per_thread"])))


@contextlib.contextmanager
def trial(op: str, shape: str, entry: Config) -> Iterator[None]:
    _trials[op, shape] = entry
    try:
        yield
    finally:
        del _trials[op, shape]


def file_of(device: torch.device) -> Path:
    """The file of this very device, or of its architecture."""
    if device.type == "cuda":
        own = own_file(device)
        if own.exists():
            return own
    target = architecture(device) or 89  # the interpreter's: the first with e4m3
    if isinstance(target, str):
        if not (FOLDER / f"{target}.json").exists():
            raise Unsupported(f"Triton kernels have no tiles for {target}: those of AMD are for {', '.join(AMD)}")
        return FOLDER / f"{target}.json"
    target = 89 if target == 86 else target  # an sm_86 has as little shared memory, and asks for no row of e4m3
    shipped = sorted(int(path.stem.removeprefix("sm_")) for path in FOLDER.glob("sm_*.json"))
    if target < shipped[0]:
        raise Unsupported(f"Triton kernels need sm_{shipped[0]} or later, this is sm_{target}")
    return FOLDER / f"sm_{max(x for x in shipped if x <= target)}.json"


def own_file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device)
    return FOLDER / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.json"


def write(file: Path, table: dict[str, dict[str, Config]]) -> None:
    """One line for each class of shapes, so that a change is one line of a diff."""
    ops = []
    for op, entries in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(shape)}: {json.dumps(entry)}" for shape, entry in entries.items())
        ops.append(f"  {json.dumps(op)}: {{\n{lines}\n  }}")
    file.write_text("{\n" + ",\n".join(ops) + "\n}\n")
    _table.cache_clear()


@cache
def _table(device: torch.device, target: Architecture | None) -> dict[str, dict[str, Config]]:
    table: dict[str, dict[str, Config]] = json.loads(file_of(device).read_text())
    return table
