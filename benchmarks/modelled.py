"""`python -m benchmarks.modelled`: what a block of Self Forcing takes on an H100, added up. Nothing here is measured.

A block at its full window, 480 x 832, without the VAE: in each layer the noisy passes of all its steps, and one clean
pass. Of every pass:

- attention: its multiply-adds at the rate that `inferix_kernels.estimate` gives kernels of so many instructions, from
  the worst to the best of the public kernels; the past and the block's own pages each at their own;
- products: those of the linear layers, and attention to the prompt, at a share of the data sheet's rate;
- between them: the bytes that norms, GELU, prologue and commit read and write, at a share of the memory's bandwidth;
- launches: the time from the end of one kernel to the beginning of the next, for each.

Instructions and launches are counted here, Triton's kernels being compiled for it, unless they are given: so a block
can be added up for kernels of another time. Shares and the time of a launch are assumptions, and options.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from inferix.models.linears import eight_bit_names
from inferix.models.wan import ADAPTERS
from inferix_kernels import KVPages, estimate
from inferix_kernels.quantize import quantize_linears

from .launches import of_a_layer
from .wan_block import SIZES, random_network

CONFIG, ADAPTER = SIZES["1.3B"], ADAPTERS["self-forcing"]
FRAME = 30 * 52  # tokens at 480 x 832
BANDWIDTH = 3.35e12  # bytes a second: NVIDIA H100 Tensor Core GPU data sheet, SXM
HEAD = CONFIG.dim // CONFIG.heads
TERAFLOP, BF16 = 1e12, 2


class Part(NamedTuple):
    """Of a block: milliseconds at least and at most, and what they follow from."""

    name: str
    least: float
    most: float
    why: str


@dataclasses.dataclass(frozen=True)
class Assumed:
    """
    Attributes:
        past, own: instructions of a warp for 16 queries and 64 keys, over pages of the past and over the block's own.
        eight_bit: are the products with the past in 8 bits?
        noisy, clean: launches of a layer.
        linear_8bit: are the linear layers in 8 bits?
        product_share: of the data sheet's rate, that products reach; memory_share: of the bandwidth.
        launch_us: between two kernels of a graph.
        steps: noisy passes; None: as many as the model takes.
    """

    past: float
    own: float
    noisy: float
    clean: float
    eight_bit: bool = False
    linear_8bit: bool = False
    product_share: float = 0.65
    memory_share: float = 0.8
    launch_us: float = 1.0
    kv: str = "int8"
    steps: int | None = None

    @property
    def passes(self) -> int:
        """Of a block: noisy ones and the clean one."""
        return 1 + (len(ADAPTER.steps(first=False)) if self.steps is None else self.steps)


def attention_rate(instructions: float, eight_bit: bool = False) -> tuple[float, float]:
    """TFLOP/s of attention kernels, as public ones go: from the worst of them to the best.

    Example:
        >>> low, high = attention_rate(198)
        >>> round(low), round(high)
        (514, 659)
    """
    gpu, macs = estimate.GPUS[90], 2 * estimate.ROWS * estimate.KEYS * HEAD
    cycles = estimate.Cycles(macs / (gpu.macs * (2 if eight_bit else 1)), instructions, 0, 0)
    return estimate.Estimate("", "", gpu, cycles, macs, HEAD).expected


def parts(assumed: Assumed) -> list[Part]:
    """A block's, in all layers and passes."""
    assert ADAPTER.window is not None
    block, window = ADAPTER.block_frames * FRAME, ADAPTER.window * FRAME
    times = CONFIG.layers * assumed.passes
    found = []
    for name, keys, instructions, eight in (
        ("attention to the past", window - block, assumed.past, assumed.eight_bit),
        ("attention to itself", block, assumed.own, False),
    ):
        work = 4 * block * keys * CONFIG.dim * times / TERAFLOP
        low, high = attention_rate(instructions, eight)
        why = f"{work:.1f} TFLOP at {low:.0f} to {high:.0f} TFLOP/s: {instructions:.0f} instructions per 64 keys"
        found.append(Part(name, 1e3 * work / high, 1e3 * work / low, why))
    rate = peak() * assumed.product_share * (2 if assumed.linear_8bit else 1)
    work = 2 * block * CONFIG.dim * (6 * CONFIG.dim + 2 * CONFIG.ffn) * times / TERAFLOP
    found.append(_sure("linear layers", work / rate, f"{work:.1f} TFLOP at {rate:.0f} TFLOP/s"))
    work, rate = 4 * block * CONFIG.text_len * CONFIG.dim * times / TERAFLOP, peak() * assumed.product_share
    found.append(_sure("attention to the prompt", work / rate, f"{work:.1f} TFLOP at {rate:.0f} TFLOP/s"))
    moved = (assumed.passes * between(block) + committed(block, assumed.kv)) * CONFIG.layers
    rate = BANDWIDTH * assumed.memory_share
    found.append(_sure("between products", moved / rate, f"{moved / 1e9:.1f} GB at {rate / 1e12:.2f} TB/s"))
    launches = CONFIG.layers * ((assumed.passes - 1) * assumed.noisy + assumed.clean)
    why = f"{launches:.0f} at {assumed.launch_us:g} us: {assumed.noisy:g} and {assumed.clean:g} a layer"
    return [*found, _sure("launches", launches * assumed.launch_us / 1e6, why)]


