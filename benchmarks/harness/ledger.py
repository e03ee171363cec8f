"""Which source files make which kernel, and the hash by which a record says what it measured.

A kernel is named <cpu|cuda|triton>/<family>. Which files it is made of follows from their names: a file whose name
begins with a family's belongs to it, any other to all families of its folder. C++ headers belong to who includes them.
So there is no table to forget; a test looks that no file is left out. bindings.cpp, which hands over
addresses, and spans.cpp, the profiler's, belong to none.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from inferix_kernels.layout import KV_FORMATS

ROOT = Path(__file__).parent.parent.parent
# What the families' rows name as formats: of pages, or of 8-bit weights.
FORMATS = {"attention": KV_FORMATS, "kv_pages": KV_FORMATS, "qkv": KV_FORMATS, "linear": ("int8", "fp8")}


class Folder(NamedTuple):
    path: str
    suffixes: tuple[str, ...]


FOLDERS = {
    "cpu": Folder("csrc/cpu", (".cpp",)),
    "cuda": Folder("csrc/cuda", (".cu",)),
    "triton": Folder("inferix_kernels/triton_kernels", (".py", ".json")),  # .json: what was tuned
}
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def kernels(root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """Kernel -> its formats, of all kernels that there are."""
    found = {f"{device}/{family}": formats for device in FOLDERS for family, formats in FORMATS.items()}
    return {name: formats for name, formats in found.items() if _own(name, root)}


def family_of(path: Path) -> str:
    """ "" for a file that all families of its folder share."""
    return next((family for family in FORMATS if path.stem.startswith(family)), "")


def files_of(kernel: str, root: Path = ROOT) -> list[Path]:
    """Sources of a kernel with the headers that they include, and that these include, sorted."""
    device = kernel.split("/")[0]
    pending = _own(kernel, root) + [path for path in _sources(device, root) if not family_of(path)]
    found: set[Path] = set()
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += _included(path, root)
    return sorted(found)


def _own(kernel: str, root: Path) -> list[Path]:
    device, family = kernel.split("/")
    return [path for path in _sources(device, root) if family_of(path) == family]


def _sources(device: str, root: Path) -> list[Path]:
    folder = FOLDERS[device]
    return [path for path in (root / folder.path).rglob("*") if path.suffix in folder.suffixes]


def _included(path: Path, root: Path) -> list[Path]:
    if path.suffix in (".py", ".json"):
        return []
    places = [[folder / name for folder in (path.parent, root / "csrc")] for name in _INCLUDE.findall(path.read_text())]
    return [next(place for place in both if place.exists()).resolve() for both in places if any(map(Path.exists, both))]


@cache
def fingerprint(kernel: str, root: Path = ROOT) -> str:
    """16 hex digits of the SHA-256 over the names and contents of a kernel's files."""
    digest = hashlib.sha256()
    for path in files_of(kernel, root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprints() -> dict[str, str]:
    return {kernel: fingerprint(kernel) for kernel in kernels()}
