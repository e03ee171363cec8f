"""A world's past on disk: `save` and `load`, bit for bit, in one safetensors file.

The file holds, for each format in use, one tensor per part of its pages (codes, scales, offsets), [layers, pages, ...]
with the frames in the order of the table; the frozen key means; and as metadata the version, the store's geometry, the
policy, the list of frames, which of them wait in host memory, and checksums (CRC-32) of each tensor and of all that.
Blocks that are still open are not part of the past, and not of the file. Nor does it say how many ranks held it: what n
ranks held is read by m, each of which takes what it is to hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._install import require
from ..files import atomic_write
from ..layout import as_bytes
from .extent import Extent
from .kv_store import KVStore
from .page_table import PageTable
from .past import Past
from .policy import Policy
from .shard import Shard
from .slots import Slot
from .storage import Storage
from .table_view import TableView

VERSION = 2  # 1 had no checksums


Collect = Callable[[Tensor, Sequence[int]], "Sequence[Tensor] | None"]
"""Of several ranks: (blob of this rank, bytes of the first ranks' blobs, one by one) -> those blobs on rank 0, and None
on the others."""


def save(table: TableView, path: str | os.PathLike[str]) -> None:
    """Write the table's past to `path`. A crash in the middle leaves what was there before.

    A policy's `on_evict` is code and not saved: give it again to `load`. Of several ranks, of which
    each holds all, rank 0 alone writes; what each holds a part of, `taken` brings together.

    Raises:
        ValueError: the file can not be written; names it. Or the store holds a part of the heads or frames.

    Example:
        >>> import tempfile
        >>> from inferix_kernels.store.snapshot import load, save
        >>> store = KVStore(layers=1, heads=1, head_dim=16, frame_tokens=8, block_frames=1, page_size=8,
        ...     pools={"int8": 2})
        >>> table = store.open(Policy(window=2))
        >>> table.plan([block := table.open_block(1)], commit=block).append(0, *torch.randn(2, 8, 1, 16))
        >>> table.seal(block)
        >>> path = f"{tempfile.mkdtemp()}/world.safetensors"
        >>> save(table, path)
        >>> again = load(store, path)
        >>> torch.equal(again.gather(0, [0])[0], table.gather(0, [0])[0])
        True
    """
    require("safetensors.torch", "driver", "path: a snapshot")
    if (snapshot := taken(table)) is not None:
        snapshot.write(path)


class Snapshot(NamedTuple):
    """A past, in host memory.

    Attributes:
        tensors: by format and field, and "k_means".
        state: the rest, for the file's header.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def write(self, path: str | os.PathLike[str]) -> None:
        """As `save`."""
        save_file = require("safetensors.torch", "driver", "path: a snapshot").save_file
        checksums = {name: _checksum(tensor) for name, tensor in self.tensors.items()}
        header = json.dumps(self.state | {"checksums": checksums})
        with atomic_write(path) as part:
            save_file(self.tensors, part, {"inferix": header, "crc32": str(zlib.crc32(header.encode()))})


def taken(table: TableView, collect: Collect | None = None) -> Snapshot | None:
    """The table's past as it is now; of several ranks, which all call this, on rank 0, and None on the others.

    Args:
        collect: brings to rank 0 what the ranks hold. It is not called where rank 0 holds all.

    Raises:
        ValueError: there is no `collect`, and the store holds a part of the heads or frames.

    Example: that of `save`, which writes what this returns.
    """
    shard = table.store.shard
    if not shard.whole and collect is None:
        raise ValueError(f"table must be of a store with all heads and frames, got one with {shard}")
    with table.turn:
        tensors, state = {} if shard.whole and shard.rank else _tensors(table, collect), _state(table)
    return None if shard.rank else Snapshot(tensors, state)


def _tensors(table: TableView, collect: Collect | None) -> dict[str, Tensor]:
    store, tensors, held = table.store, {}, table.state.held.values()
    for format in dict.fromkeys(extent.format for extent in held):
        places = [_place(extent) for extent in held if extent.format == format]
        for field in store.pools[format].pages.tensors:
            layers = [_pages(store, places, layer, field, collect) for layer in range(store.num_layers)]
            if here := [pages for pages in layers if pages is not None]:
                tensors[f"{format}.{field}"] = torch.stack(here)
    means = [mean for mean in table.state.k_means if mean is not None]
    if means:
        tensors["k_means"] = torch.stack(means).cpu()
    return tensors


def _pages(store: Storage, places: Sequence[Slot], layer: int, field: str, collect: Collect | None) -> Tensor | None:
    """One field of these frames in a layer, of all heads: [pages, heads, ...]."""
    own = [getattr(place.pool.slot(layer, place.index), field) for place in places if place.own]
    like = as_bytes(getattr(places[0].pool.layers[layer], field))
    part = torch.cat([like[:0].cpu(), *(as_bytes(pages).cpu() for pages in own)])
    shard, n = store.shard, store.pages_per_frame
    if shard.whole or collect is None:
        return part
    # The first ranks have all: each another part of the heads or of the frames.
    first = [dataclasses.replace(shard, rank=rank) for rank in range(shard.heads * shard.frames)]
    frames = [[i for i, place in enumerate(places) if place.group == other.frame_rank] for other in first]
    shapes = [(len(theirs), n, *like.shape[1:]) for theirs in frames]
    blobs = collect(part.view(-1).view(torch.uint8), [math.prod(shape) * part.element_size() for shape in shapes])
    if blobs is None:
        return None
    whole = part.new_empty(len(places), n, store.all_heads, *like.shape[2:])
    for other, theirs, shape, blob in zip(first, frames, shapes, blobs, strict=True):
        whole[theirs, :, heads_of(store, other)] = blob.cpu().view(part.dtype).view(shape)
    return whole.flatten(0, 1)


def heads_of(store: Storage, shard: Shard) -> slice:
    """A rank's heads among all."""
    return slice(shard.head_rank * store.heads, (shard.head_rank + 1) * store.heads)


def _state(table: TableView) -> dict[str, Any]:
    return {
        "version": VERSION,
        "geometry": _geometry(table.store),
        "policy": {name: getattr(table.policy, name) for name in _policy_fields()},
        "next_frame": table.next_frame,
        "frames": [[frame, extent.format] for frame, extent in table.held.items()],
        "pinned": sorted(table.pinned),
        "cold": sorted(table.cold),
        "eight_bit": list(table.state.eight_bit),
    }


def _geometry(store: Storage) -> dict[str, object]:
    """Of the world, however its heads are cut."""
    return store.geometry | {"heads": store.all_heads}


def _place(extent: Extent) -> Slot:
    """Where a frame can be read now."""
    slot = extent.device()
    place = slot if slot is not None and not slot.arriving else extent.host
    assert place is not None, "a frame lies on the device or in host memory"
    return place


def _policy_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Policy) if field.name != "on_evict"]


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def load(store: KVStore, path: str | os.PathLike[str], policy: Policy | None = None) -> PageTable:
    """The world saved in `path`, over `store`; under another policy if one is given.

    Frames that waited in host memory wait there again, if the store has a pool of their format there.

    Raises:
        ValueError: the file can't be read, is damaged, is not a snapshot, or of another version, model or geometry: the
            difference is named. Files of version 1 have no checksums, and changed contents go unseen in them.
        OutOfPages: the store has no room for it. Nothing was changed.

    Example: that of `save`.
    """
    safetensors = require("safetensors", "driver", "path: a snapshot")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"path must be a snapshot of a world, got {path}: it is no file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _checked(store, file.metadata(), path)
            table = store.open(policy or header.policy)
            with store.turn:
                table.state = _restored(store, header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return table
    except _Damaged as error:
        raise ValueError(f"path must be a snapshot of a world, got {path}: {error}") from None
    except (OSError, safetensors.SafetensorError) as error:  # whose words may be long, with some of the file in them
        raise ValueError(
            f"path must be a snapshot of a world, got {path}: {' '.join(str(error).split())[:200]}"
        ) from None


class _Damaged(Exception):
    """A file that no one has saved so; says what is wrong in it."""


@dataclasses.dataclass(frozen=True)
class _Header:
    policy: Policy
    formats: Mapping[int, str]  # of each frame
    cold: Sequence[int]
    pinned: Sequence[int]
    next_frame: int
    eight_bit: tuple[bool, ...]  # of each layer
    checksums: Mapping[str, object] | None  # of each tensor; None: the file has none


def _checked(store: Storage, metadata: dict[str, str] | None, path: str | os.PathLike[str]) -> _Header:
    if not metadata or "inferix" not in metadata:
        raise _Damaged("it has no such header")
    state = _parsed(metadata["inferix"])
    version = state.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ValueError(
            f"path must be a snapshot of version {VERSION} or older, got version {_short(version)} in {path}"
        )
    if version > 1 and metadata.get("crc32") != str(zlib.crc32(metadata["inferix"].encode())):
        raise _Damaged("its header is damaged: the checksum is of another one")
    ours, theirs = _parsed(json.dumps(_geometry(store))), _member(state, "geometry", dict)
    if differences := [
        f"{name[:20]} {_short(theirs.get(name))} (here {ours.get(name)!r})"
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or json.dumps(theirs[name]) != json.dumps(ours[name])
    ]:
        raise ValueError(f"path must be a snapshot of this store's model, got {path} with {', '.join(differences)}")
    next_frame = _member(state, "next_frame", int)
    if not 0 <= next_frame < 1 << 31:
        raise _Damaged(f"its header is damaged: next_frame is {_short(next_frame)}")
    formats = _formats(_member(state, "frames", list), next_frame)
    cold = state.get("cold", []) if version == 1 else state.get("cold")
    return _Header(
        policy=_policy(_member(state, "policy", dict)),
        formats=formats,
        cold=[frame for frame in _frames("cold", cold, formats) if formats[frame] in store.host],
        pinned=_frames("pinned", state.get("pinned"), formats),
        next_frame=next_frame,
        eight_bit=_by_layer(state.get("eight_bit", [False] * store.num_layers), store.num_layers),
        checksums=_member(state, "checksums", dict) if version > 1 else None,
    )


def _parsed(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise _Damaged("its header is damaged")
    return state


def _short(value: object) -> str:
    return repr(value)[:40]


def _member(state: dict[str, Any], name: str, kind: type) -> Any:
    value = state.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Damaged(f"its header is damaged: {name} is {_short(value)}")
    return value


def _formats(frames: list[Any], next_frame: int) -> dict[int, str]:
    """Frame -> format, from the header's list, whose frames increase and have been sealed."""
    for pair in frames:
        if not isinstance(pair, list) or [type(x) for x in pair] != [int, str] or not 0 <= pair[0] < next_frame:
            raise _Damaged(f"its header is damaged: a frame is {_short(pair)}")
    if any(before[0] >= after[0] for before, after in pairwise(frames)):
        raise _Damaged("its header is damaged: its frames are not in order")
    return dict(frames)


def _frames(name: str, frames: object, held: Mapping[int, str]) -> list[int]:
    if not isinstance(frames, list) or any(type(frame) is not int or frame not in held for frame in frames):
        raise _Damaged(f"its header is damaged: {name} is {_short(frames)}")
    return sorted(set(frames))


def _by_layer(eight_bit: object, layers: int) -> tuple[bool, ...]:
    if not isinstance(eight_bit, list) or [type(x) for x in eight_bit] != [bool] * layers:
        raise _Damaged(f"its header is damaged: eight_bit is {_short(eight_bit)}")
    return tuple(eight_bit)


def _policy(saved: dict[str, Any]) -> Policy:
    came_later: dict[str, Any] = {"past_bias": 0.0, "time": "absolute"}  # than files of version 2
    saved = came_later | saved
    if wrong := sorted(set(_policy_fields()) ^ saved.keys()):
        raise _Damaged(f"its header is damaged: the policy lacks, or has besides, {', '.join(wrong)[:80]}")
    if isinstance(saved["older"], list):
        saved["older"] = tuple(saved["older"])
    try:
        return Policy(**saved)
    except (ValueError, TypeError) as error:
        raise _Damaged(f"its header is damaged: {str(error)[:100]}") from None


def _restored(store: Storage, header: _Header, tensors: Mapping[str, Tensor]) -> Past:
    """The past that a file's header and tensors describe, in slots of its own."""
    formats = header.formats
    if unknown := sorted(set(formats.values()) - store.pools.keys()):
        raise _Damaged(f"it has frames in {', '.join(unknown)[:40]}, which has no pool in this store")
    _check_tensors(store, header, tensors)
    cold, hot = list(header.cold), [frame for frame in formats if frame not in set(header.cold)]
    hot_slots, cold_slots = store.take([formats[f] for f in hot]), store.take([formats[f] for f in cold], in_host=True)
    with hot_slots as slots, cold_slots as away:
        places = dict(zip(hot, slots)) | dict(zip(cold, away))
        for format in dict.fromkeys(formats.values()):
            _fill(store, [places[frame] for frame in formats if formats[frame] == format], format, tensors)
        k_means: tuple[Tensor | None, ...] = (None,) * store.num_layers
        if "k_means" in tensors:
            k_means = tensors["k_means"].to(store.device).unbind()
        elif store.freezes_mean and header.next_frame:
            # Nothing was taken off these keys: so it stays, lest attention mix keys with and without.
            shape = store.num_layers, store.all_heads, store.scratch.head_dim
            k_means = torch.zeros(shape, device=store.device).unbind()
    wanted = dict(zip(hot, slots))
    held = {
        frame: Extent(format, wanted[frame]) if frame in wanted else Extent(format, host=places[frame])
        for frame, format in formats.items()
    }
    return Past.empty(store.num_layers)._replace(
        held=held,
        slots=wanted,
        pinned=frozenset(header.pinned),
        next_frame=header.next_frame,
        k_means=k_means,
        eight_bit=header.eight_bit,
    )


def _check_tensors(store: Storage, header: _Header, tensors: Mapping[str, Tensor]) -> None:
    """Raises _Damaged unless they are the tensors of these frames, of the right shapes, and have the right sums."""
    formats = list(header.formats.values())
    wanted = {
        f"{format}.{field}": (store.num_layers, formats.count(format) * store.pages_per_frame, as_bytes(page[0]))
        for format in dict.fromkeys(formats)
        for field, page in store.pools[format].pages.tensors.items()
    }
    heads = store.all_heads
    shapes = {name: ((layers, n, heads, *page.shape[1:]), page.dtype) for name, (layers, n, page) in wanted.items()}
    if "k_means" in tensors:
        shapes["k_means"] = (store.num_layers, store.all_heads, store.scratch.head_dim), torch.float32
    if wrong := sorted(shapes.keys() ^ tensors.keys()):
        raise _Damaged(f"it lacks, or has besides, {', '.join(wrong)[:80]}")
    for name, (shape, dtype) in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise _Damaged(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        if header.checksums is not None and header.checksums.get(name) != _checksum(tensor):
            raise _Damaged(f"{name} is damaged: its checksum is of other contents")


def _fill(store: Storage, places: Sequence[Slot], format: str, tensors: Mapping[str, Tensor]) -> None:
    """What lies in this process of these frames."""
    n, heads = store.pages_per_frame, heads_of(store, store.shard)
    for field in store.pools[format].pages.tensors:
        tensor = tensors[f"{format}.{field}"]  # [layers, frames * n, ...]
        for layer in range(store.num_layers):
            for j, place in enumerate(places):
                if place.own:
                    target = place.pool.slot(layer, place.index).tensors[field]
                    as_bytes(target).copy_(tensor[layer, j * n : (j + 1) * n, heads])
