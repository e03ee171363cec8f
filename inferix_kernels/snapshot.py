"""A world's past on disk: `save` and `load`, bit for bit, in one safetensors file.

The file holds, for each format in use, one tensor per part of its pages (codes, scales, offsets), [layers, pages, ...]
with the frames in the order of the table; the frozen key means; and as metadata the version, the store's geometry, the
policy, the list of frames, and which of them wait in host memory. Blocks that are still open are not part of the past,
and not of the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._install import require
from .layout import KVPages, as_bytes
from .paged_kv import Extent, KVStore
from .policy import Policy

if TYPE_CHECKING:
    from .page_table import PageTable

VERSION = 1


def save(table: PageTable, path: str | os.PathLike[str]) -> None:
    """Write the table's past to `path`. A crash in the middle leaves what was there before.

    A policy's `on_evict` is code and not saved: give it again to `load`.
    """
    save_file = require("safetensors.torch", "driver", "path: a snapshot").save_file

    store, path = table.store, Path(path)
    tensors: dict[str, Tensor] = {}
    for format in dict.fromkeys(extent.format for extent in table.held.values()):
        extents = [extent for extent in table.held.values() if extent.format == format]
        layers = [[_pages(store, extent, layer) for extent in extents] for layer in range(store.num_layers)]
        for i, field in enumerate(KVPages._fields):
            parts = [[as_bytes(x).cpu() for pages in frames if (x := pages[i]) is not None] for frames in layers]
            if parts[0]:
                tensors[f"{format}.{field}"] = torch.stack([torch.cat(frames) for frames in parts])
    means = [mean for mean in table.k_means if mean is not None]
    if means:
        tensors["k_means"] = torch.stack(means).cpu()
    policy = {f.name: getattr(table.policy, f.name) for f in dataclasses.fields(Policy) if f.name != "on_evict"}
    state = {
        "version": VERSION,
        "geometry": store.geometry,
        "policy": policy,
        "next_frame": table.next_frame,
        "frames": [[frame, extent.format] for frame, extent in table.held.items()],
        "pinned": sorted(table.pinned),
        "cold": sorted(table.cold),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, {"inferix": json.dumps(state)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(store: KVStore, path: str | os.PathLike[str], policy: Policy | None = None) -> PageTable:
    """The world saved in `path`, over `store`; under another policy if one is given.

    Frames that waited in host memory wait there again, if the store has a pool of their format there.

    Raises:
        ValueError: the file can't be read, is not a snapshot, or of another version, model or geometry: the difference
            is named.
        OutOfPages: the store has no room for it. Nothing was changed.
    """
    safetensors = require("safetensors", "driver", "path: a snapshot")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _load(store, file, path, policy)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"path must be a snapshot of a world, got {path}: {error}") from None


def _load(store: KVStore, file: Any, path: str | os.PathLike[str], policy: Policy | None) -> PageTable:
    state = _checked(store, file.metadata(), path)
    saved = state["policy"]
    saved["older"] = saved["older"] and tuple(saved["older"])
    table, formats = store.open(policy or Policy(**saved)), dict(state["frames"])
    cold = [frame for frame in state.get("cold", []) if formats[frame] in store.host]
    table.held, table.cold = _allocate(store, formats, cold), set(cold)
    try:
        for format in dict.fromkeys(formats.values()):
            _restore(store, [extent for extent in table.held.values() if extent.format == format], format, file)
        if "k_means" in file.keys():  # noqa: SIM118 (safe_open is no dict)
            table.k_means = list(file.get_tensor("k_means").to(store.device).unbind())
        elif store.freezes_mean and state["next_frame"]:
            # Nothing was taken off these keys: so it stays, lest attention mix keys with and without.
            zeros = torch.zeros(store.num_layers, store.heads, store.scratch.head_dim, device=store.device)
            table.k_means = list(zeros)
    except BaseException:
        table.release()
        raise
    table.next_frame, table.pinned = state["next_frame"], set(state["pinned"])
    return table


def _allocate(store: KVStore, formats: dict[int, str], cold: list[int]) -> dict[int, Extent]:
    """An extent per frame, all or none: the cold ones in host memory."""
    hot = [frame for frame in formats if frame not in cold]
    extents = dict(zip(hot, store.allocate([formats[frame] for frame in hot])))
    try:
        extents |= dict(zip(cold, store.allocate([formats[frame] for frame in cold], in_host=True)))
    except BaseException:
        for extent in extents.values():
            store.release(extent)
        raise
    return {frame: extents[frame] for frame in formats}


def _checked(store: KVStore, metadata: dict[str, str] | None, path: str | os.PathLike[str]) -> dict[str, Any]:
    if not metadata or "inferix" not in metadata:
        raise ValueError(f"path must be a snapshot of a world, got {path}: it has no such header")
    try:
        state: dict[str, Any] = json.loads(metadata["inferix"])
        version = state["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"path must be a snapshot of a world, got {path}: its header is damaged") from None
    if version != VERSION:
        raise ValueError(f"path must be a snapshot of version {VERSION}, got version {version} in {path}")
    ours = json.loads(json.dumps(store.geometry))  # tuples become lists, as in the file
    differences = [f"{n} {theirs!r} (here {ours[n]!r})" for n, theirs in state["geometry"].items() if theirs != ours[n]]
    if differences:
        raise ValueError(f"path must be a snapshot of this store's model, got {path} with {', '.join(differences)}")
    return state


def _pages(store: KVStore, extent: Extent, layer: int) -> KVPages:
    if extent.resident:
        assert extent.slot is not None
        return store.pools[extent.format].slot(layer, extent.slot)
    assert extent.host_slot is not None
    return store.host[extent.format].slot(layer, extent.host_slot)


def _restore(store: KVStore, extents: list[Extent], format: str, file: Any) -> None:
    n = store.pages_per_frame
    for i, field in enumerate(KVPages._fields):
        if _pages(store, extents[0], 0)[i] is None:
            continue
        tensor = file.get_tensor(f"{format}.{field}")  # [layers, frames * n, ...]
        for layer in range(store.num_layers):
            for j, extent in enumerate(extents):
                target = _pages(store, extent, layer)[i]
                assert target is not None, "the format has this field"
                as_bytes(target).copy_(tensor[layer, j * n : (j + 1) * n])
