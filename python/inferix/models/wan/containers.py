"""The files that hold a network's tensors: safetensors, shards with an index, torch pickles."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inferix_kernels._install import require

ZSTD = ".zst"
SHOWN = 5  # names listed in an error
WRAPPERS = ("state_dict", "model", "module")  # names under which a trainer may file its one state dict


def read_tensors(path: Path, parts: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, mapped rather than read where the format allows it, and its string metadata.

    Args:
        path: .safetensors, the .index.json of shards (both may be compressed: .zst), or a torch pickle (.pt, .pth).
        parts: names of the state dicts to take, if a pickle holds several; the first that is there.

    Raises:
        ValueError: the file is missing or damaged, holds code, or holds none of `parts`.
        ImportError: a file is compressed and zstandard is not installed; names the extra.
    """
    try:
        if path.suffix in (".safetensors", ZSTD):
            return _read_safetensors(path)
        if path.suffix == ".json":
            return _read_shards(path)
        return _state_dict(_read_pickle(path), parts, path), {}
    except FileNotFoundError:
        raise ValueError(f"weights: there is no file {path}") from None
    except (SafetensorError, OSError, EOFError) as error:
        raise ValueError(f"weights: {path} is damaged or not what its name says ({error})") from None


def shown(names: Sequence[str]) -> str:
    """The first few of these names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "none"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ZSTD:
        # Into a file without a name: its pages are mapped as those of any other, and go when the tensors do.
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as plain:
            _decompress(path, plain)
            return _read_safetensors(Path(plain.name))
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118, not a dict


def _decompress(path: Path, plain: IO[bytes]) -> None:
    zstandard = require("zstandard", "magi", f"weights: {path}, being compressed,")
    try:
        with path.open("rb") as file:
            zstandard.ZstdDecompressor().copy_stream(file, plain)
    except zstandard.ZstdError as error:
        raise ValueError(f"weights: {path} is damaged or not compressed by zstd ({error})") from None
    plain.flush()


def _read_shards(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        where: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"weights: {path} is not an index of shards: it has no 'weight_map'") from None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(where.values())):
        found = [file for file in (path.parent / shard, path.parent / (shard + ZSTD)) if file.exists()]
        if not found:
            raise ValueError(f"weights: {path} names the shard {shard}, which is not beside it")
        tensors |= _read_safetensors(found[0])[0]
    if absent := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"weights: {path} names tensors that its shards do not hold: {shown(absent)}")
    return tensors, {}


def _read_pickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format from before torch 1.6
    except pickle.UnpicklingError:
        raise ValueError(f"weights: {path} holds more than tensors, or is no checkpoint; it was not run") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"weights: {path} is damaged or not a torch checkpoint ({reason})") from None


def _state_dict(content: Any, parts: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The state dict in what a pickle held: the content itself, or one of its parts."""
    for _ in range(3):  # e.g. {"generator": {"model": {...}}}
        if not isinstance(content, dict):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = [part for part in (*parts, *WRAPPERS) if isinstance(content.get(part), dict)]
        if not inner:
            wanted = f"tensors, or one of {', '.join(parts)}" if parts else "tensors"
            raise ValueError(f"weights: {path} must hold {wanted}, got {shown(sorted(map(str, content)))}")
        content = content[inner[0]]
    raise ValueError(f"weights: {path} must hold a dictionary of tensors, got {type(content).__name__}")
