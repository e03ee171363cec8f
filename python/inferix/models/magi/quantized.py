"""Weights that were published in 8 bits (e4m3), as the checkpoint holds them: for `Linear8`, or to dequantize.

A weight comes with `weight_scale`, by which its codes are multiplied, and with what its input was divided by before it
was quantized: `input_scale`, one number for the whole tensor, however often it is repeated, or, where there is a
`smooth_scale`, that one per channel, so that `input_scale` only multiplies the result.

    y = e4m3(x / s) @ codes.T * input_scale * weight_scale      s = smooth_scale, or input_scale

`Linear8` differs in one thing: each row of x gets a scale of its own, from its largest value, instead of the one
calibrated number; what `smooth_scale` evens out between channels it evens out here too.

Source: PerTensorQuantizedFp8Linear and PerChannelQuantizedFp8Linear of github.com/SandAI-org/MAGI-1 (6ff822e).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inferix_kernels import Quantized
from inferix_kernels.quantize import Linear8

SCALES = ("weight_scale", "input_scale", "smooth_scale")
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Codes:
    """A published 8-bit weight: W[n, k] = codes[n, k] * scales[n] / smooth[k].

    Attributes:
        codes: [N, K] e4m3; scales: [N] float32; smooth: [K] float32, or None for ones.
    """

    codes: Tensor
    scales: Tensor
    smooth: Tensor | None

    def layer(self, backend: str = "auto") -> Linear8:
        return Linear8(Quantized(self.codes, self.scales), smooth=self.smooth, backend=backend)

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        weight = self.codes.float() * self.scales[:, None]
        return weight if self.smooth is None else weight / self.smooth


def read_codes(tensors: Mapping[str, Tensor], names: Sequence[str], source: str) -> Codes:
    """The weights of one or several layers with the same input, given by name, as one.

    Raises:
        ValueError: a scale is missing or has the wrong size, or the layers' smoothing differs.
    """
    codes, scales, smooths = [], [], []
    for name in names:
        weight = tensors[name]
        if weight.ndim == 3 and len(weight) == 1:
            weight = weight[0]
        stem = name.removesuffix("weight")
        given = {kind: tensors[stem + kind].float().flatten() for kind in SCALES if stem + kind in tensors}
        if missing := [kind for kind in SCALES[:2] if kind not in given]:
            raise ValueError(f"weights: {source}: {name} is in 8 bits and has no {missing[0]}")
        smooth = given.get("smooth_scale")
        for kind, sizes in (("weight_scale", (1,)), ("input_scale", (1, weight.shape[1]))):
            if len(given[kind]) not in sizes:
                raise ValueError(
                    f"weights: {source}: {stem}{kind} must have {' or '.join(map(str, sizes))} numbers, "
                    f"got {len(given[kind])}"
                )
        if bad := [kind for kind, x in given.items() if not x.isfinite().all() or (kind == "smooth_scale" and 0 in x)]:
            raise ValueError(f"weights: {source}: {stem}{bad[0]} must be finite numbers, those of smooth_scale not 0")
        if smooth is not None and len(smooth) != weight.shape[1]:
            raise ValueError(f"weights: {source}: {stem}smooth_scale must have {weight.shape[1]} numbers")
        scale = given["weight_scale"] * (1 if smooth is None else given["input_scale"][:1])
        codes.append(weight)
        scales.append(scale.expand(len(weight)))
        smooths.append(smooth)
    if any(smooth is not None for smooth in smooths[1:]):
        raise ValueError(f"weights: {source}: {', '.join(names)} must not be smoothed: they share one input")
    joined = torch.cat([weight.view(torch.uint8) for weight in codes]).view(FP8)  # torch can't join float8
    return Codes(joined, torch.cat(scales), smooths[0])
