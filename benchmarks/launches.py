"""`python -m benchmarks.launches`: the kernels that one layer of Wan launches on a GPU, counted without one.

A network of the published width makes a block on the CPU while every operation is noted. For torch each operation that
computes or copies counts as one launch, views and allocations as none. Ours count as what their launch functions ask
for: those in Triton are called with the very arguments, but note kernels in place of launching them; those in CUDA are
listed in CUDA. A layer is what lies between the beginnings of two layers in a row.

Not seen: second launches inside a library, such as the sum of a product that cuBLAS splits along K.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inferix.decode.sequential import SequentialDecoder
from inferix.models.linears import CODES, eight_bit_names
from inferix.models.wan import ADAPTERS, Wan, WanNetwork
from inferix_kernels import KVStore, Policy, ops, reference
from inferix_kernels._dispatch import implementation
from inferix_kernels.quantize import fused, quantize_linears
from inferix_kernels.triton_kernels import online
from inferix_kernels.triton_kernels.launch import launch_nothing

from .wan_block import SIZES, random_network

ARCHITECTURE, PROCESSORS = 90, 132  # of an H100 or H200: into how many parts attention splits a list goes by them
# The kernels of each op's CUDA function; those in a list of their own once for each kind of pool. What attention makes
# of a plan is made once for all layers.
CUDA: dict[str, Sequence[str | list[str]]] = {
    "kv_append": ["kv_append_kernel"],
    "kv_commit": ["kv_commit_kernel"],
    "kv_gather": ["kv_gather_kernel"],
    "paged_attention": [["attention_kernel", "merge_partials_kernel"]],
    "qkv_prologue": ["qkv_moments_kernel", "qkv_prologue_kernel"],  # the first for its norms
}
# Operations of torch that launch nothing, beside views.
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


def cuda_kernels(op: str, args: Sequence[Any]) -> list[str]:
    """What the CUDA function of an op launches for these arguments."""
    names = [each for name in CUDA[op] for each in ([name] if isinstance(name, str) else name * len(args[1]))]
    return names[1:] if op == "qkv_prologue" and args[1] is args[2] is None else names


def triton_kernels(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """What the Triton function of an op launches for these arguments."""
    with (
        launch_nothing(ARCHITECTURE) as names,
        mock.patch.object(online, "processors", lambda device: PROCESSORS),
        mock.patch.multiple(reference, spans=mock.DEFAULT, check_plan=mock.DEFAULT),  # which look at numbers on a CPU
    ):
        implementation(op, "triton")(*args, **kwargs)
    return names


def is_launch(operation: Any) -> bool:
    """Does an operation of torch compute or copy?"""
    returned = operation._schema.returns
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returned)
    return not is_view and operation._schema.name.split("::")[1] not in NOTHING


class Launches(TorchDispatchMode):
    """While it is entered, notes what would be launched on a GPU.

    Attributes:
        names: "torch addmm", "add_norm: rows_kernel", ..., in order.
        backend: of ours: "triton", or "compiled" where there is a CUDA kernel, and Triton elsewhere.
    """

    def __init__(self, backend: str = "triton"):
        super().__init__()
        self.backend, self._ours = backend, False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._ours:
            return func(*args, **(kwargs or {}))
        with self:  # one that is made of others, as inference mode hands it over, is counted by its parts
            made = func.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        if is_launch(func):
            self.names.append("torch " + func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))

    def call(self, run: Callable[..., None], op: str, *given: Any, **kwargs: Any) -> None:
        """In place of ops.call: notes an op's launches, and runs it on the CPU."""
        args = given[3:]  # after what was accepted, the backend and the device
        in_cuda = self.backend == "compiled" and op in CUDA
        # What it asks of torch on the way counts too.
        names = cuda_kernels(op, args) if in_cuda else triton_kernels(op, args, kwargs)
        self.names += [f"{op}: {name}" for name in names]
        self._ours = True
        try:
            run(op, *given, **kwargs)
        finally:
            self._ours = False


@contextmanager
def noted(backend: str) -> Iterator[Launches]:
    run, gelu = ops.call, torch.nn.functional.gelu
    with (
        Launches(backend) as launches,
        mock.patch.object(ops, "call", lambda *args, **kwargs: launches.call(run, *args, **kwargs)),
        mock.patch.object(fused, "_activated", lambda y, _: gelu(y)),  # ours on a CPU, torch's on a GPU
    ):
        yield launches


def of_a_layer(network: WanNetwork, kv: str, backend: str, size: tuple[int, int] = (128, 224)) -> dict[str, list[str]]:
    """What the second layer of a network of at least three launches in the second block: "noisy pass", "clean pass"."""
    model: Any = Wan(network, dataclasses.replace(ADAPTERS["self-forcing"], size=size, fused=False))
    sizes = {name: getattr(model, name) for name in ("layers", "heads", "head_dim", "frame_tokens")}
    store = KVStore(**sizes, block_frames=3, pools={kv: 6}, scratch_format="bf16")
    decoder = SequentialDecoder(model, store.open(Policy(window=6)), torch.Generator().manual_seed(0))
    conditioning = network.cross_cache(torch.randn(8, network.config.text_dim))
    decoder.step(conditioning)
    decoder.commit_pending()
    found: dict[str, list[str]] = {}
    with noted(backend) as launches:
        for number, layer in enumerate(network.blocks[1:3]):
            layer.register_forward_pre_hook(lambda *_, number=number: marks.__setitem__(number, len(launches.names)))
        for what, run in ("noisy pass", lambda: decoder.step(conditioning)), ("clean pass", decoder.commit_pending):
            marks: dict[int, int] = {}
            run()
            found[what] = launches.names[marks[0] : marks[1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    add = parser.add_argument
    add("--model", choices=SIZES, default="1.3B")
    add("--linear", choices=["bf16", *CODES], default="bf16")
    add("--kv", default="int8")
    add("--backend", choices=["triton", "compiled"], default="triton")
    args = parser.parse_args()
    network = random_network(dataclasses.replace(SIZES[args.model], layers=3), torch.bfloat16)
    if args.linear in CODES:
        quantize_linears(network, CODES[args.linear], names=eight_bit_names(network))
    for what, names in of_a_layer(network, args.kv, args.backend).items():
        print(f"{what}: {len(names)} launches a layer", *names, sep="\n  ")


if __name__ == "__main__":
    main()
