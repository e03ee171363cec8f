"""The harness: right before fast, and honest about it."""

import pytest
import torch

from benchmarks import families
from benchmarks.harness.case import Case, Contender, Limit, Prepared
from benchmarks.harness.measure import Machine, Settings, measure_case

MACHINE = Machine(torch.device("cpu"), small=True)
QUICK = Settings(rounds=2, seconds=1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_right_and_timed(family):
    rows = [row for rows in families.run([family], ["smoke"], QUICK, MACHINE) for row in rows]
    assert {row.status for row in rows} <= {"ok", "absent"}, [row for row in rows if row.status != "ok"]
    assert all(row.seconds or row.metrics for row in rows if row.status == "ok")


def test_a_wrong_kernel_is_shown_as_failing_and_not_timed():
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    calls = []

    def one_row_wrong():
        calls.append("wrong")
        out = x * 2
        out[500] = 0
        return out

    def contender(name, call):
        return Contender(name, "bf16", lambda inputs: Prepared(call), 0.0, x.nbytes, Limit.of(6e-3))

    contenders = [contender("ours-right", lambda: x * 2), contender("ours-wrong", one_row_wrong)]
    case = Case("family", "op", "shape", lambda device: x, lambda x: x * 2, contenders)
    right, wrong, *peaks = measure_case(case, QUICK, MACHINE)
    assert right.status == "ok" and len(right.seconds) == 2
    assert wrong.status == "wrong" and not wrong.seconds and "worst row" in wrong.note
    assert len(calls) == 2  # one call to compile, one to check
    assert all(peak.peak and len(peak.seconds) == 2 for peak in peaks)
