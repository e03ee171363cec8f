"""How a linear layer is quantized: a `QConfig` for each layer. Names and meaning are those of DAX.

    get_dynamic_int8_per_token_act_per_channel_weight_qconfig()     # a scale per row of the input: the most exact
    QConfig(Scheme(torch.int8, per_tensor_symmetric, is_dynamic=False), Scheme(torch.int8, per_channel_symmetric))

All schemes are symmetric: x = code * scale, with scale = max(largest |x|, 1e-12) / 127 (int8) or 448 (e4m3) over what
shares it. Both sides have codes of the same type, int8 or e4m3.

Source: dax/quant/quantization/qconfig.py of github.com/RiseAI-Sys/DAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .._check import CODES, check_counts

per_tensor_symmetric = "per_tensor_symmetric"
per_token_symmetric = "per_token_symmetric"
per_channel_symmetric = "per_channel_symmetric"

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in CODES}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the inputs of a layer, or its weight, are stored.

    Attributes:
        dtype: of the codes, int8 or float8_e4m3fn.
        qscheme: what shares a scale: `per_tensor_symmetric`, all numbers; `per_token_symmetric`, a row of the input;
            `per_channel_symmetric`, a row of the weight, which is an output channel.
        is_dynamic: of inputs: is the scale found in each, or once in a calibration? Not used of a weight.

    Raises:
        ValueError: another dtype or qscheme.
    """

    dtype: torch.dtype
    qscheme: str
    is_dynamic: bool = True

    def __post_init__(self) -> None:
        check_codes("dtype", self.dtype)
        schemes = (per_tensor_symmetric, per_token_symmetric, per_channel_symmetric)
        if self.qscheme not in schemes:
            raise ValueError(f"qscheme must be {' or '.join(schemes)}, got {self.qscheme!r}")


@dataclasses.dataclass(frozen=True)
class Profile:
    """What `convert` writes of the numbers that a layer saw: to `output_dir`/distribution.json, of at most
    `max_sample_num` of them, in `bins`."""

    output_dir: str
    max_sample_num: int
    bins: int

    def __post_init__(self) -> None:
        check_counts({"max_sample_num": self.max_sample_num, "bins": self.bins})


@dataclasses.dataclass(frozen=True)
class QConfig:
    """How a linear layer is quantized.

    Attributes:
        activation: of its inputs: per tensor or per token.
        weight: per tensor or per channel; with codes of the same dtype.
        profile: what to write of the numbers seen, or None.

    Raises:
        ValueError: schemes that do not go together.

    Example:
        >>> from inferix_kernels.quantize import QConfig, Scheme, per_channel_symmetric, per_tensor_symmetric
        >>> inputs = Scheme(torch.int8, per_tensor_symmetric, is_dynamic=False)
        >>> QConfig(inputs, Scheme(torch.int8, per_channel_symmetric))
        QConfig(int8, static per_tensor_symmetric x per_channel_symmetric)
    """

    activation: Scheme
    weight: Scheme
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.activation.dtype != self.weight.dtype:
            raise ValueError(
                f"weight_dtype must be the activations', {NAMES[self.activation.dtype]}, got {NAMES[self.weight.dtype]}"
            )
        if self.activation.qscheme == per_channel_symmetric:
            raise ValueError(
                "activation must be per_tensor_symmetric or per_token_symmetric, got per_channel_symmetric"
            )
        if self.weight.qscheme == per_token_symmetric:
            raise ValueError("weight must be per_tensor_symmetric or per_channel_symmetric, got per_token_symmetric")
        if self.activation.qscheme == per_token_symmetric and not self.activation.is_dynamic:
            raise ValueError(
                "activation must be dynamic where it is per_token_symmetric: no calibration knows the tokens"
            )

    @property
    def static(self) -> bool:
        """Does it need a calibration?"""
        return not self.activation.is_dynamic

    def dynamic(self) -> QConfig:
        """The same, with scales found in each input."""
        return QConfig(dataclasses.replace(self.activation, is_dynamic=True), self.weight)

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": NAMES[self.weight.dtype],
            "activation": self.activation.qscheme,
            "is_dynamic": self.activation.is_dynamic,
            "weight": self.weight.qscheme,
        }

    @staticmethod
    def from_json(saved: dict[str, Any]) -> QConfig:
        """
        Raises:
            ValueError, KeyError, TypeError: it is no such thing.
        """
        (dtype,) = [dtype for dtype, name in NAMES.items() if name == saved["dtype"]]
        activation = Scheme(dtype, saved["activation"], saved["is_dynamic"] is True)
        return QConfig(activation, Scheme(dtype, saved["weight"]))

    def __repr__(self) -> str:
        when = "dynamic" if self.activation.is_dynamic else "static"
        return f"QConfig({NAMES[self.weight.dtype]}, {when} {self.activation.qscheme} x {self.weight.qscheme})"


