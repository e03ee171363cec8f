"""Forwards of a network that are launched once and replayed: CUDA graphs, without a line of Python for each kernel.

A graph holds addresses. So what a forward reads lies where the forward that was captured read it: page lists, rope and
mean keys in the branch's `PassBuffers`; latents, timesteps and conditionings in copies that are made here. A graph
belongs to one *kind* of forward: blocks of these sizes, a page list that is as long once it is rounded up to whole
blocks, conditionings of these shapes. The first forward of a kind runs as it is, which compiles and loads all that it
launches; the second is captured; it and those after it are replays. Nothing is replayed for another kind: it has a
graph of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inferix_kernels import Pass, profile

from ..trees import parts_of, rebuilt
from .contract import BlockInput, Model

Predictions = Sequence[Tensor]


class Recorder(Protocol):
    """Records what is launched, and launches it again."""

    def stream(self) -> Any:
        """Where the current thread launches now."""

    def wait_for(self, stream: Any) -> None:
        """What is launched from now on comes after what was launched there."""

    def record(self, make: Callable[[], Predictions]) -> tuple[Predictions, Callable[[], None]]:
        """(what `make` returns, a function that computes it anew, at the same addresses). Of the two only the second
        has to compute it."""


class CudaRecorder:
    """torch.cuda.CUDAGraph, on one device. Graphs share their memory, as one runs at a time. Never run on a GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        self.stream().wait_stream(stream)

    def record(self, make: Callable[[], Predictions]) -> tuple[Predictions, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy and decode pictures meanwhile: only this one's mistakes end the capture.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            made = make()
        self._pool = graph.pool() if self._pool is None else self._pool
        return made, graph.replay


@dataclasses.dataclass
class Captured:
    """A forward that was captured.

    Attributes:
        given: latents and timesteps of its inputs, to write to.
        predicted: what it predicts, overwritten by the next replay of any graph.
    """

    given: list[tuple[Tensor, Tensor]]
    predicted: Predictions
    replay: Callable[[], None]


class Conditionings:
    """Copies of conditionings, at addresses that stay."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[Any, Any, list[Tensor]]] = {}  # (whose numbers they are, copy, its tensors)

    def of(self, conditionings: Sequence[Any]) -> tuple[list[Any], Hashable]:
        """Copies that hold what these hold, one for all places of the same one; and what a forward that was captured
        with them depends on besides."""
        copies: dict[int, Any] = {}
        forms: list[Hashable] = []
        for each in conditionings:
            if id(each) not in copies:
                form, tensors = parts_of(each)
                copies[id(each)] = self._copied((len(copies), form), each, tensors)
                forms.append(form)
        places = [list(copies).index(id(each)) for each in conditionings]
        return [copies[id(each)] for each in conditionings], (*forms, *places)

    def _copied(self, key: Hashable, conditioning: Any, tensors: Sequence[Tensor]) -> Any:
        if key not in self._held:
            made = [x.clone() for x in tensors]
            self._held[key] = conditioning, rebuilt(conditioning, iter(made)), made
        source, copied, made = self._held[key]
        if source is not conditioning:
            for x, new in zip(made, tensors):
                x.copy_(new)
            self._held[key] = conditioning, copied, made
        return copied


class Graphs:
    """The forwards of one branch, replayed. Not for two threads at once.

    Args:
        model: with a network, whose weights are looked at: a graph holds their addresses.

    Raises:
        ValueError: the model has no network.
    """

    def __init__(self, model: Model, recorder: Recorder):
        if model.network is None:
            raise ValueError(
                f"graphs must be False for {model.adapter.name}: it has no network whose weights are known"
            )
        self._model, self._recorder = model, recorder
        self._weights = addresses(model.network)
        self._stream: Any = None
        self._forget()

    def begin_block(self) -> None:
        """Look whether the weights still lie where they lay: others, or the same elsewhere, are captured anew."""
        assert self._model.network is not None
        if (weights := addresses(self._model.network)) != self._weights:
            self._weights = weights
            self._forget()

    def predict(self, inputs: Sequence[BlockInput], planned: Pass) -> Predictions:
        """What `model.predict(inputs, planned.attend)` returns.

        Raises:
            RuntimeError: the pass is stale.
        """
        with planned.turn:  # a replay has the store's scratch to itself from its first layer to its last
            self.follow_stream()
            kind = planned.prepare()
            if kind is None:
                return self._model.predict(inputs, planned.attend)
            conditionings, forms = self._conditionings.of([block.conditioning for block in inputs])
            kind = kind, forms, tuple((*block.x.shape, block.t.ndim, block.x.dtype, block.predict) for block in inputs)
            if kind not in self._captured:
                if kind not in self._met:
                    self._met.add(kind)
                    return self._model.predict(inputs, planned.attend)
                self._captured[kind] = self._capture(inputs, conditionings, planned)
            else:
                planned.count()
            return self._replayed(self._captured[kind], inputs)

    def _capture(self, inputs: Sequence[BlockInput], conditionings: Sequence[Any], planned: Pass) -> Captured:
        given = [(block.x.clone(), block.t.clone()) for block in inputs]
        static = [
            dataclasses.replace(block, x=x, t=t, conditioning=conditioning)
            for block, (x, t), conditioning in zip(inputs, given, conditionings)
        ]
        predicted, replay = self._recorder.record(lambda: self._model.predict(static, planned.attend))
        return Captured(given, predicted, replay)

    @profile.profiled("graph")
    def _replayed(self, captured: Captured, inputs: Sequence[BlockInput]) -> Predictions:
        for (x, t), block in zip(captured.given, inputs):
            x.copy_(block.x)
            t.copy_(block.t)
        captured.replay()
        return [x.clone() for x in captured.predicted]

    def follow_stream(self) -> None:
        """The memory of the last forward is written again: on another stream, once that one is done with it."""
        stream = self._recorder.stream()
        if self._stream is not None and stream != self._stream:
            self._recorder.wait_for(self._stream)
        self._stream = stream

    def _forget(self) -> None:
        self._captured: dict[Hashable, Captured] = {}
        self._met: set[Hashable] = set()
        self._conditionings = Conditionings()


def addresses(network: torch.nn.Module) -> list[int]:
    """Of all weights and buffers."""
    return [x.data_ptr() for held in (network.parameters(), network.buffers()) for x in held]
