"""No test leaves a recording or a hook behind."""

import pytest

import inferix.profile
from inferix_kernels import _recording, _ring, _spans, profile


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


@pytest.fixture(params=["compiled", "python"])
def spans(request, monkeypatch):
    """With the extension's functions and rings, and with Python's."""
    names = ("span", "timed", "count", "metric")
    if request.param == "compiled":
        for name in names:
            assert type(getattr(profile, name)) is _spans.Function and getattr(profile, name).__wrapped__
            assert getattr(profile, name) is getattr(inferix.profile, name)
        return
    monkeypatch.setattr(_recording, "Ring", _ring.Ring)
    monkeypatch.setattr(profile, "_fast", None)
    for package in (profile, inferix.profile):
        for name in names:
            monkeypatch.setattr(package, name, getattr(package, name).__wrapped__)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "clock", clock)
    if profile._fast is not None:
        monkeypatch.setattr(profile._fast, "clock", clock)
    return clock
