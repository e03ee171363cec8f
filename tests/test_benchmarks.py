"""The benchmark's contenders compute the same thing, and its clock ticks."""

import pytest

from benchmarks.attention import SHAPES, Shape, contenders
from benchmarks.timing import measure

SMALL = [Shape("grouped, ragged", 33, 150, 6, 2, 64), SHAPES[0]]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_every_contender_is_right(shape):
    calls = contenders(shape)
    exact = calls["torch SDPA, fp32"][0]().float()
    for name, (call, tolerance) in calls.items():
        out = call().float()
        assert out.shape == exact.shape
        assert (out - exact).norm() <= tolerance * exact.norm(), name


def test_contenders_take_turns_and_warm_up_once():
    order = []
    times = measure([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 4
    assert [len(seconds) for seconds in times] == [3, 3] and all(t >= 0 for seconds in times for t in seconds)
