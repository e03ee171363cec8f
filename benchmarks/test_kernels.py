"""Our kernels as pytest-benchmark tests, for runners that keep its JSON: `pytest benchmarks --benchmark-json F`.

Right first, as everywhere here. Without the plugin (extra `bench`) they are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import families
from .conftest import shapes
from .harness.case import Case, Contender, error_of
from .harness.measure import Machine

pytest.importorskip("pytest_benchmark", reason="pip install 'inferix-kernels[bench]'")


def found(config: pytest.Config) -> Iterator[tuple[Case, Contender]]:
    for family in families.FAMILIES:
        for case in families.cases(family, shapes(config), config.getoption("--device")):
            yield from ((case, contender) for contender in case.contenders if contender.name.startswith("ours"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = list(found(metafunc.config))
    ids = [f"{case.name}-{contender.name}-{contender.format}" for case, contender in pairs]
    metafunc.parametrize("case, contender", pairs, ids=ids)


@pytest.fixture(scope="module")
def machine(pytestconfig: pytest.Config) -> Machine:
    return Machine(torch.device(pytestconfig.getoption("--device")))


def test_kernel(benchmark: Any, machine: Machine, case: Case, contender: Contender) -> None:
    with torch.inference_mode():
        inputs = case.inputs(machine.device)
        prepared = contender.prepare(inputs)
        error = error_of(prepared.read(prepared.run()), (contender.reference or case.reference)(inputs))
        assert error.within(contender.limit)

        def call() -> None:
            prepared.run()
            if machine.device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark.extra_info.update(error=error.relative, flops=contender.flops, nbytes=contender.nbytes)
        benchmark.pedantic(call, setup=machine.flush, rounds=20)
