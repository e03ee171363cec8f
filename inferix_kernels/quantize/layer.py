"""A linear layer with 8-bit weights.

layer = Linear8.from_linear(nn.Linear(512, 2048), torch.float8_e4m3fn)
layer = Linear8(Quantized(codes, scales), bias=bias)                  # published in 8 bits
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._check import CODES, FLOATS, check_is, check_optional, check_quantized, check_tensor
from ..layout import Quantized
from ..ops import linear, quantize_rows


class Linear8(nn.Module):
    """y = (x / smooth) @ W.T + bias, with W[n, k] = codes[n, k] * scales[n]: W is the layer's weight times `smooth`.

    Casting the model (`.half()`, `.to(torch.bfloat16)`) leaves this layer's tensors in their dtypes.

    Attributes:
        codes: [N, K] int8 or float8_e4m3fn.
        scales: [N] float32.
        bias: [N] float32, bfloat16 or float16, or None.
        smoothing: [1, K] float32, 1 / smooth - 1, as `quantize_rows` takes its scale; None where smooth is.
        backend: of both ops.

    Example:
        >>> from inferix_kernels.quantize import Linear8
        >>> layer = torch.nn.Linear(64, 32)
        >>> x = torch.randn(5, 64)
        >>> with torch.no_grad():
        ...     bool((Linear8.from_linear(layer)(x) - layer(x)).norm() < 0.02 * layer(x).norm())
        True
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    smoothing: Tensor | None

    def __init__(
        self,
        weight: Quantized,
        *,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        backend: str = "auto",
    ):
        """
        Args:
            weight: codes [N, K] int8 or float8_e4m3fn and scales [N] float32, contiguous, used as they are.
            bias: [N] float32, bfloat16 or float16.
            smooth: [K] float32, by which the input's channels are divided before they are quantized and the weight's
                were multiplied: it evens out channels of different size (SmoothQuant, arXiv:2211.10438).
            backend: of `quantize_rows` and `linear`.

        Raises:
            TypeError, ValueError: a tensor has another dtype, shape or device, or `smooth` holds 0, NaN or infinity.
        """
        super().__init__()
        check_is("weight", weight, Quantized)
        sizes: dict[str, int] = {}
        check_quantized("weight", weight, CODES, "N K", sizes, weight.codes.device)
        check_optional("bias", bias, FLOATS, "N", sizes, weight.codes.device)
        self.backend = backend
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)
        self.register_buffer("smoothing", None if smooth is None else _smoothing(smooth, sizes, weight.codes.device))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        layer: nn.Linear,
        dtype: torch.dtype = torch.int8,
        *,
        smooth: Tensor | None = None,
        backend: str = "auto",
    ) -> Linear8:
        """The same layer with its weight [N, K] rounded to 8 bits.

        Args:
            layer: float32, bfloat16 or float16; it is left as it is.
            dtype: of the codes, int8 or float8_e4m3fn.
            smooth: as in Linear8; the weight is multiplied by it here.
        """
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach().clone()
        check_tensor("layer.weight", weight, FLOATS, "N K", {}, weight.device)
        if dtype not in CODES:
            raise TypeError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype!r}")
        if smooth is not None:
            _smoothing(smooth, {"K": layer.in_features}, weight.device)  # refused before it is multiplied by
            weight = weight.float() * smooth
        codes = quantize_rows(weight.contiguous(), dtype, backend=backend)
        return cls(codes, bias=bias, smooth=smooth, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, bfloat16 or float16 -> [..., N] in x's dtype."""
        y = self.product(self.quantize(x.reshape(-1, x.shape[-1])), dtype=x.dtype)
        return y.view(*x.shape[:-1], len(self.codes))

    def quantize(self, x: Tensor) -> Quantized:
        """x [M, K] float32, bfloat16 or float16 -> its rows in 8 bits, for `product` of this layer, and of others that
        take the same input and have the same smoothing."""
        return quantize_rows(x, self.codes.dtype, scale=self.smoothing, backend=self.backend)

    def product(
        self,
        rows: Quantized,
        *,
        activation: str | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """residual + gate * activation(rows @ W.T + bias), [M, N], as `linear` of ops.py has it."""
        weight = Quantized(self.codes, self.scales)
        return linear(
            rows,
            weight,
            bias=self.bias,
            activation=activation,
            gate=gate,
            residual=residual,
            dtype=dtype,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        out_features, in_features = self.codes.shape
        return f"in_features={in_features}, out_features={out_features}, codes={self.codes.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """Moves are followed, casts are not: codes cast to a float would be no codes, and scales are float32."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(moved, recurse)


def _smoothing(smooth: Tensor, sizes: dict[str, int], device: torch.device) -> Tensor:
    """[K] -> [1, K], checked: x * (1 + smoothing) is x / smooth."""
    check_optional("smooth", smooth, (torch.float32,), "K", sizes, device)
    inverse = 1 / smooth
    if not (smooth.isfinite() & inverse.isfinite()).all():
        raise ValueError("smooth must hold finite numbers other than 0, whose inverses are finite as well")
    return (inverse - 1)[None]
