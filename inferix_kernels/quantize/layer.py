"""A linear layer with 8-bit weights.

layer = Linear8.from_linear(nn.Linear(512, 2048), torch.float8_e4m3fn)
layer = Linear8(Quantized(codes, scales), bias=bias)                  # published in 8 bits
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._check import (
    CODES,
    FLOATS,
    check_groups,
    check_is,
    check_optional,
    check_quantized,
    check_tensor,
    check_word,
)
from ..layout import Quantized
from ..ops import linear, quantize_rows
from ..reference.linear import before
from .qconfig import NAMES, QConfig, Scheme, per_channel_symmetric, per_tensor_symmetric, per_token_symmetric
from .rounding import quantize_tensor
from .shared_input import SharedInput


class Linear8(nn.Module):
    """y = (x / smooth) @ W.T + bias, with W[n, k] = qweight[n, k] * weight_scale[n]: the layer's weight times `smooth`.

    Casting the model (`.half()`, `.to(torch.bfloat16)`) leaves this layer's tensors in their dtypes.

    Attributes:
        qweight: [N, K] int8 or float8_e4m3fn.
        weight_scale: [1, N] float32, or [1] where the weight has one scale.
        bias: [N] float32, bfloat16 or float16, or None. A parameter: of what has none, diffusers can't tell the dtype.
        input_scale: [1] float32, of a calibration; None where scales are found in each input.
        smoothing: [1, K] float32, 1 / smooth - 1, as `quantize_rows` takes its scale; None where smooth is.
        per_tensor: has an input one scale, or each of its rows one?
        backend: of both ops.

    Example:
        >>> from inferix_kernels.quantize import Linear8
        >>> layer = torch.nn.Linear(64, 32)
        >>> x = torch.randn(5, 64)
        >>> with torch.no_grad():
        ...     bool((Linear8.from_linear(layer)(x) - layer(x)).norm() < 0.02 * layer(x).norm())
        True
    """

    qweight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    input_scale: Tensor | None
    smoothing: Tensor | None

    def __init__(
        self,
        weight: Quantized,
        *,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        input_scale: Tensor | None = None,
        per_tensor: bool = False,
        backend: str = "auto",
    ):
        """
        Args:
            weight: codes [N, K] int8 or float8_e4m3fn and scales [N] float32, or [] for one scale; contiguous, used as
                they are.
            bias: [N] float32, bfloat16 or float16.
            smooth: [K] float32, by which the input's channels are divided before they are quantized and the weight's
                were multiplied: it evens out channels of different size (SmoothQuant, arXiv:2211.10438).
            input_scale: [1] float32, of all inputs, found in a calibration.
            per_tensor: one scale for all of an input instead of one for each row; so it is where input_scale is given.
            backend: of `quantize_rows` and `linear`.

        Raises:
            TypeError, ValueError: a tensor has another dtype, shape or device, `smooth` holds 0, NaN or infinity, or
                is given where inputs have one scale.
        """
        super().__init__()
        check_is("weight", weight, Quantized)
        sizes: dict[str, int] = {}
        device = weight.codes.device
        check_quantized("weight", _per_channel(weight), CODES, "N K", sizes, device)
        check_optional("bias", bias, FLOATS, "N", sizes, device)
        check_optional("input_scale", input_scale, (torch.float32,), "1", sizes, device)
        self.backend = backend
        self.per_tensor = per_tensor or input_scale is not None
        if self.per_tensor and smooth is not None:
            raise ValueError("smooth must be None where inputs have one scale, got a tensor")
        self.register_buffer("qweight", weight.codes)
        self.register_buffer("weight_scale", weight.scales.view(1, -1) if weight.scales.ndim else weight.scales.view(1))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("smoothing", None if smooth is None else _smoothing(smooth, sizes, device))
        self.shared: SharedInput | None = None  # see share_inputs in convert.py
        self.siblings: Hashable = None

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
        """The same layer with its weight [N, K] rounded to 8 bits, a scale per output channel and per row of the input.

        Args:
            layer: float32, bfloat16 or float16; it is left as it is.
            dtype: of the codes, int8 or float8_e4m3fn.
            smooth: as in Linear8; the weight is multiplied by it here.
        """
        if dtype not in CODES:
            raise TypeError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype!r}")
        config = QConfig(Scheme(dtype, per_token_symmetric), Scheme(dtype, per_channel_symmetric))
        return cls.from_qconfig(layer, config, smooth=smooth, backend=backend)

    @classmethod
    @torch.no_grad()
    def from_qconfig(
        cls,
        layer: nn.Linear,
        config: QConfig,
        *,
        smooth: Tensor | None = None,
        input_scale: Tensor | None = None,
        backend: str = "auto",
    ) -> Linear8:
        """The same layer, quantized as `config` says; a static one has its calibrated `input_scale`."""
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        check_tensor("layer.weight", weight, FLOATS, "N K", {}, weight.device)
        if smooth is not None:
            _smoothing(smooth, {"K": layer.in_features}, weight.device)  # refused before it is multiplied by
            weight = weight.float() * smooth
        if config.static != (input_scale is not None):
            raise ValueError(f"input_scale must be given for a static qconfig, and for no other, got {config}")
        if config.weight.qscheme == per_channel_symmetric:
            codes = quantize_rows(weight.contiguous(), config.weight.dtype, backend=backend)
        else:
            codes = quantize_tensor(weight, config.weight.dtype)
            codes = codes._replace(scales=codes.scales[0].clone())
        one = config.activation.qscheme == per_tensor_symmetric
        made = cls(codes, bias=bias, smooth=smooth, input_scale=input_scale, per_tensor=one, backend=backend)
        return made.train(layer.training)

    @classmethod
    def from_float(cls, layer: nn.Linear) -> Linear8:
        """Of a layer that has its `qconfig`, and its observer `activation_post_process` where that is static: as
        `quantize_dynamic` and `convert` call the classes of their `mapping`, a derived one of this too."""
        config: QConfig = layer.qconfig  # type: ignore[assignment]
        scale = layer.activation_post_process.scale() if config.static else None  # type: ignore[operator, union-attr]
        return cls.from_qconfig(layer, config, input_scale=scale)

    @property
    def config(self) -> QConfig:
        """How this layer is quantized: read off its tensors."""
        dtype = self.qweight.dtype
        inputs = per_tensor_symmetric if self.per_tensor else per_token_symmetric
        weight = per_channel_symmetric if self.weight_scale.ndim == 2 else per_tensor_symmetric
        return QConfig(Scheme(dtype, inputs, self.input_scale is None), Scheme(dtype, weight))

    @property
    def codes(self) -> Tensor:
        """[N, K]: the weight as `linear` takes it, with `scales`."""
        return self.qweight

    @property
    def scales(self) -> Tensor:
        """[N] float32."""
        scale = self.weight_scale
        return scale.view(-1) if scale.ndim == 2 else scale.expand(len(self.qweight)).contiguous()

    @property
    def in_features(self) -> int:
        return self.qweight.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.qweight)

    @property
    def weight(self) -> Tensor:
        """[N, K] float32: what the codes stand for, made anew each time; no op reads it."""
        weight = self.qweight.float() * self.weight_scale.view(-1, 1)
        return weight if self.smoothing is None else weight * (1 + self.smoothing)

    def forward(
        self,
        x: Tensor | Quantized,
        *,
        activation: str | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """residual + gate * activation(layer(x)), as `product` has it, over any number of dimensions.

        Args:
            x: [..., K] float32, bfloat16 or float16; or codes [..., K] and scales [...], from `quantize`.
            gate: [G, N]; residual: [..., N].
            dtype: of the result; None: the residual's or, without one, that of a float x.

        Returns:
            [..., N].

        Raises:
            TypeError, ValueError: x is neither, or of another width; or as `linear`.
        """
        if not isinstance(x, (Tensor, Quantized)):
            raise TypeError(f"x must be a tensor or a Quantized, got {type(x).__name__}")
        shape = x.shape if isinstance(x, Tensor) else x.codes.shape
        if list(shape[-1:]) != [self.in_features]:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(shape)}")
        if dtype is None:
            dtype = residual.dtype if residual is not None else x.dtype if isinstance(x, Tensor) else None
        if dtype is None:
            raise ValueError("dtype must be given for an input in 8 bits, where there is no residual to take it from")
        if isinstance(x, Tensor):
            rows = self._rows(x)
        else:
            rows = Quantized(x.codes.reshape(-1, shape[-1]), x.scales.reshape(-1))
        residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
        y = self.product(rows, activation=activation, gate=gate, residual=residual, dtype=dtype)
        return y.view(*shape[:-1], len(self.qweight))

    def _rows(self, x: Tensor) -> Quantized:
        def quantize() -> Quantized:
            return self.quantize(x.reshape(-1, x.shape[-1]))

        return quantize() if self.shared is None else self.shared.rows(self, self.siblings, x, quantize)

    def quantize(
        self,
        x: Tensor,
        *,
        norm: str | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Quantized:
        """x [M, K] float32, bfloat16 or float16 -> its rows in 8 bits, after norm and modulation as `quantize_rows` has
        them, for `product` of this layer, and of others that take the same input and have the same config and
        smoothing."""
        if self.smoothing is not None:  # y / smooth is one more factor of both
            scale = self.smoothing if scale is None else (1 + scale) * (1 + self.smoothing) - 1
            shift = None if shift is None else shift * (1 + self.smoothing)
        dtype = self.qweight.dtype
        if self.per_tensor:
            return quantize_tensor(_before(x, norm, weight, bias, scale, shift, eps), dtype, self.input_scale)
        return quantize_rows(
            x, dtype, norm=norm, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps, backend=self.backend
        )

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
        return linear(
            rows,
            Quantized(self.codes, self.scales),
            bias=self.bias,
            activation=activation,
            gate=gate,
            residual=residual,
            dtype=dtype,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.config}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """Moves are followed, casts are not: codes cast to a float would be no codes, and scales are float32."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Nothing of this layer is loaded if the state is of another recipe: torch would cast its codes."""
        if wrong := self.mismatch(state, prefix):
            args[-1].append(wrong)  # torch's list of errors
            return
        super()._load_from_state_dict(state, prefix, *args)

    def mismatch(self, state: Mapping[str, Any], prefix: str) -> str:
        """One line if this layer's tensors in a state dict are of another recipe; "" if they are not, or absent."""
        name, here = prefix.removesuffix(".") or "the layer", self.config
        if f"{prefix}weight" in state and f"{prefix}qweight" not in state:
            return f"{name} is quantized ({here}), and the state has its weight in full precision"
        if (codes := state.get(f"{prefix}qweight")) is not None and codes.dtype != self.qweight.dtype:
            got = str(codes.dtype).removeprefix("torch.")
            return (
                f"{name} is quantized to {NAMES[self.qweight.dtype]}, and the state has codes of another recipe, {got}"
            )
        for key in ("weight_scale", "input_scale", "smoothing"):
            mine, given = getattr(self, key), state.get(f"{prefix}{key}")
            want, found = (None if x is None else list(x.shape) for x in (mine, given))
            if codes is not None and want != found:
                return f"{name} is {here}, and the state is of another recipe: {key} must be {want}, got {found}"
        return ""


