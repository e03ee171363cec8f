"""Layers with what stands before, after and between them: the same code for float layers and 8-bit ones.

    x = Residual(x)
    x, y = x.before(self.qkv, norm="layer", scale=scale, shift=shift)   # adaLN
    qkv = linear_output(self.qkv, y, dtype=y_dtype)
    ...
    x = x.plus(self.out, attended, gate=gate)
    x, y = x.before(self.up, norm="layer")                              # adds what `out` gave on the way
    ...
    return x.sum()

All that stands between two layers is one kernel: `add_norm` where both are `nn.Linear`, or any other module. With a
`Linear8` the norm, the modulation and the quantization are one, and the product, the bias, the activation, the gate and
the residual another. A network that is written with them is quantized by replacing its layers.

Float layers give what the torch functions give that their docstrings read as, but rounded once, at the end. In float64,
with gradients (forward ones too), under torch.func, on devices that have no kernels and for tensors of classes of their
own, these functions are what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, profile
from .._check import check_word
from .._remembered import Accepted
from ..layout import Quantized
from .layer import Linear8
from .steps import Steps, beside, check_groups, contiguous, flat_groups, has_kernel, kind_of, transformed

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # by the error function, and its approximation


def linear_input(
    layer: nn.Module | None,
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
        layer: None: its input is to be a tensor.
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
    return Residual(x).before(layer, norm=norm, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps)[1]


@profile.profiled("linear")
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
    if activation is not None:
        check_word("activation", activation, tuple(GELU))
    if gate is not None or residual is not None:
        _check_after(x, gate, residual)
    if isinstance(layer, Linear8):
        y: Tensor = layer(x, activation=activation, gate=flat_groups(gate), residual=residual, dtype=dtype)
        return y
    if isinstance(x, Quantized):
        raise TypeError(f"x must be a tensor for a {type(layer).__name__}, got codes, which only a Linear8 takes")
    y = layer(x)
    y = y if activation is None else _activated(y, activation)
    if gate is None and residual is None:
        return y
    return _sum(y, gate, residual, y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype))


class Residual(NamedTuple):
    """The residual stream of a network, and what its last layer adds, which is added on the way into the next one.

    Attributes:
        x: [..., K].
        added: [..., K], still to be added; None: nothing is.
        gate: [..., 1, K], of `added`, as in `linear_output`; None: 1.

    Example:
        >>> from inferix_kernels.quantize import Residual, linear_output
        >>> up, down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        >>> x = Residual(torch.randn(3, 10, 64))
        >>> for _ in range(2):  # two feed-forward layers
        ...     x, y = x.before(up, norm="layer")
        ...     x = x.plus(down, linear_output(up, y, activation="gelu"), gate=torch.randn(3, 1, 64))
        >>> list(x.sum().shape)
        [3, 10, 64]
    """

    x: Tensor
    added: Tensor | None = None
    gate: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def plus(self, layer: nn.Module, y: Tensor | Quantized, *, gate: Tensor | None = None, **steps: Any) -> Residual:
        """x + gate * layer(y). An 8-bit layer adds it to its product; of another the sum is left for later.

        Args:
            y: [..., N], the layer's input.
            gate: [..., 1, K].
            steps: those of `linear_input`, between the gate and the sum: a norm of what is added. It has the dtype of
                what the layer gives or of the norm's weight, whichever holds both.

        Example:
            >>> x = Residual(torch.randn(3, 10, 64)).plus(down, torch.randn(3, 10, 256), norm="rms")
            >>> list(x.added.shape)
            [3, 10, 64]
        """
        x = self.sum()
        check_groups("gate", gate, x)
        if steps and (after := Steps(**steps)).given:
            after.check(x)
            made = linear_output(layer, y, dtype=x.dtype)
            like = made if after.weight is None else after.weight
            return Residual(x, _of_product(after, made, gate, torch.promote_types(made.dtype, like.dtype)))
        if isinstance(layer, Linear8):
            return Residual(linear_output(layer, y, gate=gate, residual=x))
        return Residual(x, linear_output(layer, y), gate)

    def before(
        self,
        layer: nn.Module | None,
        *,
        norm: str | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Residual, Any]:
        """The stream with nothing left to add, and what `linear_input` makes of it for `layer` with these steps.

        Args:
            layer: None: the input is a tensor, for whatever takes one.
            norm, weight, bias, scale, shift, eps: as in `linear_input`.

        Example:
            >>> x, y = x.before(up, norm="layer", scale=torch.randn(3, 1, 64))
            >>> x.added, list(y.shape)
            (None, [3, 10, 64])
        """
        x, added, gate = self
        kind = kind_of(transformed(), x, added, gate, norm, weight, bias, scale, shift, eps)
        if not kind.sizes["ready"] or isinstance(layer, Linear8):
            after = Steps(norm, weight, bias, scale, shift, eps)
            return self._before(layer, after, bool(kind.sizes["kernel"]) and not isinstance(layer, Linear8))
        return self._normed(kind, norm, weight, bias, scale, shift, eps)

    def _before(self, layer: nn.Module | None, after: Steps, kernel: bool) -> tuple[Residual, Any]:
        """`before`, where the op takes the tensors once they lie as it takes them, or not at all."""
        if kernel:
            stream = Residual(self.x.contiguous(), contiguous(self.added), contiguous(self.gate))
            after = after.contiguous
            return stream._normed(kind_of(transformed(), *stream, *after), *after)
        x = self.sum()
        return Residual(x), after.codes(layer, x) if isinstance(layer, Linear8) else after.of(x).to(x.dtype)

    def _normed(self, kind: Accepted, *steps: Any) -> tuple[Residual, Tensor]:
        """`before` of tensors as the op takes them; `kind`: what `kind_of` says of them and of these `Steps`."""
        x, added, gate = self
        y, stream, residual, summed = torch.empty_like(x), self, None, None
        if added is not None:
            x, residual, summed = added, x, torch.empty_like(x)
            stream = Residual(summed)
        _call(kind, x, gate, residual, steps, summed, y)
        return stream, y

    def sum(self) -> Tensor:
        """x + gate * added, [..., K].

        Example:
            >>> Residual(torch.ones(2, 3), torch.ones(2, 3), torch.full((1, 3), 0.5)).sum()[0].tolist()
            [1.5, 1.5, 1.5]
        """
        return self.x if self.added is None else _sum(self.added, self.gate, self.x, self.dtype)


def _of_product(after: Steps, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the steps make of gate * y."""
    if not kind_of(transformed(), y, None, gate, *after).sizes["kernel"]:
        y = y.to(dtype)
        return after.of(y if gate is None else y * beside(y, gate)).to(dtype)
    return _added(y.contiguous(), contiguous(gate), None, after.contiguous, dtype)


