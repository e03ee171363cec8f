"""Snapshots of several ranks, each with the heads and frames that it holds, made into the one of their whole world."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._install import require
from .shard import Shard
from .snapshot import Damaged, checksum, parsed, write

OWN = ("shard", "checksums")  # of a header, what differs between the ranks of a world


class _Part(NamedTuple):
    path: str
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    shard: Shard
    holds: Sequence[int]  # frames

    @property
    def place(self) -> tuple[int, int]:
        """(which frames, which heads) it has."""
        return self.shard.frame_rank, self.shard.head_rank


def join(parts: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write the snapshot that one process would have saved of a world, from those that its ranks have saved.

    Args:
        parts: the files of all ranks or, where some hold the same, of as many as hold everything; in any order.
        path: of the new file, which `snapshot.load` takes on any number of ranks.

    Raises:
        ValueError: a file is no rank's snapshot, or of another world than the first, or damaged; or a part is missing.

    Example:
        >>> import tempfile
        >>> from inferix_kernels.store.joining import join
        >>> from inferix_kernels.store.snapshot import load, save
        >>> sizes = dict(layers=1, heads=2, head_dim=16, frame_tokens=8, block_frames=1, page_size=8, pools={"fp32": 2})
        >>> paths = [f"{tempfile.mkdtemp()}/rank {rank}" for rank in range(2)]
        >>> for rank in range(2):
        ...     save(KVStore(**sizes, shard=Shard(rank, ranks=2, heads=2)).open(Policy()), paths[rank])
        >>> join(paths, paths[0] + " and the other")
        >>> load(KVStore(**sizes), paths[0] + " and the other").next_frame
        0
    """
    if not parts:
        raise ValueError("parts must be the snapshots of all ranks, got none")
    read = [_read(part) for part in parts]
    first = {name: value for name, value in read[0].state.items() if name not in OWN}
    for part in read[1:]:
        same = {name: value for name, value in part.state.items() if name not in OWN}
        if wrong := [name for name in first if same.get(name) != first[name]]:
            raise ValueError(
                f"parts must be of one world, got another {wrong[0]} in {part.path} than in {read[0].path}"
            )
    found = {part.place: part for part in read}
    shard = read[0].shard
    wanted = {(group, heads) for group in range(shard.frames) for heads in range(shard.heads)}
    if lost := sorted(wanted - found.keys()):
        raise ValueError(f"parts must hold all of a world, got none with frames {lost[0][0]} and heads {lost[0][1]}")
    write(path, _joined(found, shard.frames, shard.heads, first["frames"]), first)


def _read(path: str | os.PathLike[str]) -> _Part:
    safetensors = require("safetensors", "driver", "parts: snapshots")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"parts must be snapshots, got {path}: {' '.join(str(error).split())[:200]}") from None
    try:
        header = metadata["inferix"]
        state = parsed(header)
        names = dict(state["shard"])
        holds, shard, checksums = names.pop("holds"), Shard(**names), dict(state["checksums"])
    except (Damaged, KeyError, TypeError, ValueError):
        raise ValueError(f"parts must be of one rank each, got {path}, which is no rank's part of a world") from None
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    if metadata.get("crc32") != str(zlib.crc32(header.encode())) or sums != checksums:
        raise ValueError(f"parts must be whole, got {path}, which is damaged")
    return _Part(str(path), state, tensors, shard, holds)


def _joined(
    found: Mapping[tuple[int, int], _Part], groups: int, heads: int, frames: Sequence[tuple[int, str]]
) -> dict[str, Tensor]:
    """The tensors of all heads and frames, in the order of the frames."""
    tensors = {}
    for group in range(groups):
        part = found[group, 0]
        for name in part.tensors.keys() - {"k_means"}:
            each = [found[group, head].tensors[name] for head in range(heads)]
            tensors[group, name] = torch.cat(each, 2)  # [layers, pages, heads, ...]
    joined = {}
    for name in {name: None for _, name in tensors}:
        format = name.split(".")[0]
        pieces: dict[int, Tensor] = {}
        for group in range(groups):
            own = [frame for frame, its in frames if its == format and frame in found[group, 0].holds]
            if own:
                pieces |= dict(zip(own, tensors[group, name].chunk(len(own), 1), strict=True))
        joined[name] = torch.cat([pieces[frame] for frame, its in frames if its == format], 1).contiguous()
    if "k_means" in found[0, 0].tensors:
        joined["k_means"] = found[0, 0].tensors["k_means"]
    return joined
