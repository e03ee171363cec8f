"""A plugin of pytest, `-p benchmarks.sample_tests --every 20`: runs every 20th of the tests chosen."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run every n-th test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items[:: config.getoption("--every")]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % config.getoption("--every")])
    items[:] = kept
