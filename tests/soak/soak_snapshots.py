"""Snapshots that were damaged: each is refused with a ValueError, or loads as what was saved, and takes no pages.

    python -m tests.soak.soak_snapshots --count 2000 --seed 0

Bytes are changed, cut off, put in, swapped; headers are crafted with checksums that are right.
"""

import argparse
import json
import random
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import torch

from inferix_kernels import OutOfPages, Policy
from inferix_kernels.store.snapshot import load, save
from tests.store.stores import add_blocks, equal, open_store

# What a member of a header may be in place of what it is.
VALUES = (
    *(None, True, 0, -1, 1, 2**31, 10**30, 0.5, "", "int8", [], {}, [[]], [0], [[0, "int8"]], [["0", "int8"]]),
    *([[0, "nope"]], [[0, "int8"], [0, "int8"]], [[1, "int8"], [0, "int8"]], [[10**12, "int8"]], [5, 5], "[" * 2000),
)


def world():
    store = open_store(pools={"int8": 9, "int4": 4}, host={"int8": 3}, model="soak")
    table = store.open(Policy(9, older=(6, "int4"), format="int8"))
    add_blocks(table, 3)
    table.pin([4])
    table.offload([7])
    return table


def parts(raw):
    """The header of a safetensors file as a value, and what follows it."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def whole(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed(value, choose):
    """A JSON value with one member, at any depth, changed, gone or given twice."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(sorted(value))
        kind = choose.randint(0, 9)
        if kind == 0:
            return {name: x for name, x in value.items() if name != key}
        if kind == 1:
            return {**value, key + "x": value[key]}
        return {**value, key: changed(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        i = choose.randrange(len(value))
        return [*value[:i], *[changed(value[i], choose)] * choose.choice([1, 1, 1, 0, 2]), *value[i + 1 :]]
    return choose.choice(VALUES)


def damaged(raw, choose):
    """(what was done, the file)."""
    kind = choose.choice(
        ["byte", "byte", "bytes", "cut", "put in", "swapped", "safetensors", "crafted", "crafted", "old"]
    )
    at = choose.randrange(len(raw))
    if kind == "byte":
        return kind, raw[:at] + bytes([raw[at] ^ (1 << choose.randrange(8))]) + raw[at + 1 :]
    if kind == "bytes":
        count = choose.randint(1, 64)
        return kind, raw[:at] + choose.randbytes(count) + raw[at + count :]
    if kind == "cut":
        return kind, raw[:at]
    if kind == "put in":
        return kind, raw[:at] + choose.randbytes(choose.randint(1, 9)) + raw[at:]
    if kind == "swapped":
        end = choose.randrange(at, len(raw))
        return kind, raw[:at] + raw[at:end][::-1] + raw[end:]
    header, rest = parts(raw)
    if kind == "safetensors":
        return kind, whole(changed(header, choose), rest)
    # Crafted: the checksum of the header is right; or a file of version 1, which has none.
    state = changed(json.loads(header["__metadata__"]["inferix"]), choose)
    if kind == "old" and isinstance(state, dict):
        state = {name: x for name, x in state.items() if name != "checksums"} | {"version": 1}
    text = json.dumps(state)
    metadata = {"inferix": text, "crc32": str(zlib.crc32(text.encode()))}
    return kind, whole({**header, "__metadata__": metadata}, rest)


def soak(count, seed):
    """How many of each kind were refused, and loaded. Raises AssertionError, naming the seed, at the first fault."""
    torch.manual_seed(0)
    table, store = world(), open_store(pools={"int8": 9, "int4": 4}, host={"int8": 3}, model="soak")
    counts, free = Counter(), [pool.free for pool in (*store.pools.values(), *store.host.values())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "world.safetensors"
        save(table, path)
        raw, want = path.read_bytes(), readable(load(store, path))
        for i in range(count):
            choose = random.Random(f"{seed}/{i}")
            kind, file = damaged(raw, choose)
            path.write_bytes(file)
            try:
                loaded = load(store, path)
            except (ValueError, OutOfPages) as error:
                assert "\n" not in str(error) and len(str(error)) < 600, f"seed {seed}/{i}: {error}"
                counts[f"{kind}: refused"] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed}/{i}, {kind}: {type(error).__name__}: {error}") from error
            else:
                if kind not in ("crafted", "old"):
                    assert equal(readable(loaded), want), f"seed {seed}/{i}, {kind}: loads as something else"
                usable(loaded)
                counts[f"{kind}: loaded"] += 1
                loaded.release()
                del loaded
            now = [len(pool.free) for pool in (*store.pools.values(), *store.host.values())]
            assert now == [len(pool) for pool in free], f"seed {seed}/{i}, {kind}: pages leaked"
    return counts


def readable(table):
    frames = [frame for frame in table.held if frame not in table.cold]
    return [table.gather(layer, frames) for layer in range(table.store.num_layers)] if frames else []


def usable(table):
    """What was loaded can be read and forked, whatever its header says."""
    fork = table.fork()
    readable(fork)
    fork.gone(fork.next_frame)
    fork.release()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = soak(args.count, args.seed)
    print(f"seed {args.seed}, {sum(counts.values())} damaged snapshots: ", end="")
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    print("0 other errors, 0 wrong contents, 0 leaks")


if __name__ == "__main__":
    main()
