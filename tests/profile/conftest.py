"""No test leaves a recording or a hook behind."""

import pytest

from inferix_kernels import profile


@pytest.fixture(autouse=True)
def alone():
    assert profile.recording() is None and not profile._hooks
    yield
    profile.stop()
    profile._hooks.clear()


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now, self.read = 100.0, 0

    def __call__(self):
        self.read += 1
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "clock", clock)
    return clock
