"""Linear layers with 8-bit weights, for a model of your own.

    model = quantize_linears(model)                                       # every nn.Linear, int8, in place
    layer = Linear8.from_linear(nn.Linear(512, 2048), torch.float8_e4m3fn)
    layer = Linear8(Quantized(codes, scales), bias=bias)                  # published in 8 bits

The weight has one scale per output channel, the input one per row, found on the way in; products are of 8 bits
(`quantize_rows` and `linear` of ops.py say how they are rounded and summed). For inference: there is no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .layer import Linear8

__all__ = ["Linear8", "quantize_linears"]


def quantize_linears(
    model: nn.Module,
    dtype: torch.dtype = torch.int8,
    *,
    names: Iterable[str] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Put a `Linear8` in the place of linear layers of `model`, in place; returns `model`.

    A state dict of the result loads into another model that was treated the same way.

    Args:
        dtype: of the codes, int8 or float8_e4m3fn.
        names: of the layers, as `named_modules` gives them; None is every layer whose class is `nn.Linear`. The first
            and the last layers of a network are often left out: they are small, and errors there weigh most. A layer
            that has several names is replaced under those that are given, by one `Linear8`.

    Raises:
        ValueError: a name is of no linear layer of the model, or the model is itself one, which has no place in
            another: see Linear8.from_linear. Nothing is replaced.
        TypeError: a layer, or `dtype`, is not what Linear8.from_linear takes. Nothing is replaced.

    Example:
        >>> from inferix_kernels.quantize import quantize_linears
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        >>> quantize_linears(model, names=["0"])[0]
        Linear8(in_features=64, out_features=128, codes=torch.int8)
    """
    if type(model) is nn.Linear:
        raise ValueError("model must have its linear layers within it, got one: use Linear8.from_linear")
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names, got {names!r}")
    modules = model.named_modules(remove_duplicate=False)  # a layer may be in several places
    layers = {name: module for name, module in modules if type(module) is nn.Linear}
    chosen = list(layers if names is None else names)
    if unknown := [name for name in chosen if name not in layers]:
        raise ValueError(f"names must be linear layers of the model, got {unknown[0]!r}")
    made = {layer: Linear8.from_linear(layer, dtype, backend=backend) for layer in map(layers.__getitem__, chosen)}
    for name in chosen:
        model.set_submodule(name, made[layers[name]].train(layers[name].training))
    return model
