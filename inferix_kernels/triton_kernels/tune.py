"""Autotuning of tile sizes on a GPU: `python -m inferix_kernels tune` rewrites configs/<device>.json; no op does.

Every candidate, the shipped one included, is measured on the cases that are compiled ahead of time; the one of least
total time is kept. The file is written after each op: a search that is cut short is not lost.
Never run on a GPU: the search is tested with a clock of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from .._dispatch import Unsupported
from . import config
from .config import Config
from .launch import Case, TooMuch

Timer = Callable[[Callable[[], object]], float]

# What may be chosen, op by op. A candidate that the GPU can't take (registers, shared memory) is passed over.
CANDIDATES: dict[str, list[Config]] = {
    "linear": [
        {"m": m, "n": n, "k": k, "tall": 8, "warps": warps, "stages": stages}
        for m, n, k, warps, stages in product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5))
        if m * n <= 128 * 32 * warps  # numbers of a sum that the registers hold
    ],
    "paged_attention": [
        {"m": m, "n": n, "warps": warps, "stages": stages}
        for m, n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    ],
    "latent_attention": [
        {"m": m, "n": n, "part": part, "warps": warps, "stages": stages}
        for m, n, part, warps, stages in product((16, 32, 64, 128), (16, 32, 64), (256, 512), (4, 8), (1, 2))
    ],
    "page_scores": [
        {"queries": q, "pages": p, "warps": w} for q, p, w in product((16, 32, 64), (16, 32, 64, 128), (2, 4, 8))
    ],
    **{
        op: [{"numbers": n, "numbers_per_thread": t} for n, t in product((1024, 2048, 4096, 8192), (4, 8, 16, 32))]
        for op in ("add_norm", "merge_attention", "qkv_prologue", "quantize_rows")
    },
}


def tune(ops: Sequence[str] = ()) -> Path:
    """Measure on this GPU, and write its file: the entries it has so far with what was found better, op by op."""
    if not torch.cuda.is_available():
        raise Unsupported("tune measures on a GPU, and there is none here")
    from .aot import all_cases

    if unknown := set(ops) - set(CANDIDATES):
        raise Unsupported(f"ops must be of {', '.join(CANDIDATES)}, got {', '.join(unknown)}")
    device = torch.device("cuda", torch.cuda.current_device())
    table: dict[str, dict[str, Config]] = json.loads(config.file_of(device).read_text())
    for op in ops or CANDIDATES:
        table[op] |= best(op, [case for case in all_cases(device) if case.op == op], median_ms, table[op])
        config.write(config.own_file(device), table)
    return config.own_file(device)


def best(op: str, cases: Sequence[Case], timer: Timer, table: Mapping[str, Config]) -> dict[str, Config]:
    """class of shapes -> the candidate under which its cases take the least time together.

    The entry that `table` has is a candidate too, and stays unless another is faster. A class of which this GPU can run
    no case is left out.
    """
    found = {}
    for shape in dict.fromkeys(case.shape for case in cases):
        before = table.get(shape) or table["any"]
        calls = [case.call for case in cases if case.shape == shape and _runs(op, shape, before, case.call)]
        if not calls:
            continue
        least = shipped = _total(op, shape, before, calls, timer, math.inf)
        found[shape] = before
        for entry in CANDIDATES[op]:
            if (time := _total(op, shape, entry, calls, timer, least)) < least:
                found[shape], least = entry, time
        print(f"{op}, {shape}: {least:.3g} ms with {found[shape]}, {shipped:.3g} ms before", flush=True)
    return found


def median_ms(call: Callable[[], object]) -> float:
    time: float = triton.testing.do_bench(call, return_mode="median")
    return time


def _runs(op: str, shape: str, entry: Config, call: Callable[[], object]) -> bool:
    """Whether this GPU has what the case asks for, e4m3 products say, in tiles of whatever size."""
    try:
        with config.trial(op, shape, entry):
            call()
    except TooMuch:
        return True
    except Unsupported:
        return False
    return True


def _total(
    op: str, shape: str, entry: Config, calls: Iterable[Callable[[], object]], timer: Timer, bound: float
) -> float:
    """Time of all calls; infinite if one of them can't be compiled so, or once it is more than `bound`."""
    total = 0.0
    with config.trial(op, shape, entry):
        for call in calls:
            try:
                total += timer(call)
            except (TooMuch, TritonError):
                return math.inf
            except RuntimeError as error:
                if "PassManager" not in str(error):  # a compiler's pass that fails on tiles of this size
                    raise
                return math.inf
            if total > bound:
                return math.inf
    return total
