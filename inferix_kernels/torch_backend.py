"""8-bit linear layers in torch's own kernels: backend="torch".

The product is `torch._int_mm` for int8 codes and `torch._scaled_mm` for e4m3 ones; all around it is plain torch, in
float32, as ops.py has it. On a GPU `auto` takes it before kernels of ours that nobody has proved there (proofs/), and
on any device where a record says that it is faster (proofs/speeds.py). Never run on a GPU.

On a CPU the e4m3 product is that of float32 matrices: torch 2.13's `_scaled_mm` took 5.7 s there for [128, 512] x
[512, 512] (Xeon with AMX, one thread), thousands of times as long.

The product is made with unit scales and a float32 result: with a scale per row and per channel CUDA writes bfloat16
only, and a bias, an activation and a residual would then be added to a rounded product.

Source of the limits below: aten/src/ATen/native/cuda/Blas.cpp of github.com/pytorch/pytorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import Unsupported
from .layout import Quantized, as_bytes
from .reference.linear import finish, quantize_rows

__all__ = ["linear", "quantize_rows"]

MAX_INT8_TERMS = 131071  # of a sum of 32 bits, as in csrc/linear.h
# On CUDA: what sizes of N and K must be multiples of, and the least M.
MULTIPLE = {torch.int8: 8, torch.float8_e4m3fn: 16}
LEAST_ROWS = {torch.int8: 17, torch.float8_e4m3fn: 1}
LEAST_TERMS = 2  # of K = 1 torch 2.13's `_int_mm` returns other numbers on a CPU (oneDNN 3.12, every M, every N > 1)


def linear(
    x: Quantized,
    weight: Quantized,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor,
) -> Tensor:
    require(x.codes)
    (rows, terms), columns = x.codes.shape, len(weight.codes)
    if rows and columns and terms:
        least, multiple = padding(x.codes)
        wide = max(terms + -terms % multiple, LEAST_TERMS)
        padded = (
            padded_to(x.codes, max(rows, least), wide),
            padded_to(weight.codes, columns + -columns % multiple, wide),
        )
        y = product(*padded)[:rows, :columns]
    else:
        y = torch.zeros(rows, columns, device=out.device)
    return finish(y * (x.scales[:, None] * weight.scales), bias, activation, gate, residual, out)


def require(codes: Tensor) -> None:
    """Raise Unsupported unless torch has the product of such codes here."""
    if codes.dtype == torch.int8:
        if codes.shape[1] > MAX_INT8_TERMS:
            raise Unsupported(
                f"torch._int_mm sums in 32 bits, so at most {MAX_INT8_TERMS} columns, got {codes.shape[1]}"
            )
    elif codes.is_cuda and (capability := torch.cuda.get_device_capability(codes.device)) < (8, 9):
        raise Unsupported(
            f"torch._scaled_mm of e4m3 needs sm_89 or later, and this is sm_{capability[0]}{capability[1]}"
        )


def padding(codes: Tensor) -> tuple[int, int]:
    """The least number of rows, and the multiple of all other sizes, that the product takes."""
    return (LEAST_ROWS[codes.dtype], MULTIPLE[codes.dtype]) if codes.is_cuda else (1, 1)


def padded_to(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right, which add nothing to a product."""
    more = 0, columns - codes.shape[1], 0, rows - len(codes)
    return torch.nn.functional.pad(as_bytes(codes), more).view(codes.dtype) if any(more) else codes


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of codes [M, K] and [N, K]: [M, N] float32."""
    try:
        if x.dtype == torch.int8:
            return torch._int_mm(x, weight.mT).float()
        return scaled_mm(x, weight) if x.is_cuda else x.float() @ weight.float().mT
    except RuntimeError as error:  # of a torch that was built without the library, or of cuBLAS
        if isinstance(error, NotImplementedError) or "NOT_SUPPORTED" in str(error):
            raise Unsupported(str(error).splitlines()[0]) from error
        raise


def scaled_mm(x: Tensor, weight: Tensor) -> Tensor:
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight.mT, scale_a=one, scale_b=one, out_dtype=torch.float32)
