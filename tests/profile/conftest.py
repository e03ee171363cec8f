"""No test leaves a recording or a hook behind."""

import pytest

import inferix.profile
from inferix_kernels import _recording, _ring, profile


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
    """With the extension's spans and rings, and with Python's."""
    if request.param == "compiled":
        assert profile._fast is profile.span is inferix.profile.span
        return
    monkeypatch.setattr(_recording, "Ring", _ring.Ring)
    monkeypatch.setattr(profile, "_fast", None)
    for package in (profile, inferix.profile):
        monkeypatch.setattr(package, "span", package.span.__wrapped__)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profile, "clock", clock)
    if profile._fast is not None:
        monkeypatch.setattr(profile._fast, "clock", clock)
    return clock