def _before(
    x: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """Norm and modulation as `quantize_rows` has them, its arguments checked: [M, K] float32."""
    sizes: dict[str, int] = {}
    check_tensor("x", x, FLOATS, "M K", sizes, x.device)
    check_word("norm", norm, ("layer", "rms"))
    for name, vector in (("weight", weight), ("bias", bias)):
        check_optional(name, vector, FLOATS, "K", sizes, x.device)
    for name, groups in (("scale", scale), ("shift", shift)):
        check_groups(name, groups, "K", sizes, x.device)
    return before(x, norm, weight, bias, scale, shift, eps)


def _per_channel(weight: Quantized) -> Quantized:
    """With a scale for each output channel, if it is one for all."""
    if isinstance(weight.scales, Tensor) and weight.scales.ndim == 0 and isinstance(weight.codes, Tensor):
        return weight._replace(scales=weight.scales.expand(len(weight.codes)).contiguous())
    return weight


def _smoothing(smooth: Tensor, sizes: dict[str, int], device: torch.device) -> Tensor:
    """[K] -> [1, K], checked: x * (1 + smoothing) is x / smooth."""
    check_optional("smooth", smooth, (torch.float32,), "K", sizes, device)
    inverse = 1 / smooth
    if not (smooth.isfinite() & inverse.isfinite()).all():
        raise ValueError("smooth must hold finite numbers other than 0, whose inverses are finite as well")
    return (inverse - 1)[None]
