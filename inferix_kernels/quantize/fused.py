"""A layer with what stands before and after it, in one call each: the same code for float layers and 8-bit ones.

    x_norm = linear_input(self.qkv, x, norm="layer", scale=scale, shift=shift)   # adaLN
    qkv = linear_output(self.qkv, x_norm, dtype=x.dtype)
    ...
    x = linear_output(self.out, attended, gate=gate, residual=x)

With an `nn.Linear`, or any other module, these are the torch functions that they read as, with gradients. With a
`Linear8` the norm, the modulation and the quantization are one kernel, and the product, the bias, the activation, the
gate and the residual another. A network that is written with them is quantized by replacing its layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import check_word
from ..layout import Quantized
from .layer import Linear8

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # by the error function, and its approximation


def linear_input(
    layer: nn.Module,
    x: Tensor,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | Quantized:
    """(norm(x) * weight + bias) * (1 + scale) + shift, each step only if it is given, as `layer` takes its input.

    Layers of one kind (dtype of the codes, smoothing) that take the same input can share it.

    Args:
        x: [..., K] float.
        norm: "layer" or "rms", over the last dimension; None is no norm.
        weight, bias: [K], the norm's; an RMS norm has no bias.
        scale, shift: [..., 1, K], of as many dimensions as x: each row for all rows of x at its place. A frame's
            modulation, for x [frames, tokens, K] (adaLN, arXiv:2212.09748).
        eps: added to the variance, or the mean square.

    Returns:
        [..., K]: a tensor or, for a `Linear8`, codes and scales, as `linear_output` takes them.

    Example:
        >>> from inferix_kernels.quantize import Linear8, linear_input
        >>> layer, x = torch.nn.Linear(64, 32), torch.randn(3, 10, 64)
        >>> adaln = {"norm": "layer", "scale": torch.randn(3, 1, 64), "shift": torch.randn(3, 1, 64)}
        >>> list(linear_input(layer, x, **adaln).shape)
        [3, 10, 64]
        >>> codes, scales = linear_input(Linear8.from_linear(layer), x, **adaln)
        >>> list(codes.shape), list(scales.shape)
        ([3, 10, 64], [3, 10])
    """
    check_word("norm", norm, ("layer", "rms"))
    if (norm is None and weight is not None) or (norm != "layer" and bias is not None):
        raise ValueError(f"weight and bias must be those of a norm, and bias that of a layer norm, got norm={norm!r}")
    for name, groups in (("scale", scale), ("shift", shift)):
        if groups is not None and groups.shape != (*x.shape[:-2], 1, x.shape[-1]):
            raise ValueError(f"{name} must be {[*x.shape[:-2], 1, x.shape[-1]]}, got {list(groups.shape)}")
    if isinstance(layer, Linear8):
        flat, norms = x.reshape(-1, x.shape[-1]), {"weight": weight, "bias": bias}
        codes, scales = layer.quantize(flat, norm=norm, **norms, scale=_rows(scale), shift=_rows(shift), eps=eps)
        return Quantized(codes.view(x.shape), scales.view(x.shape[:-1]))
    if norm is not None:
        size = x.shape[-1:]
        x = F.layer_norm(x, size, weight, bias, eps) if norm == "layer" else F.rms_norm(x, size, weight, eps)
    x = x if scale is None else x * (1 + scale)
    return x if shift is None else x + shift


def linear_output(
    layer: nn.Module,
    x: Tensor | Quantized,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * activation(layer(x)), each step only if it is given.

    Args:
        x: [..., K], from `linear_input` or as it is.
        activation: "gelu", "gelu_tanh" or None.
        gate: [..., 1, N], of as many dimensions as x: each row for all rows of x at its place.
        residual: [..., N].
        dtype: of what an 8-bit layer gives; None: the residual's or, without one, that of a float x. A float layer
            gives its own.

    Example:
        >>> from inferix_kernels.quantize import Linear8, linear_output
        >>> layer, x = torch.nn.Linear(64, 32), torch.randn(3, 10, 64)
        >>> after = {"gate": torch.randn(3, 1, 32), "residual": torch.randn(3, 10, 32)}
        >>> with torch.no_grad():
        ...     y, z = (linear_output(each, x, **after) for each in (layer, Linear8.from_linear(layer)))
        >>> list(y.shape), bool((y - z).norm() < 0.02 * y.norm())
        ([3, 10, 32], True)
    """
    check_word("activation", activation, tuple(GELU))
    places = (x if isinstance(x, Tensor) else x.codes).shape[:-1]
    for name, given, shape in (("gate", gate, (*places[:-1], 1)), ("residual", residual, places)):
        if given is not None and given.shape[:-1] != shape:
            raise ValueError(f"{name} must be [{', '.join(map(str, (*shape, 'N')))}], got {list(given.shape)}")
    if isinstance(layer, Linear8):
        y: Tensor = layer(x, activation=activation, gate=_rows(gate), residual=residual, dtype=dtype)
        return y
    if isinstance(x, Quantized):
        raise TypeError(f"x must be a tensor for a {type(layer).__name__}, got codes, which only a Linear8 takes")
    y = layer(x)
    y = y if activation is None else F.gelu(y, approximate=GELU[activation])
    y = y if gate is None else y * gate
    return y if residual is None else residual + y


def _rows(groups: Tensor | None) -> Tensor | None:
    """[..., 1, K] -> [G, K], as the ops take them."""
    return None if groups is None else groups.reshape(-1, groups.shape[-1]).contiguous()
