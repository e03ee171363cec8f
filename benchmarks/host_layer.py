"""The Python of one layer of Wan 1.3B, with products and kernels that do nothing: what `host` times.

A `Layer` is the network's own code (WanBlock.forward and all that it calls) over plain objects. What torch.nn does when
a submodule or a weight is looked up, or a layer called, is torch's, and left out; `modules=True` leaves it in. Torch's
products, its attention to the prompt and GELU give a tensor that is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.models.wan.network import CrossCache, WanBlock
from inferix_kernels import KVStore, PassBuffers, Policy, _dispatch, _library, reference
from inferix_kernels.proofs import stored
from inferix_kernels.quantize import Residual, fused
from inferix_kernels.store import Pass

from .wan_block import SIZES

CONFIG = dataclasses.replace(SIZES["1.3B"], ffn=64)  # its wide layer gives no numbers
LAYERS, HEADS, WIDTH, TOKENS, WORDS = CONFIG.layers, CONFIG.heads, CONFIG.dim // CONFIG.heads, 8, 8
TARGET, GPU = 90, torch.device("cuda:0")
Forward = Callable[[int], object]  # of a layer by its number


class Given(nn.Module):
    """A layer that computes nothing."""

    def __init__(self, given: Tensor):
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def plain(module: nn.Module) -> Any:
    """The same code and attributes as an object that is no nn.Module."""
    if isinstance(module, Given):
        given = module.given
        return lambda x: given
    kind = type(module)
    own = {name: value for each in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)])
           for name, value in vars(each).items() if not name.startswith("__")}  # fmt: skip
    children = {name: plain(child) for name, child in module.named_children()}
    made = type(kind.__name__, (), {**own, "__call__": kind.forward, "__iter__": lambda _: iter(children.values())})()
    made.__dict__ |= {**vars(module), **module._parameters, **children}
    return made


class Layer:
    """One layer over a pass of `frames` frames.

    Attributes:
        forward: of the layer with a number.
        attend: its attention alone.
        norms: its four `Residual.before`, each with the arguments that the layer gives it.
    """

    def __init__(self, planned: Pass, frames: int, modules: bool = False):
        block, tokens = WanBlock(CONFIG).bfloat16(), (frames, TOKENS)
        for parent in (block.self_attn, block.cross_attn, block.ffn):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, Given(torch.zeros(*tokens, layer.out_features, dtype=torch.bfloat16)))
        k = torch.zeros(1, HEADS, WORDS, WIDTH, dtype=torch.bfloat16)
        segments = [(slice(0, frames * TOKENS), CrossCache([(k, k)] * LAYERS))]
        modulation = torch.zeros(6, frames, 1, CONFIG.dim).unbind()
        x = torch.zeros(*tokens, CONFIG.dim, dtype=torch.bfloat16)
        stream = Residual(x, x.clone(), modulation[5])  # with what the layer before leaves to be added
        run = block if modules else plain(block)
        self.forward: Forward = lambda layer: run(layer, stream, modulation, segments, planned.attend)
        qkv, norm = torch.zeros(frames * TOKENS, 3 * CONFIG.dim, dtype=torch.bfloat16), block.self_attn.norm_q.weight
        self.attend: Forward = lambda layer: planned.attend(layer, qkv, norm, norm, CONFIG.eps)
        self.norms = self._norms()

    def _norms(self) -> Sequence[Forward]:
        found, before = list[Forward](), Residual.before

        def noted(self: Residual, *args: Any, **kwargs: Any) -> Any:
            found.append(lambda layer: before(self, *args, **kwargs))
            return before(self, *args, **kwargs)

        with mock.patch.object(Residual, "before", noted):
            self.forward(0)
        return found


def metrics_of(rounds: int, backend: str) -> dict[str, float]:
    """Microseconds of a layer, the least of some rounds, and what they are made of."""
    found = {}
    with torch.inference_mode():
        for what, planned, frames in passes(backend):
            with torch_gives(frames):
                layer = Layer(planned, frames)
                found[f"{what} us"] = least(layer.forward, rounds)
                if what == "noisy":
                    found["its attention us"] = least(layer.attend, rounds)
                    found["its norms us"] = sum(least(norm, rounds) for norm in layer.norms)
                    found["with torch.nn us"] = least(Layer(planned, frames, modules=True).forward, rounds)
    return found


def least(forward: Forward, rounds: int) -> float:
    """Microseconds of process time for one layer, on average over all."""

    def seconds() -> float:
        started = time.process_time()
        for layer in range(LAYERS):
            forward(layer)
        return time.process_time() - started

    return 1e6 * min(seconds() for _ in range(rounds)) / LAYERS


def passes(backend: str) -> Iterator[tuple[str, Pass, int]]:
    """One over a block, and one over a clean block and a noisy one."""
    store = KVStore(
        layers=LAYERS,
        heads=HEADS,
        head_dim=WIDTH,
        frame_tokens=TOKENS,
        block_frames=3,
        pools={"int8": 9},
        scratch_format="bf16",
        page_size=8,
        backend=backend,
    )
    table, buffers = store.open(Policy(window=9)), PassBuffers()
    table.state = table.state._replace(k_means=tuple(torch.zeros(HEADS, WIDTH) for _ in range(LAYERS)))
    first, second = (table.open_block(3) for _ in range(2))
    yield "noisy", table.plan([first], rope(3), buffers=buffers), 3
    yield "fused", table.plan([first, second], rope(6), commit=first, buffers=buffers), 6


def rope(frames: int) -> Tensor:
    return torch.zeros(frames * TOKENS, WIDTH // 2, 2)


@contextlib.contextmanager
def torch_gives(frames: int) -> Iterator[None]:
    """Inside, torch's attention and GELU give what is there. GELU is torch's, as on a GPU."""
    attended = torch.zeros(1, frames * TOKENS, HEADS, WIDTH, dtype=torch.bfloat16).transpose(1, 2)
    with (
        mock.patch.object(F, "scaled_dot_product_attention", lambda *_: attended),
        mock.patch.object(fused, "_activated", lambda y, _: y),
    ):
        yield


@contextlib.contextmanager
def backend(contender: str) -> Iterator[str]:
    """A backend whose kernels do nothing, by its name; "auto" takes it too, and finds it as on a GPU without proofs."""
    candidates, on_cuda = _dispatch.candidates, {torch.device("cpu"): "cuda", GPU: "cuda"}.__getitem__

    def on_a_gpu(op: str, device: torch.device, *rest: Any) -> Any:
        return candidates(op, GPU, *rest)

    def unchecked(*args: object, **kwargs: object) -> None:
        """On a GPU nobody looks at a list's numbers."""

    with contextlib.ExitStack() as stack:
        stored.forget()
        stack.callback(stored.forget)  # once all is as it was
        for each in (
            mock.patch.dict(_dispatch.BACKENDS, {"null": f"{__package__}.null_backend"}),
            mock.patch.dict(_dispatch.AUTO, {"cuda": (contender,)}),
            mock.patch.object(_dispatch, "PROVED", (contender,)),
            mock.patch.object(_dispatch, "candidates", on_a_gpu),
            mock.patch.object(_dispatch, "type_of", on_cuda),
            mock.patch.object(_library, "type_of", on_cuda),
            mock.patch.object(stored, "of_device", lambda device: None),
            mock.patch.multiple(reference, check_plan=unchecked, spans=unchecked),
        ):
            stack.enter_context(each)
        if contender == "triton":
            from inferix_kernels.triton_kernels.launch import launch_nothing

            stack.enter_context(launch_nothing(TARGET))
        yield contender
