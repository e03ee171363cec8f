"""Links, devices and models by name: figures that the planner takes for what is not here to be measured.

Each says where it is from. None was measured by this project.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple


def check_figure(name: str, figure: float, zero: bool = False) -> None:
    """A rate, a time or a size: finite and positive, or 0 where that means something."""
    number = isinstance(figure, (int, float)) and not isinstance(figure, bool)
    if not (number and math.isfinite(figure) and (figure > 0 or (zero and figure == 0))):
        raise ValueError(f"{name} must be a finite number {'not below' if zero else 'above'} 0, got {figure!r}")


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the ranks, as one of them sees it while all of them send.

    Attributes:
        bandwidth: bytes a second that a rank sends, in one direction.
        latency: seconds from the start of a collective, or of a hop of a ring, to its end, were it empty.
        source: where the figures are from.
        known: "measured" on the machine that is planned for, or "assumed".

    Example:
        >>> from inferix_kernels.distributed import Link
        >>> link = Link.measured(bandwidth=350e9, latency=22e-6)
        >>> str(link)
        'link: 350 GB/s, 22 us (measured)'
    """

    name: str
    bandwidth: float
    latency: float
    source: str
    known: str = "assumed"

    def __post_init__(self) -> None:
        check_figure("bandwidth", self.bandwidth)
        check_figure("latency", self.latency, zero=True)

    @classmethod
    def measured(cls, bandwidth: float, latency: float, name: str = "link") -> Link:
        """A link of which both figures were taken on the machine itself.

        Args:
            bandwidth: bytes a second; latency: seconds.
        """
        return cls(name, bandwidth, latency, "", "measured")

    def seconds(self, sent: float) -> float:
        """Of one collective in which every rank sends so many bytes."""
        return self.latency + sent / self.bandwidth

    def __str__(self) -> str:
        said = f"{self.known}: {self.source}" if self.source else self.known
        return f"{self.name}: {self.bandwidth / 1e9:.3g} GB/s, {self.latency * 1e6:.3g} us ({said})"


@dataclasses.dataclass(frozen=True)
class Device:
    """What one rank computes with.

    Attributes:
        attention: FLOP/s of attention, a multiply-add counted as two.
        linear: FLOP/s of linear layers.
        memory: bytes.
        merge: seconds that one more partial attention over the same queries costs: its launch, and adding up.
        source, known: as of a Link.

    Example:
        >>> from inferix_kernels.distributed import Device
        >>> Device("mine", attention=600e12, linear=650e12, memory=80e9, known="measured").memory
        80000000000.0
    """

    name: str
    attention: float
    linear: float
    memory: float
    merge: float = 8e-6
    source: str = ""
    known: str = "assumed"

    def __post_init__(self) -> None:
        for name in ("attention", "linear", "memory"):
            check_figure(name, getattr(self, name))
        check_figure("merge", self.merge, zero=True)

    def __str__(self) -> str:
        said = f"{self.known}: {self.source}" if self.source else self.known
        rates = f"attention {self.attention / 1e12:.3g}, linear layers {self.linear / 1e12:.3g} TFLOP/s"
        return f"{self.name}: {self.memory / 1e9:.3g} GB, {rates}, {self.merge * 1e6:.3g} us a partial ({said})"


# A collective over NCCL takes 21 to 30 us of small messages on 4 GPUs of a switch, and 56 to 190 on 8 (B200, in a CUDA
# graph: github.com/NVIDIA/TensorRT-LLM, pull request 15285). 30 is the lower end of that: 8 ranks may well see more.
_NCCL = 30e-6
LINKS = {
    link.name: link
    for link in (
        Link("nvlink3", 230e9, _NCCL, "12 links of an A100 reach it: github.com/NVIDIA/nccl-tests, issue 149"),
        Link("nvlink4", 360e9, _NCCL, "371 to 380 GB/s of 450 on an H100: github.com/NVIDIA/nccl, issue 1264"),
        Link("nvlink5", 720e9, _NCCL, "0.8 of the data sheet's 900 GB/s, the share that nvlink4 reaches"),
        Link("pcie4", 25e9, _NCCL, "0.8 of 16 lanes' 32 GB/s"),
        Link("pcie5", 50e9, _NCCL, "0.8 of 16 lanes' 63 GB/s"),
        Link("ib400", 45e9, _NCCL, "0.9 of 400 Gbit/s, a network card for each GPU"),
    )
}
# 648 TFLOP/s of attention on an H100 SXM are FlashAttention-3's (arXiv:2407.08608, figure 5; 16 bits, head_dim 128);
# 230 on an A100 are FlashAttention-2's (arXiv:2307.08691, figure 4). Over pages 0.85 of that is assumed, and in linear
# layers 0.6 of the data sheet's dense 989 and 312. An H200 computes as an H100 does. `merge` is assumed.
_H100 = "0.85 of FlashAttention-3's 648 TFLOP/s, 0.6 of the data sheet's 989"
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 195e12, 187e12, 80e9, source="0.85 of FlashAttention-2's 230 TFLOP/s, 0.6 of 312"),
        Device("h100", 550e12, 593e12, 80e9, source=_H100),
        Device("h200", 550e12, 593e12, 141e9, source=_H100),
    )
}


class Model(NamedTuple):
    """Sizes of a network, and what one of its blocks attends to.

    Attributes:
        frame_tokens, block_frames: tokens of a latent frame, frames of a block.
        window: latent frames that a block attends to, its own included.
        layers, heads, kv_heads, head_dim: of self-attention.
        linear: multiply-adds of one layer's linear layers, for each token.
        weights: bytes of the network, in bfloat16 where it is published so.
        branches: forwards of a step (guidance); shared_past: all of them read the keys and values of one.
    """

    frame_tokens: int
    block_frames: int
    window: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linear: int
    weights: int
    branches: int = 1
    shared_past: bool = False


# Published sizes: docs/tiny.md, docs/wan.md, docs/magi.md; a test compares each row with the driver's own. Of
# cross-attention, keys and values are made once a prompt, and so are no part of `linear`.
MODELS = {
    "tiny": Model(
        *(64, 3, 9), *(6, 4, 4, 64), linear=128 * (3 + 1) * 256 + 2 * 128 * 512, weights=9_972_928
    ),
    "wan1.3b": Model(
        *(1560, 3, 21), *(30, 12, 12, 128), linear=6 * 1536**2 + 2 * 1536 * 8960, weights=2_837_993_600
    ),
    "wan14b": Model(
        *(1560, 3, 21), *(40, 40, 40, 128), linear=6 * 5120**2 + 2 * 5120 * 13824, weights=28_576_983_168
    ),
    "magi-4.5b": Model(
        *(2025, 6, 30), *(34, 24, 8, 128),
        linear=3072 * (24 + 16 + 24 + 48) * 128 + 2 * 3072 * 12288,
        weights=8_919_796_256, branches=3, shared_past=True,
    ),
    "magi-24b": Model(
        *(3600, 6, 30), *(48, 48, 8, 128),
        linear=6144 * (48 + 16 + 48 + 96) * 128 + 3 * 6144 * 16384,
        weights=47_798_563_872, branches=3, shared_past=True,
    ),
}  # fmt: skip
