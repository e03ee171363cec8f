"""A backend that computes with the compiled kernels and tells of each call: what a launch on a GPU would be given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from inferix_kernels import _dispatch, _library, compiled

NAME = "recording"
_listeners: list[Callable[..., None]] = []


def __getattr__(op: str) -> Callable[..., Any]:
    real = getattr(compiled, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        for listen in _listeners:
            listen(op, real, args, kwargs)
        return real(*args, **kwargs)

    return call


@contextlib.contextmanager
def listening(listen: Callable[..., None]) -> Iterator[None]:
    """Inside, `listen(op, function, args, kwargs)` is called before each call."""
    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.remove(listen)


@contextlib.contextmanager
def installed() -> Iterator[str]:
    """Inside, the backend can be asked for by this name, and is what "auto" means."""
    with (
        mock.patch.dict(_dispatch.BACKENDS, {NAME: __name__}),
        mock.patch.dict(_dispatch.AUTO, {"cpu": (NAME,)}),
        mock.patch.object(_library, "runs_compiled", lambda *_: False),
    ):
        yield NAME
