"""Saved worlds: whole or absent, one writer, and nothing that was changed on the disk is taken for what was saved."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from inferix import World, saved

MISSING = object()


@pytest.fixture(scope="module")
def world() -> World:
    made = World("tiny", kv="bf16", window=3, worlds=2)
    made.step(action="up", prompt="desert night")
    return made


def loaded(world: World, folder: Path) -> np.ndarray:
    other = saved.load(world, folder)
    try:
        return other.step(action="left")
    finally:
        other.release()


def test_a_saved_world_can_be_read_by_others(world: World, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    saved.save(world, tmp_path / "deeper" / "w")
    assert os.listdir(tmp_path / "deeper") == ["w"]
    for name in ("world.pt", "world.pt.sha256"):
        assert (tmp_path / "deeper" / "w" / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_saved_world_goes_on_in_its_own_precision(world: World, tmp_path: Path) -> None:
    """In another one its next block would have other bits."""
    saved.save(world, tmp_path / "w")
    exact = World("tiny", kv="bf16", window=3, worlds=2, precision="exact")
    with pytest.raises(ValueError, match=r"a world that goes on here, got precision 'auto' \(here 'exact'\)"):
        saved.load(exact, tmp_path / "w")
    assert np.array_equal(loaded(world, tmp_path / "w"), world.fork().step(action="left"))


def test_what_a_kill_left_is_written_over_and_what_someone_writes_is_not(world: World, tmp_path: Path) -> None:
    part = tmp_path / ".w.part"
    part.mkdir()
    (part / "past0.safetensors").write_bytes(b"half")
    (part / "deeper").mkdir()
    held = os.open(part, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=rf"^folder: '{tmp_path}/w' is being written by someone else$"):
        saved.save(world, tmp_path / "w")
    assert (part / "past0.safetensors").read_bytes() == b"half"
    os.close(held)
    saved.save(world, tmp_path / "w")
    assert os.listdir(tmp_path) == ["w"] and "deeper" not in os.listdir(tmp_path / "w")
    loaded(world, tmp_path / "w")


@pytest.mark.parametrize("what", ["save", "load"])
def test_a_world_at_work_is_neither_saved_nor_loaded_from(world: World, tmp_path: Path, what: str, monkeypatch) -> None:
    """Half a step is no moment to go on from: another thread is refused, by name, and nothing is written."""
    saved.save(world, tmp_path / "before")
    begun, go_on = threading.Event(), threading.Event()
    predict = type(world.model).predict

    def waiting(*args, **options):
        begun.set()
        assert go_on.wait(60)
        return predict(*args, **options)

    monkeypatch.setattr(type(world.model), "predict", waiting)
    stepping = threading.Thread(target=world.step, kwargs={"action": "up"})
    stepping.start()
    try:
        assert begun.wait(60)
        with pytest.raises(RuntimeError, match=f"^{what}: another thread is at work on this world"):
            saved.save(world, tmp_path / "w") if what == "save" else saved.load(world, tmp_path / "before")
    finally:
        go_on.set()
        stepping.join()
    assert os.listdir(tmp_path) == ["before"]
    saved.save(world, tmp_path / "w")
    loaded(world, tmp_path / "w")


def test_a_bound_of_bytes_is_held_to_the_byte(world: World, tmp_path: Path) -> None:
    saved.save(world, tmp_path / "free")
    size = sum(file.stat().st_size for file in (tmp_path / "free").iterdir())
    with pytest.raises(ValueError, match=rf"^folder: '{tmp_path}/w' takes {size:,} bytes, at most {size - 1:,} are"):
        saved.save(world, tmp_path / "w", most=size - 1)
    assert os.listdir(tmp_path) == ["free"]
    saved.save(world, tmp_path / "w", most=size)


def test_a_link_to_nowhere_is_no_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "w").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^folder must be new, got '.*w', which exists$"):
        saved.save(world, tmp_path / "w")
    assert os.listdir(tmp_path) == ["w"]


def test_a_folder_that_can_not_be_made_is_one_line(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^folder: cannot write '.*file/w': (Not a directory|File exists)$"):
        saved.save(world, tmp_path / "file" / "w")
    with pytest.raises(ValueError, match=r"^folder must be new"):
        saved.save(world, tmp_path)


def test_a_full_disk_leaves_no_folder(world: World, small_disk) -> None:
    with pytest.raises(ValueError, match=r"no space left"):
        saved.save(world, small_disk.folder / "w")
    assert os.listdir(small_disk.folder) == []
    world.step(action="none")


def test_a_disk_that_is_full_for_the_state_says_so(world: World, tmp_path: Path, monkeypatch) -> None:
    def full(state: object, file: object) -> None:
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(ValueError, match=r"^folder: no space left: '.*world\.pt'$"):
        saved.save(world, tmp_path / "w")
    assert os.listdir(tmp_path) == []


def test_one_bit_that_is_not_as_it_was_is_found(world: World, tmp_path: Path) -> None:
    saved.save(world, tmp_path / "w")
    wanted, chance = loaded(world, tmp_path / "w"), random.Random(0)
    for name in ("world.pt", "world.pt.sha256"):
        path = tmp_path / "w" / name
        whole = path.read_bytes()
        for _ in range(30):
            at = chance.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"^folder must hold a saved world, got "):
                saved.load(world, tmp_path / "w")
        path.write_bytes(whole)
    (tmp_path / "w" / "world.pt.sha256").unlink()  # as of an earlier version
    assert np.array_equal(loaded(world, tmp_path / "w"), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, MISSING) for name in ("version", "window", "prompt", "frames", "generator", "recent", "pictures")],
        *[(name, torch.zeros(3)) for name in ("version", "window", "prompt", "frames", "generator", "recent")],
        *[("prompt", 1), ("frames", -1), ("frames", True), ("frames", "7"), ("generator", None)],
        *[("generator", torch.zeros(8, dtype=torch.uint8)), ("pictures", []), ("pictures", {"cache": []})],
        *[("recent", None), ("recent", ["abc"]), ("recent", [(0, 3, torch.zeros(3, 1))]), ("recent", [(0, 3, None)])],
        ("recent", [(3, 3, torch.zeros(0, 64, 432))]),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_state_of_another_kind_is_refused_though_its_checksum_is_right(world, tmp_path, name, value) -> None:
    rewrite(world, tmp_path / "w", lambda state: state.pop(name) if value is MISSING else state.update({name: value}))
    free = world.store.pools["bf16"].free
    with pytest.raises(ValueError, match=r"^folder must hold a "):
        saved.load(world, tmp_path / "w")
    assert world.store.pools["bf16"].free == free


def test_a_state_of_another_moment_than_the_past_is_refused(world: World, tmp_path: Path) -> None:
    def later(state: dict) -> None:
        state["recent"] = [(first + 3, end + 3, latents) for first, end, latents in state["recent"]]

    rewrite(world, tmp_path / "w", later)
    with pytest.raises(ValueError, match=r"^folder must hold one world, got .* whose parts end at frames \["):
        saved.load(world, tmp_path / "w")


def rewrite(world: World, folder: Path, change) -> None:
    """Save the world, but with another state; its checksum is right."""
    saved.save(world, folder)
    path = folder / saved.STATE
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    (folder / saved.CHECKSUM).write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {saved.STATE}\n")