def _sure(name: str, seconds: float, why: str) -> Part:
    return Part(name, 1e3 * seconds, 1e3 * seconds, why)


def peak() -> float:
    """TFLOP/s of 16-bit products."""
    gpu = estimate.GPUS[90]
    return 2e-3 * gpu.macs * estimate.QUARTERS * gpu.multiprocessors * gpu.clock


def between(tokens: int) -> int:
    """Bytes that a pass moves in a layer besides products and attention: what is read once and written once."""
    rows = tokens * CONFIG.dim * BF16
    norms = 3 * 4 * rows + 2 * rows  # gate and residual in, sum and norm out; and the query of cross-attention
    return norms + 2 * tokens * CONFIG.ffn * BF16 + 2 * 3 * rows  # GELU; q, k and v through the prologue


def committed(tokens: int, kv: str) -> int:
    """Bytes that the clean pass moves in a layer to write pages of this format from scratch."""
    page = KVPages.empty(kv, 1, CONFIG.heads, 64, HEAD)
    return 2 * tokens * CONFIG.dim * BF16 + tokens * page.nbytes // page.page_size


def counted(kv: str) -> tuple[float, float]:
    """Instructions per 64 keys of Triton's kernels over pages of this format, and of bfloat16."""
    found = {}
    for format in (kv, "bf16"):
        of = estimate.of_triton([90], [f"paged_attention {format} bfloat16 q, D {HEAD}"])
        loops = [x.instructions_per_keys for x in of if x.what == f"bfloat16 q, D {HEAD}"]
        found[format] = float(loops[0] or 0)
    return found[kv], found["bf16"]


def launches_of(linear_8bit: bool, kv: str, backend: str) -> tuple[int, int]:
    """Of a layer, noisy and clean pass: of a network of the published width."""
    network = random_network(dataclasses.replace(CONFIG, layers=3), torch.bfloat16)
    if linear_8bit:
        quantize_linears(network, torch.int8, names=eight_bit_names(network))
    found = of_a_layer(network, kv, backend)
    return len(found["noisy pass"]), len(found["clean pass"])


def table(assumed: Assumed) -> Iterator[str]:
    """As markdown; every number is modelled."""
    made = parts(assumed)
    yield "| of a block, H100 SXM, modelled | ms at least | at most | |"
    yield "| --- | --- | --- | --- |"
    for part in [*made, Part("all", sum(x.least for x in made), sum(x.most for x in made), "")]:
        yield f"| {part.name} | {part.least:.1f} | {part.most:.1f} | {part.why} |"


def assumed_of(arguments: Sequence[str] | None = None) -> Assumed:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelled", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--kv", default="int8", help="format of the past")
    add("--instructions", type=float, nargs=2, metavar=("PAST", "OWN"),
        help="of attention, for 16 queries and 64 keys; counted in Triton's kernels if they are not given")  # fmt: skip
    add("--eight-bit", action="store_true", help="products with the past are in 8 bits")
    add("--launches", type=float, nargs=2, metavar=("NOISY", "CLEAN"), help="of a layer; counted if they are not given")
    add("--backend", choices=["triton", "compiled"], default="triton", help="whose launches are counted")
    add("--linear-8bit", action="store_true", help="linear layers are in 8 bits")
    add("--product-share", type=float, default=0.65, help="of the data sheet's rate")
    add("--memory-share", type=float, default=0.8, help="of the data sheet's bandwidth")
    add("--launch-us", type=float, default=1.0, help="from kernel to kernel")
    args = parser.parse_args(arguments)
    past, own = args.instructions or counted(args.kv)
    noisy, clean = args.launches or launches_of(args.linear_8bit, args.kv, args.backend)
    given = {name: getattr(args, name) for name in ("eight_bit", "linear_8bit", "product_share", "memory_share",
                                                    "launch_us", "kv")}  # fmt: skip
    return Assumed(past, own, noisy, clean, **given)


def main() -> None:
    print(*table(assumed_of()), sep="\n")


if __name__ == "__main__":
    main()
