"""Do all ranks make the same pass? Compared before anything else is sent in a forward, in a few bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from ..store.attention import Reads
from .transport import Message, Transport

DIGEST = 8  # bytes, of each field
DIGESTS = 8 * DIGEST  # of all fields
LENGTH = 8  # bytes of the length of a field that differs, which the ranks send each other to say where


class Facts(NamedTuple):
    """What must be the same on every rank, in the order in which it is compared, each as a list of small facts."""

    fields: dict[str, list[str]]
    digests: bytes


def fields(schedule: str, reads: Reads, q: Tensor | None) -> Facts:
    """Of a pass, how its queries attend, and those that `begin` was given."""
    store, shard = reads.store, reads.store.shard
    found = {
        "attention": [schedule],
        "shard": [f"ranks={shard.ranks}", f"heads={shard.heads}", f"frames={shard.frames}"],
        "store": [
            *(f"{name}={value}" for name, value in store.geometry.items()),
            *(f"pools[{format!r}]={pool.frames}" for format, pool in store.pools.items()),
            f"scratch_format={store.scratch.format}",
            f"precision={store.precision}",
        ],
        "qkv": ["none"] if q is None else [f"{q.dtype}".removeprefix("torch."), f"{q.shape[1]} query heads"],
        "blocks": [f"world {block.world}: {block.queries} tokens" for block in reads.blocks],
        "see": [
            f"block {i}: {' '.join(map(str, frame.place))}"
            for i, block in enumerate(reads.blocks)
            for frame in block.frames
        ],
        "commit": [f"scratch {frame} to {format} {slot}" for frame, format, slot in reads.commits],
        "predict": [str(reads.predict)],
    }
    each = (blake2b("\n".join(facts).encode(), digest_size=DIGEST).digest() for facts in found.values())
    return Facts(found, b"".join(each))


def compare(transport: Transport, mine: Facts) -> None:
    """Raises ValueError, the same on every rank, unless all ranks have the same facts; it names the first thing that
    differs, and on which rank. Each rank sends each other one `DIGESTS` bytes."""
    digests = mine.digests
    theirs = exchanged(transport, digests)
    if all(each == digests for each in theirs):
        return
    for i, (name, facts) in enumerate(mine.fields.items()):
        if len({each[i * DIGEST : (i + 1) * DIGEST] for each in theirs}) > 1:
            text = "\n".join(facts).encode()
            sizes = [
                int.from_bytes(size, "little") for size in exchanged(transport, len(text).to_bytes(LENGTH, "little"))
            ]
            texts = exchanged(transport, text.ljust(max(sizes), b"\0"))
            raise ValueError(_difference(name, [each[:size].decode() for each, size in zip(texts, sizes)]))
    raise AssertionError("digests that differ differ in a field")


def exchanged(transport: Transport, mine: bytes) -> list[bytes]:
    """What each rank gave, in the order of the ranks; all give as many bytes."""
    blob = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(transport.device)
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    received = {rank: torch.empty_like(blob) for rank in others}
    transport.post(
        [Message(rank, blob) for rank in others], [Message(rank, into) for rank, into in received.items()]
    ).wait()
    received[transport.rank] = blob
    return [bytes(received[rank].cpu().numpy()) for rank in range(transport.size)]


def _difference(name: str, texts: Sequence[str]) -> str:
    usual, _ = Counter(texts).most_common(1)[0]
    rank = next(rank for rank, text in enumerate(texts) if text != usual)
    want, got = usual.splitlines(), texts[rank].splitlines()
    at = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), min(len(want), len(got)))
    these, those = (repr(facts[at]) if at < len(facts) else "nothing" for facts in (want, got))
    return f"{name} must be the same on all ranks, got {those} on rank {rank} and {these} on rank {texts.index(usual)}"