def _sum(y: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """residual + gate * y, each only if it is given."""
    if not has_kernel(y, gate, residual) or transformed():
        y = y if gate is None else y * beside(y, gate)
        return (y if residual is None else residual + y).to(dtype)
    return _added(y.contiguous(), contiguous(gate), contiguous(residual), Steps(), dtype)


def _added(y: Tensor, gate: Tensor | None, residual: Tensor | None, steps: Steps, dtype: torch.dtype) -> Tensor:
    """What the op makes of them, in new memory. All are contiguous."""
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    norm, weight, bias, scale, shift, eps = steps
    accepted = ops._accept_add_norm(y, gate, residual, norm, (weight, bias), (scale, shift), eps, None, None, out)
    _call(accepted, y, gate, residual, steps, None, out)
    return out


def _call(
    accepted: Accepted,
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    steps: Sequence[Any],
    summed: Tensor | None,
    out: Tensor,
) -> None:
    """The op, whose arguments were checked. In the order of `ops.add_norm`: both make each other's calls again."""
    norm, weight, bias, scale, shift, eps = steps
    ops.call(
        "add_norm",
        accepted,
        "auto",
        x.device,
        x,
        gate=gate,
        residual=residual,
        norm=norm,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        eps=eps,
        activation=None,
        summed=summed,
        out=out,
    )


def _activated(y: Tensor, activation: str) -> Tensor:
    # On a CPU torch's takes three times as long.
    if activation == "gelu_tanh" and y.is_cpu and has_kernel(y) and not transformed():
        return ops.add_norm(y.contiguous(), activation=activation)
    return F.gelu(y, approximate=GELU[activation])


def _check_after(x: Tensor | Quantized, gate: Tensor | None, residual: Tensor | None) -> None:
    places = (x if isinstance(x, Tensor) else x.codes).shape[:-1]
    for name, given, shape in (("gate", gate, (*places[:-1], 1)), ("residual", residual, places)):
        if given is not None and given.shape[:-1] != shape:
            raise ValueError(f"{name} must be [{', '.join(map(str, (*shape, 'N')))}], got {list(given.shape)}")
