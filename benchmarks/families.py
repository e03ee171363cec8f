"""The families of benchmarks, by name; a family is a module of this package.

A family of ops has `cases(shape, device) -> Iterator[Case]`; one that measures something else has
`run(settings, shapes) -> Iterator[Row]` and puts its numbers into the rows' `metrics`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType

from .harness.case import Case
from .harness.measure import Machine, Settings, measure_case
from .harness.rows import Row
from .shapes import Shape, find_shape

FAMILIES = (
    *("attention", "kv_pages", "qkv", "linear"),
    *("arrivals", "parallel", "block", "e2e", "page_table", "host", "formats", "stream", "diffusers", "profiler"),
)


def family(name: str) -> ModuleType:
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return importlib.import_module(f".{name}", __package__)


def shape_for(name: str, shape: str) -> Shape:
    """A shape that the family can have.

    Raises:
        ValueError: no such family or shape, or one of linear layers for another family.
    """
    family(name)
    found = find_shape(shape)
    if not found.heads and name != "linear":
        raise ValueError(f"shape {shape} is of linear layers: family must be linear, got {name}")
    return found


def cases(name: str, shapes: Sequence[str], device: str) -> Iterator[Case]:
    """Of a family of ops; of another none."""
    make = getattr(family(name), "cases", None)
    if make is not None:
        for shape in shapes:
            yield from make(shape_for(name, shape), device)


def run(
    names: Sequence[str], shapes: Sequence[str], settings: Settings, machine: Machine, ops: Sequence[str] = ()
) -> Iterator[list[Row]]:
    """Measure families, one case after the other; `ops`: these alone."""
    for name in names:
        for case in cases(name, shapes, settings.device):
            if not ops or case.op in ops:
                yield measure_case(case, settings, machine)
        yield from run_whole([name], shapes, settings)


def run_whole(names: Sequence[str], shapes: Sequence[str], settings: Settings) -> Iterator[list[Row]]:
    """Of these families those that have no cases."""
    for name in names:
        whole = getattr(family(name), "run", None)
        if whole:
            yield list(whole(settings, shapes))
