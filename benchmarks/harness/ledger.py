"""Which source files make which kernel, and the hash by which a record says what it measured.

A kernel is named <cpu|cuda|triton>/<family>. Its table row names translation units (or Triton modules); the headers
that they include, and those that these include, are found by reading them. bindings.cpp belongs to none: it hands over
addresses. A test holds the table against the tree.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from inferix_kernels.layout import KV_FORMATS

ROOT = Path(__file__).parent.parent.parent
GLUE = ("csrc/bindings.cpp",)


class Kernel(NamedTuple):
    """Source files, and the formats that the kernel is written for."""

    sources: tuple[str, ...]
    formats: tuple[str, ...]


def _sources(folder: str, stems: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{stem}{suffix}" for stem in stems.split())


_CUDA_FORMATS = ("fp32", "fp16", "bf16", "int8")
KERNELS = {
    "cpu/attention": Kernel(_sources("csrc/cpu", "attention decode pages parallel", ".cpp"), KV_FORMATS),
    "cpu/kv_pages": Kernel(_sources("csrc/cpu", "kv_pages encode decode pages parallel", ".cpp"), KV_FORMATS),
    "cpu/qkv": Kernel(_sources("csrc/cpu", "qkv encode pages parallel", ".cpp"), KV_FORMATS),
    "cuda/attention": Kernel(("csrc/cuda/attention.cu",), ("fp32", "fp16", "bf16")),
    "cuda/kv_pages": Kernel(("csrc/cuda/kv_pages.cu",), _CUDA_FORMATS),
    "triton/kv_pages": Kernel(
        _sources("inferix_kernels/triton_kernels", "__init__ codecs kv_pages launch", ".py"), KV_FORMATS
    ),
}
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def files_of(kernel: str, root: Path = ROOT) -> list[Path]:
    """Sources of a kernel with the headers they include, sorted.

    Raises:
        FileNotFoundError: the table names a file that is not there.
    """
    found: set[Path] = set()
    pending = [root / source for source in KERNELS[kernel].sources]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        if not path.exists():
            raise FileNotFoundError(
                f"benchmarks/harness/ledger.py: {kernel} names {path.relative_to(root)}, which is not there"
            )
        found.add(path)
        if path.suffix != ".py":
            for name in _INCLUDE.findall(path.read_text()):
                nearest = [folder / name for folder in (path.parent, root / "csrc") if (folder / name).exists()]
                pending += [nearest[0].resolve()] if nearest else []
    return sorted(found)


@cache
def fingerprint(kernel: str, root: Path = ROOT) -> str:
    """16 hex digits of the SHA-256 over the names and contents of a kernel's files."""
    digest = hashlib.sha256()
    for path in files_of(kernel, root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprints() -> dict[str, str]:
    return {kernel: fingerprint(kernel) for kernel in KERNELS}
