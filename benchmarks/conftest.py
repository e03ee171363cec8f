"""Options of `pytest benchmarks`: the same cases as pytest-benchmark tests."""

from __future__ import annotations

import pytest

from .__main__ import default_device, names
from .shapes import DEFAULT


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inferix benchmarks")
    group.addoption("--device", choices=["cpu", "cuda"], default=default_device())
    group.addoption("--shapes", type=names, default=(), help="names or numbers, as for `python -m benchmarks run`")


def shapes(config: pytest.Config) -> tuple[str, ...]:
    return config.getoption("--shapes") or DEFAULT[config.getoption("--device")]
