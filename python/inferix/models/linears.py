"""A network's linear layers in 8 bits: which of them, in what, and how a checkpoint holds them.

A network names what stays in full precision as data, its FULL_PRECISION: the first and the last layers, which are small
and whose errors weigh most. Every other nn.Linear can be a `Linear8`. A checkpoint holds one as `NAME.weight`, the
codes [N, K], and `NAME.weight_scale` [N], beside `NAME.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from inferix_kernels import Quantized
from inferix_kernels.quantize import Linear8

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CHOICES = (*CODES, "bf16")
WEIGHT, SCALE = ".weight", ".weight_scale"


class HasLinears(Protocol):
    """A network whose linear layers may be in 8 bits.

    Attributes:
        FULL_PRECISION: names of submodules, wherever they are: linear layers in them stay as they are.
    """

    FULL_PRECISION: tuple[str, ...]


def check_linear(linear: str | None, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError if `linear` is none of CHOICES, or says another thing than `dtype`."""
    if linear is not None and linear not in CHOICES:
        raise ValueError(f"linear must be one of {', '.join(CHOICES)}, got {linear!r}")
    if linear == "bf16" and dtype not in (None, torch.bfloat16):
        raise ValueError(f"linear must be int8 or fp8 where dtype is {dtype}, got 'bf16'")


def eight_bit_names(network: nn.Module) -> list[str]:
    """The layers of a network, a HasLinears, that can be in 8 bits, in its order."""
    kept = set(network.FULL_PRECISION)  # type: ignore[arg-type]
    layers = (name for name, module in network.named_modules() if type(module) is nn.Linear)
    return [name for name in layers if not kept & set(name.split("."))]


def linear_of(network: nn.Module) -> str | None:
    """What the 8-bit layers of a network are in, a key of CODES; None: it has none."""
    codes = next((layer.codes for layer in network.modules() if isinstance(layer, Linear8)), None)
    return next((linear for linear, dtype in CODES.items() if codes is not None and codes.dtype == dtype), None)


def weight_bytes(network: nn.Module, linear: str | None = None) -> int:
    """What the tensors of a network take, with its linear layers in 8 bits; it may be on the meta device.

    Example:
        >>> from inferix.models.linears import weight_bytes
        >>> from inferix.models.wan import WanConfig, WanNetwork
        >>> with torch.device("meta"):
        ...     network = WanNetwork(WanConfig(dim=1536, layers=30, heads=12, ffn=8960)).to(torch.bfloat16)
        >>> [round(weight_bytes(network, linear) / 2**30, 2) for linear in (None, "int8")]
        [2.64, 1.35]
    """
    check_linear(linear)
    width = torch.bfloat16.itemsize if linear == "bf16" else None
    state = network.state_dict()
    sizes = {name: x.numel() * (width or x.dtype.itemsize) for name, x in state.items()}
    for name in eight_bit_names(network) if linear in CODES else ():
        rows, columns = state[name + WEIGHT].shape
        sizes[name + WEIGHT] = rows * columns + rows * torch.float32.itemsize
    return sum(sizes.values())


def quantized_layer(name: str, weight: Tensor, bias: Tensor | None, linear: str) -> Linear8:
    """The layer `name` in 8 bits: weight [N, K] as precise as there is, bias [N] in the network's dtype.

    Raises:
        ValueError: the weight or the bias is not finite.
    """
    for part, x in (("weight", weight), ("bias", bias)):
        if x is not None and not x.isfinite().all():
            raise ValueError(f"weights: {name}.{part} must hold finite numbers to be quantized")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for part, x in (("weight", weight), ("bias", bias)):
        layer.register_parameter(part, None if x is None else nn.Parameter(x, requires_grad=False))
    return Linear8.from_linear(layer, CODES[linear]).eval()


def stored_layers(tensors: Mapping[str, Tensor], names: list[str], source: str) -> str | None:
    """What these layers, under the names of a checkpoint, are held in: a key of CODES, or None for floats.

    Raises:
        ValueError: not all of them are held in the same way.
    """
    kinds = {dtype: linear for linear, dtype in CODES.items()}
    held = {name: kinds.get(tensors[name + WEIGHT].dtype) for name in names if name + SCALE in tensors}
    if not held:
        return None
    first = next(iter(held))
    for name in names:
        if held[first] is None or held.get(name) != held[first]:
            raise ValueError(
                f"weights: {source}: {name}.weight must be in 8 bits like {first}.weight, with a weight_scale, "
                f"got {tensors[name + WEIGHT].dtype if name + WEIGHT in tensors else 'nothing'}"
            )
    return held[first]


def stored_layer(tensors: Mapping[str, Tensor], name: str, device: torch.device | str, dtype: torch.dtype) -> Linear8:
    """The layer `name` as `checkpoint_tensors` wrote it; dtype: of its bias.

    Raises:
        ValueError: its scales are not finite.
    """
    codes, scales = tensors[name + WEIGHT].to(device), tensors[name + SCALE].to(device, torch.float32)
    if not scales.isfinite().all():
        raise ValueError(f"weights: {name}{SCALE} must hold finite numbers")
    bias = tensors.get(f"{name}.bias")
    return Linear8(Quantized(codes, scales), bias=None if bias is None else bias.to(device, dtype)).eval()


def checkpoint_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by the names that a checkpoint has for them."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Linear8)}
    state = {name: x for name, x in network.state_dict().items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        state |= {name + WEIGHT: layer.codes, name + SCALE: layer.scales}
        state |= {} if layer.bias is None else {f"{name}.bias": layer.bias}
    return {name: x.contiguous() for name, x in state.items()}
