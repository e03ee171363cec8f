"""The process of the worlds: errors cross it, a broken one stays broken, a busy one is ended all the same."""

import asyncio
import functools
import time

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.commands.interactive import open_world
from inferix.stream.remote import Broken, Refused, Remote
from inferix.stream.testing import BarWorld, open_bars
from inferix.stream.worker import Order
from tests.stream.stream_client import PATIENCE, asynchronous, until


@asynchronous
async def test_errors_cross_the_process_and_a_broken_worker_stays_broken():
    remote = Remote(functools.partial(open_bars))
    await remote.opened()
    with pytest.raises(Refused, match="prompt: must be one of calm"):
        await remote.call("prepare", text="nonsense")
    await remote.call("step", orders={"a": Order("up", "calm")})
    with pytest.raises(Broken, match="asked to crash"):
        await remote.call("step", orders={"a": Order("up", "crash")})
    with pytest.raises(Broken, match="asked to crash"):
        await remote.call("fork")
    await remote.close()


class Unlucky(BarWorld):
    """Has no room for a fork, and can not read its words."""

    def fork(self):
        raise RuntimeError("no room\nnone at all")

    def _prepare(self, text):
        raise FileNotFoundError(2, "No such file", "words.txt") if text == "file" else MemoryError()


@asynchronous
async def test_what_fails_and_changes_nothing_is_refused_in_one_line(tmp_path):
    remote = Remote(Unlucky)
    await remote.opened()
    requests = {
        "fork: no room": ("fork", {}),
        "prepare: .*No such file.*words.txt": ("prepare", {"text": "file"}),
        "prepare: MemoryError": ("prepare", {"text": "memory"}),
        "save: ": ("save", {"name": "a", "folder": tmp_path / "saved"}),  # bars can't be saved
    }
    for says, (request, arguments) in requests.items():
        with pytest.raises(Refused, match=f"^{says}") as refused:
            await remote.call(request, **arguments)
        assert "\n" not in str(refused.value)
    assert (await remote.call("step", orders={"a": Order("up", "calm")}))["made"] == {"a": 3}
    await remote.close()


class Owing(BarWorld):
    """Leaves a file for each block whose clean pass it has been asked for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def commit_pending(self):
        (self.folder / f"settled at {self.frames}").touch()


@asynchronous
async def test_what_a_block_still_owes_is_done_while_nobody_asks_for_the_next(tmp_path):
    remote = Remote(functools.partial(Owing, tmp_path))
    await remote.opened()
    for frames in (3, 6):
        await remote.call("step", orders={"a": Order("up", "calm")})
        await until((tmp_path / f"settled at {frames}").exists)  # nobody asks for anything
    await remote.close()


@asynchronous
async def test_a_worker_that_is_busy_is_ended_all_the_same():
    remote = Remote(open_bars)
    await remote.opened()
    stuck = asyncio.create_task(remote.call("step", orders={"a": Order("up", "hang")}))
    heard = remote._heard
    await until(lambda: remote._heard > heard + 2)  # busy, and its heart beats
    assert remote.hangs(limit=900) is None and "at one request for" in remote.hangs(limit=1)
    started = time.monotonic()
    await remote.close()
    assert time.monotonic() - started < PATIENCE and not remote._reader.is_alive()
    with pytest.raises((Broken, asyncio.CancelledError)):
        await stuck


@asynchronous
async def test_the_tiny_world_opens_with_room_to_rewind():
    settings = {"kv": "int8", "window": None, "sink": None, "seed": 0, "backend": "auto"}
    remote = Remote(functools.partial(open_world, "tiny", undo_seconds=2.0, worlds=1, **settings))
    described = await remote.opened()
    assert described["can_rewind"] and described["fps"] == 16 and "up" in described["actions"]
    made = await remote.call("step", orders={"a": Order("up", "meadow day")})
    assert made["pictures"]["a"].shape == (3, 96, 96, 3) and made["undo"] == {"a": 3}
    assert set(made["seconds"]) == {"denoise", "pictures", "total"}
    await remote.close()
