"""Snapshots: what comes back is what was saved, in another process too; what does not belong is refused."""

import errno
import hashlib
import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from inferix_kernels import KVStore, OutOfPages, Policy
from inferix_kernels.store.snapshot import load, save
from tests.soak import soak_snapshots

ROOT = str(Path(__file__).parents[2])
MIXED = Policy(window=9, sink=2, format="i8f8", sink_format="bf16", older=(5, "int4"))


def open_store(**options):
    sizes = {"layers": 2, "heads": 2, "head_dim": 16, "frame_tokens": 21, "page_size": 8, "block_frames": 3}
    return KVStore(**(sizes | {"pools": MIXED.capacity(), "model": "test", "backend": "reference"} | options))


def add_block(table, seed):
    generator = torch.Generator().manual_seed(seed)
    block = table.open_block(3)
    passed = table.plan([block], commit=block)
    for layer in range(2):
        passed.append(layer, *(torch.randn(63, 2, 16, generator=generator) for _ in range(2)))
    table.seal(block)


def video(blocks=4):
    table = open_store().open(MIXED)
    for seed in range(blocks):
        add_block(table, seed)
    return table


def digest(table):
    frames = [f for f in table.held if f not in table.cold]
    bits = [x.numpy().tobytes() for layer in range(2) for x in table.gather(layer, frames)]
    return hashlib.sha256(b"".join([repr(list(table.held)).encode(), *bits])).hexdigest()


CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.store.test_snapshot import add_block, digest, open_store
from inferix_kernels.store.snapshot import load
table = load(open_store(), {path!r})
print(digest(table))
add_block(table, 99)
print(digest(table))
"""


def test_another_process_goes_on_from_a_snapshot_bit_for_bit(tmp_path):
    table, path = video(), tmp_path / "world.safetensors"
    save(table, path)
    code = CHILD.format(root=ROOT, path=str(path))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before = digest(table)
    add_block(table, 99)
    assert said == [before, digest(table)] and before != digest(table)


def test_everything_about_a_world_comes_back(tmp_path):
    table, path = video(), tmp_path / "world.safetensors"
    table.pin([5])
    save(table, path)
    again = load(open_store(), path)
    assert again.policy == table.policy and again.next_frame == 12 and again.pinned == {5}
    assert {f: e.format for f, e in again.held.items()} == {f: e.format for f, e in table.held.items()}
    assert all(torch.equal(a, b) for a, b in zip(again.k_means, table.k_means))
    assert load(open_store(pools={"i8f8": 20}), path_of(tmp_path, table="plain"), Policy(12)).policy.window == 12


def path_of(tmp_path, table):
    plain = open_store(pools={"i8f8": 9}).open(Policy(9))
    add_block(plain, 0)
    save(plain, tmp_path / f"{table}.safetensors")
    return tmp_path / f"{table}.safetensors"


def test_frames_in_host_memory_are_saved_too(tmp_path):
    store = open_store(pools={"i8f8": 9}, host={"i8f8": 9})
    table = store.open(Policy())
    add_block(table, 0)
    want = digest(table)
    table.offload([0, 2])
    table.open_block(3)
    save(table, tmp_path / "w")
    assert digest(load(open_store(pools={"i8f8": 9}), tmp_path / "w")) == want


def test_a_past_without_means_goes_on_without_in_a_store_that_quantizes(tmp_path):
    """Its keys lie in the pages as they are; a mean frozen now would be taken off the next ones alone."""
    plain = open_store(pools={"fp32": 9}).open(Policy(9))
    add_block(plain, 0)
    save(plain, tmp_path / "w")
    mixed = load(open_store(pools={"fp32": 9, "int8": 3}), tmp_path / "w")
    for table in (plain, mixed):
        add_block(table, 1)
    assert digest(mixed) == digest(plain)
    save(mixed, tmp_path / "again")
    assert digest(load(open_store(pools={"fp32": 9, "int8": 3}), tmp_path / "again")) == digest(plain)


def test_an_archive_is_taken_up_by_a_store_of_the_same_kind(tmp_path):
    def archive():
        return open_store(pools={"int8": 9}, host={"int8": 30})

    table = archive().open(Policy(6, archive=True))
    for seed in range(6):
        add_block(table, seed)
    save(table, tmp_path / "w")
    store = archive()
    again = load(store, tmp_path / "w")
    assert again.cold == table.cold == set(range(12)) and list(again.held) == list(range(18))
    for each in (table, again):
        each.open_block(3)  # three more leave
        each.abandon()
        each.prefetch([1, 7])
        each.open_block(3)
    assert digest(again) == digest(table)
    again.release()
    store.sync_copies()
    assert len(store.pools["int8"].free) == 9 and len(store.host["int8"].free) == 30
    full = open_store(pools={"int8": 9}, host={"int8": 11})
    with pytest.raises(OutOfPages, match="int8 pool in host memory: 12 frames"):
        load(full, tmp_path / "w")
    assert len(full.pools["int8"].free) == 9 and len(full.host["int8"].free) == 11


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_crash_while_saving_leaves_the_snapshot_that_was_there(tmp_path, moment):
    path = tmp_path / "world.safetensors"
    save(video(2), path)
    before = path.read_bytes()
    code = f"""