def check_codes(name: str, dtype: object) -> None:
    if dtype not in CODES:
        why = ": it has two bits of mantissa, and no kernel here takes it" if dtype == torch.float8_e5m2 else ""
        raise ValueError(f"{name} must be {' or '.join(map(str, NAMES))}, got {dtype!r}{why}")


def _qconfig(
    activation_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    activation: str,
    weight: str,
    is_dynamic: bool,
    profile: Profile | None = None,
) -> QConfig:
    check_codes("activation_dtype", activation_dtype)
    check_codes("weight_dtype", weight_dtype)
    return QConfig(Scheme(activation_dtype, activation, is_dynamic), Scheme(weight_dtype, weight), profile)


FP8 = torch.float8_e4m3fn


def get_default_fp8_qconfig(activation_dtype: torch.dtype = FP8, weight_dtype: torch.dtype = FP8) -> QConfig:
    """Static: one calibrated scale for the inputs, one for the weight. Of int8 codes with both dtypes int8."""
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_tensor_symmetric, False)


def get_fp8_per_channel_weight_qconfig(activation_dtype: torch.dtype = FP8, weight_dtype: torch.dtype = FP8) -> QConfig:
    """Static: one calibrated scale for the inputs, one per output channel. Of int8 codes with both dtypes int8."""
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_channel_symmetric, False)


def get_default_dynamic_fp8_qconfig(activation_dtype: torch.dtype = FP8, weight_dtype: torch.dtype = FP8) -> QConfig:
    """One scale for each input, one for the weight."""
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_tensor_symmetric, True)


def get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(
    activation_dtype: torch.dtype = FP8, weight_dtype: torch.dtype = FP8
) -> QConfig:
    """One scale per row of the input, one per output channel."""
    return _qconfig(activation_dtype, weight_dtype, per_token_symmetric, per_channel_symmetric, True)


def get_default_dynamic_int8_qconfig(
    activation_dtype: torch.dtype = torch.int8, weight_dtype: torch.dtype = torch.int8
) -> QConfig:
    """One scale for each input, one for the weight."""
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_tensor_symmetric, True)


def get_dynamic_int8_per_channel_weight_qconfig(
    activation_dtype: torch.dtype = torch.int8, weight_dtype: torch.dtype = torch.int8
) -> QConfig:
    """One scale for each input, one per output channel."""
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_channel_symmetric, True)


def get_dynamic_int8_per_token_act_per_channel_weight_qconfig(
    activation_dtype: torch.dtype = torch.int8, weight_dtype: torch.dtype = torch.int8
) -> QConfig:
    """One scale per row of the input, one per output channel: the most exact of all, and the fastest."""
    return _qconfig(activation_dtype, weight_dtype, per_token_symmetric, per_channel_symmetric, True)


def get_default_dist_profile_qconfig(
    output_dir: str = ".",
    max_sample_num: int = 1_000_000,
    bins: int = 1000,
    activation_dtype: torch.dtype = FP8,
    weight_dtype: torch.dtype = FP8,
) -> QConfig:
    """As get_default_fp8_qconfig; and `convert` writes how the numbers of inputs and weights are distributed."""
    profile = Profile(output_dir, max_sample_num, bins)
    return _qconfig(activation_dtype, weight_dtype, per_tensor_symmetric, per_tensor_symmetric, False, profile)
