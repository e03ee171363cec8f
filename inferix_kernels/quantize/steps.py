"""What stands between two layers, as arguments: checked, and by which code they are computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import ops
from .._check import FLOATS, check_word
from .._remembered import Sizes, remembered
from ..layout import Quantized
from .layer import Linear8

PLAIN = (Tensor, nn.Parameter)


class Steps(NamedTuple):
    """(norm(x) * weight + bias) * (1 + scale) + shift, as `linear_input` has it."""

    norm: str | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-6

    def check(self, x: Tensor) -> None:
        norm = self.norm
        check_word("norm", norm, ("layer", "rms"))
        if (norm is None and self.weight is not None) or (norm != "layer" and self.bias is not None):
            raise ValueError(
                f"weight and bias must be those of a norm, and bias that of a layer norm, got norm={norm!r}"
            )
        check_groups("scale", self.scale, x)
        check_groups("shift", self.shift, x)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[1:5]

    @property
    def contiguous(self) -> Steps:
        weight, bias, scale, shift = map(contiguous, self.tensors)
        return Steps(self.norm, weight, bias, scale, shift, self.eps)

    @property
    def given(self) -> bool:
        return not (self.norm is self.scale is self.shift is None)

    @property
    def operands(self) -> dict[str, Any]:
        """As the ops take them."""
        norm, weight, bias, scale, shift, eps = self
        return {
            "norm": norm,
            "weight": weight,
            "bias": bias,
            "scale": flat_groups(scale),
            "shift": flat_groups(shift),
            "eps": eps,
        }

    def codes(self, layer: Linear8, x: Tensor) -> Quantized:
        codes, scales = layer.quantize(flat_rows(x), **self.operands)
        return Quantized(codes.view(x.shape), scales.view(x.shape[:-1]))

    def of(self, x: Tensor) -> Tensor:
        """In torch's functions."""
        size = x.shape[-1:]
        if self.norm == "layer":
            x = F.layer_norm(x, size, self.weight, self.bias, self.eps)
        if self.norm == "rms":
            x = F.rms_norm(x, size, self.weight, self.eps)
        x = x if self.scale is None else x * (1 + beside(x, self.scale))
        return x if self.shift is None else x + beside(x, self.shift)


@remembered
def kind_of(
    transformed: bool,
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Sizes:
    """Checks a stream's tensors and steps. "kernel": does an op take them; "ready": as they lie in memory."""
    steps = Steps(norm, weight, bias, scale, shift, eps)
    steps.check(x)
    check_groups("gate", gate, x)
    kernel = steps.given and not transformed and has_kernel(x, added, gate, *steps.tensors)
    given = [each for each in (x, added, gate, *steps.tensors) if each is not None]
    ready = kernel and all(each.is_contiguous() for each in given)
    if ready:
        first, residual = (x, None) if added is None else (added, x)
        ops._check_add_norm(first, gate, residual, norm, (weight, bias), (scale, shift), eps, None, None, None)
    return {"kernel": kernel, "ready": ready}


def has_kernel(*tensors: Tensor | None) -> bool:
    """Does an op take these? It has no gradient, and wants numbers in memory."""
    gradients = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN or x.dtype not in FLOATS or not (x.is_cpu or x.is_cuda):
            return False
        if gradients and x.requires_grad:
            return False
    return True


def transformed() -> bool:
    """Is a tangent carried along, is a transform of torch.func at work, or a trace? torch has no public question for
    the first two."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch._C._is_tracing()


def check_groups(name: str, groups: Tensor | None, x: Tensor) -> None:
    if groups is not None:
        *places, width = x.shape
        if groups.shape != (*places[:-1], 1, width):
            raise ValueError(f"{name} must be {[*places[:-1], 1, width]}, got {list(groups.shape)}")


def beside(x: Tensor, groups: Tensor) -> Tensor:
    """[..., 1, K] as it is multiplied with x [..., K]; one row x [K] has groups [1, K], and stays one."""
    return groups if x.ndim > 1 else groups[0]


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def flat_groups(groups: Tensor | None) -> Tensor | None:
    """[..., 1, K] -> [G, K], as the ops take them."""
    return None if groups is None else groups.reshape(-1, groups.shape[-1]).contiguous()