import os, signal, sys
sys.path.insert(0, {ROOT!r})
import safetensors.torch
from tests.store.test_snapshot import video
from inferix_kernels.store.snapshot import save
def die(*args):
    if {moment!r} == "while writing":
        open(args[1], "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} == "while writing":
    safetensors.torch.save_file = die
else:
    os.replace = die
save(video(4), {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_bytes() == before and load(open_store(), path).next_frame == 6


def test_a_save_that_fails_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ValueError, match=r"^path: no space left: '.*/w'$"):
        save(video(2), tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_what_does_not_belong_is_refused_with_the_difference(tmp_path):
    path = tmp_path / "world.safetensors"
    save(video(), path)
    store = open_store(model="another", heads=4)
    with pytest.raises(ValueError, match=r"this store's model.*model 'test' \(here 'another'\), heads 2 \(here 4\)"):
        load(store, path)
    with pytest.raises(OutOfPages, match="i8f8 pool on the device"):
        load(open_store(pools={"bf16": 2, "i8f8": 2, "int4": 9}), path)
    with pytest.raises(ValueError, match=r"the policy's format 'i8f8' has no pool in this store \(fp32\)"):
        load(open_store(pools={"fp32": 20}), path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a snapshot of a world, got .*other"):
        load(open_store(), tmp_path / "other")
    save_file({}, tmp_path / "later", {"inferix": '{"version": 99}'})
    with pytest.raises(ValueError, match="must be a snapshot of version 2 or older, got version 99"):
        load(open_store(), tmp_path / "later")


def test_a_file_that_can_not_be_read_is_no_snapshot(tmp_path):
    path, store = tmp_path / "world.safetensors", open_store()
    free = {format: len(pool.free) for format, pool in store.pools.items()}
    with pytest.raises(ValueError, match=r"must be a snapshot of a world, got .*world.safetensors: .*[Nn]o such file"):
        load(store, path)
    save(video(), path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", whole.replace(b'"int4.k":', b'"int4.z":')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"must be a snapshot of a world, got .*world.safetensors: "):
            load(store, path)
    save_file({}, path, {"inferix": "{"})
    with pytest.raises(ValueError, match="its header is damaged"):
        load(store, path)
    assert {format: len(pool.free) for format, pool in store.pools.items()} == free


def test_two_hundred_damaged_snapshots_are_refused_or_load_right():
    counts = soak_snapshots.soak(200, seed=1)
    assert sum(counts.values()) == 200 and counts["crafted: refused"] > 10


def test_changed_contents_are_found_by_their_checksum(tmp_path):
    path = tmp_path / "w"
    save(video(), path)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"got .*w: .* is damaged: its checksum is of other contents"):
        load(open_store(), path)


def test_a_snapshot_of_version_1_still_loads(tmp_path):
    table = video()
    save(table, tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        state = json.loads(file.metadata()["inferix"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del state["checksums"]
    save_file(tensors, tmp_path / "old", {"inferix": json.dumps(state | {"version": 1})})
    assert digest(load(open_store(), tmp_path / "old")) == digest(table)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.update(geometry={}), r"this store's model, got .* model None \(here 'test'\)"),
        (lambda state: state["policy"].pop("undo"), "the policy lacks, or has besides, undo"),
        (lambda state: state["policy"].update(window="9"), "window must be a whole number of frames, got '9'"),
        (lambda state: state.update(next_frame=True), "next_frame is True"),
        (lambda state: state.update(next_frame=10**12), "next_frame is 1000000000000"),
        (lambda state: state.update(pinned=[77]), r"pinned is \[77\]"),
        (lambda state: state["frames"].reverse(), "its frames are not in order"),
        (lambda state: state["frames"].pop(), r"int4.k is torch.uint8 .*, not|i8f8.k is torch.int8 .*, not"),
    ],
)
def test_a_crafted_header_is_refused_and_takes_no_pages(tmp_path, change, message):
    """Its checksum is right: someone has made it."""
    save(video(), tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        state = json.loads(file.metadata()["inferix"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(state)
    header = json.dumps(state)
    save_file(tensors, tmp_path / "w", {"inferix": header, "crc32": str(zlib.crc32(header.encode()))})
    store = open_store()
    free = {format: len(pool.free) for format, pool in store.pools.items()}
    with pytest.raises(ValueError, match=message):
        load(store, tmp_path / "w")
    assert {format: len(pool.free) for format, pool in store.pools.items()} == free


def test_tensors_that_would_broadcast_are_refused(tmp_path):
    save(video(), tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["int4.k"] = tensors["int4.k"][:, :, :1].clone()
    save_file(tensors, tmp_path / "w", metadata)
    with pytest.raises(ValueError, match=r"int4.k is torch.uint8 \[2, .*\], not torch.uint8 \[2, "):
        load(open_store(), tmp_path / "w")


def test_a_snapshot_is_written_with_the_permissions_of_any_file(tmp_path):
    save(video(1), tmp_path / "w")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "w").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_load_that_is_refused_takes_no_pages(tmp_path):
    save(video(), tmp_path / "w")
    store = open_store(pools={"bf16": 2, "i8f8": 2, "int4": 9})
    with pytest.raises(OutOfPages):
        load(store, tmp_path / "w")
    assert {format: len(pool.free) for format, pool in store.pools.items()} == {"bf16": 2, "i8f8": 2, "int4": 9}
