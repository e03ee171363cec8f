"""`inferix convert`: a Wan checkpoint as one safetensors file that needs no other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inferix_kernels.files import require_writable

from ..models import load_model
from .configs import ConvertConfig
from .options import configured

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint that was written.

    Attributes:
        layers, width, heads: of its network.
        dtype: of its weights: "fp32" or "bf16".
        linear: what the inner linear layers' weights are in, if not in that: "int8" or "fp8".
    """

    path: Path
    layers: int
    width: int
    heads: int
    dtype: str
    linear: str | None = None


def convert(config: ConvertConfig | None = None, /, **options: Any) -> ConvertedCheckpoint:
    """Write a Wan checkpoint, low-rank updates merged, as one safetensors file. With linear="int8" or
    "fp8" its inner layers are quantized in it, which is half of bf16's; loaded, it is what the checkpoint is when it is
    loaded with that `linear` and the file's dtype, bit for bit.

    Args:
        config: what to convert.
        options: fields of ConvertConfig, in place of those of `config`; `source` and `out` must be given.

    Raises:
        ValueError: an option is not what it must be, or a file can not be read or written.

    Example:
        >>> made = inferix.convert(source="Wan2.1-T2V-1.3B", out="wan.safetensors", dtype="bf16")  # doctest: +SKIP
        >>> print(made.layers, made.width)  # doctest: +SKIP
        30 1536
    """
    config = configured(ConvertConfig, config, options)
    from ..models.wan import Wan
    from ..models.wan.checkpoint import find_checkpoint, save_network

    out = Path(config.out)
    if out.suffix != ".safetensors":  # by which a checkpoint's format is recognised
        raise ValueError(f"out must end in .safetensors, got {str(out)!r}")
    require_writable(out, "out")
    model = load_model(config.model, str(config.source), dtype=DTYPES[config.dtype], **config.arguments("model"))
    if not isinstance(model, Wan):
        raise ValueError(f"model must be a Wan model, got {config.model!r}")
    save_network(model.network, out, source=find_checkpoint(config.source).name)
    network = model.network.config
    return ConvertedCheckpoint(out, network.layers, network.dim, network.heads, config.dtype, model.linear)


def run(config: ConvertConfig) -> int:
    made = convert(config)
    kept = f"{made.linear} and {made.dtype}" if made.linear else made.dtype
    print(f"{made.path}: {made.layers} layers of width {made.width}, {made.heads} heads, {kept}")
    return 0
