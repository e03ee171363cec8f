"""`python -m benchmarks.wan_block`: a full-size Wan with random weights makes a block, and says where the time went.

The architecture is the published one, the picture small, so that it runs on a CPU: by default 1.3B at 128 x 224, which
holds 5.7 GB of float32 weights and half as much in bf16. Each block is made with its clean pass; the first has no past.
Several dtypes take turns, block by block; int8 and fp8 are a bf16 network with 8-bit layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time
from collections import defaultdict
from typing import Any

import torch

from inferix.decode.sequential import SequentialDecoder
from inferix.models.linears import CODES, eight_bit_names, weight_bytes
from inferix.models.wan import ADAPTERS, Wan, WanConfig, WanNetwork
from inferix_kernels import KVStore, Policy
from inferix_kernels.quantize import quantize_linears

SIZES = {
    "1.3B": WanConfig(dim=1536, layers=30, heads=12, ffn=8960),
    "14B": WanConfig(dim=5120, layers=40, heads=40, ffn=13824),
}
PARTS = ("qkv", "o", "cross_attn", "ffn")


def random_network(config: WanConfig, dtype: torch.dtype, device: str = "cpu") -> WanNetwork:
    """Random weights of a trained one's size: matrices keep the size of what goes through them.

    All are cut from one tape of a million numbers: drawing 1.4 billion takes longer than a forward.
    """
    with torch.device("meta"):
        network = WanNetwork(config)
    tape = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(device)  # prime: no two rows are alike
    network = network.to(dtype).to_empty(device=device)
    for name, x in network.named_parameters():
        matrix = x.ndim > 1 and "modulation" not in name
        for part in x.data.view(-1).split(len(tape)):
            part.copy_(tape[: len(part)]).mul_(x[0].numel() ** -0.5 if matrix else 0.02)
        if "norm" in name and name.endswith("weight"):
            x.data += 1
    return network


class Clock:
    """Seconds spent inside modules and calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.started: dict[str, float] = {}

    def watch(self, name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.started.update({name: time.perf_counter()}))
        module.register_forward_hook(lambda *_: self.stop(name))

    def stop(self, name: str) -> None:
        self.seconds[name] += time.perf_counter() - self.started[name]

    def around(self, name: str, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            self.started[name] = time.perf_counter()
            out = call(*args)
            self.stop(name)
            return out

        return timed


def peak() -> float:
    """GiB of this process's memory, at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Run:
    """One network, block by block.

    Args:
        kind: "fp32" or "bf16", or what the inner linear layers of a bf16 network are in.
    """

    def __init__(self, kind: str, config: WanConfig, size: tuple[int, int], kv: str):
        started = time.perf_counter()
        network = random_network(config, torch.float32 if kind == "fp32" else torch.bfloat16)
        if kind in CODES:
            quantize_linears(network, CODES[kind], names=eight_bit_names(network))
        self.kind, self.clock = kind, Clock()
        self.seconds: list[float] = []
        self.adapter = dataclasses.replace(ADAPTERS["self-forcing"], size=size, fused=False)
        model: Any = Wan(network, self.adapter)
        self.frame_tokens = model.frame_tokens
        built = time.perf_counter() - started
        print(f"{kind}: {weight_bytes(network) / 2**30:.2f} GiB of weights, built in {built:.0f} s: {peak():.1f} GiB")
        for block in network.blocks:
            for part in PARTS:
                holder = block.self_attn if part in ("qkv", "o") else block
                self.clock.watch(part, getattr(holder, part))
        predict = model.predict
        model.predict = lambda inputs, attend: predict(inputs, self.clock.around("attend", attend))
        sizes = {name: getattr(model, name) for name in ("layers", "heads", "head_dim", "frame_tokens")}
        store = KVStore(**sizes, block_frames=3, pools={kv: 6})
        self.decoder = SequentialDecoder(model, store.open(Policy(window=6)), torch.Generator().manual_seed(0))
        self.conditioning = network.cross_cache(torch.randn(40, config.text_dim))

    def block(self, number: int) -> None:
        self.clock.seconds.clear()
        started = time.perf_counter()
        latents = self.decoder.step(self.conditioning)
        self.decoder.commit_pending()
        total = time.perf_counter() - started
        assert torch.isfinite(latents).all()
        self.seconds.append(total)
        split = " · ".join(f"{part} {seconds / total:.0%}" for part, seconds in self.clock.seconds.items())
        rest = 1 - sum(self.clock.seconds.values()) / total
        passes = f"{len(self.adapter.times)} steps and a clean pass"
        print(f"{self.kind}, block {number}: {total:.2f} s for {passes}: {split} · rest {rest:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wan_block", description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="1.3B")
    parser.add_argument("--layers", type=int, help="fewer than the model has: they are all alike")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16", *CODES], default=["fp32"], nargs="+")
    args = parser.parse_args()
    config = dataclasses.replace(SIZES[args.model], layers=args.layers or SIZES[args.model].layers)
    runs = [Run(kind, config, (args.height, args.width), args.kv) for kind in args.dtype]
    for number in range(args.blocks):
        for run in runs:
            run.block(number)
    first = runs[0]
    for run in runs[1:]:
        ratio = statistics.median(a / b for a, b in zip(first.seconds, run.seconds))
        print(f"{first.kind} / {run.kind}: median {ratio:.2f} of {args.blocks} blocks")
    print(f"{3 * first.frame_tokens} tokens a block, {torch.get_num_threads()} threads, peak memory {peak():.1f} GiB")


if __name__ == "__main__":
    main()
