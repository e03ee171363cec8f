"""What fails leaves the server standing and is said: crashes, hangs, full disks, threads that can't be started."""

import functools
import os
import signal
import threading

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.commands.interactive import open_world
from inferix.finite import NotFinite
from inferix.stream import commands, recorder, remote, session
from inferix.stream.server import Server
from inferix.stream.testing import BarWorld
from inferix.stream.video import JpegEncoder
from tests.stream.stream_client import Viewer, asynchronous, running, until


@pytest.mark.parametrize("word, says", [("crash", "asked to crash"), ("exit", "exit code 3")])
@asynchronous
async def test_a_crash_shows_and_a_reset_starts_anew(word, says, server):
    viewer = await Viewer.join(server)
    await viewer.request("prompt", text=word)
    crashed = await viewer.until("state", lambda state: state["phase"] == "crashed")
    assert says in crashed["crash"]
    assert "reset it" in (await viewer.request("fork"))["text"]
    assert (await viewer.request("reset", seed=4))["type"] == "done"
    since = len(viewer.messages)
    await viewer.until("block", since=since)
    assert viewer.last("state")["phase"] == "running" and viewer.last("state")["seed"] == 4
    await viewer.leave()


SPOILED = "latent frames 0 to 2 of bars are not finite, first in x"


class Spoiled(BarWorld):
    """Makes what is no number when it is told `storm`."""

    def step(self, *, action, prompt, recache=None):
        if prompt == "storm":
            raise NotFinite(SPOILED)
        return super().step(action=action, prompt=prompt, recache=recache)


@pytest.mark.parametrize("name, other", ["ab", "ba"])
@asynchronous
async def test_a_world_that_is_not_finite_ends_alone_and_the_last_one_until_a_reset(name, other, tmp_path):
    async with running(tmp_path, opener=Spoiled) as server:
        viewer = await Viewer.join(server)
        await viewer.until("block")
        await viewer.request("fork")
        await viewer.request("steer", worlds=[other])
        await viewer.request("prompt", text="snow")
        await viewer.until("state", lambda state: state["prompts"].get(other) == "snow")
        await viewer.request("steer", worlds=[name])
        video = (await viewer.request("record", on=True))["result"]["name"]
        since = len(viewer.messages)
        await viewer.request("prompt", text="storm")
        await viewer.until("error", lambda error: error["text"] == f"world {name} has ended: {SPOILED}", since)
        await viewer.until("error", lambda error: error["text"] == f"record: {video} has ended with its world", since)
        state = await viewer.until("state", lambda state: state["worlds"] == ["a"], since)
        assert state["phase"] == "running" and state["prompts"] == {"a": "snow"}
        await viewer.until("block", lambda block: block["made"].keys() == block["actions"].keys() == {"a"}, since)
        await viewer.request("prompt", text="storm")
        crashed = await viewer.until("state", lambda state: state["phase"] == "crashed")
        assert crashed["crash"].endswith(SPOILED)
        since = len(viewer.messages)
        await viewer.request("reset", seed=4)
        await viewer.until("block", lambda block: block["positions"] == {"a": 0}, since)
        assert viewer.last("state")["phase"] == "running" and viewer.last("state")["seed"] == 4
        await viewer.leave()


@pytest.mark.parametrize("stopped", ["by a signal", "at one request"])
@asynchronous
async def test_a_worker_that_hangs_is_replaced_by_a_reset(stopped, server, monkeypatch):
    viewer = await Viewer.join(server)
    await viewer.until("block")
    worker = server.session.remote._process.pid
    if stopped == "by a signal":
        monkeypatch.setattr(remote, "SILENCE", 2.0)
        os.kill(worker, signal.SIGSTOP)
    else:
        monkeypatch.setattr(session, "STUCK", 1.0)
        await viewer.request("prompt", text="hang")  # the next block takes a minute
        await viewer.until("prompt", lambda prompt: prompt["text"] == "hang")
        await until(lambda: server.session.steering._waiting == [])
    await viewer.say("fork", id="fork")
    since = len(viewer.messages)
    assert (await viewer.request("reset", seed=5))["type"] == "done"
    assert (await viewer.answer("fork"))["code"] in ("refused", "internal")
    await viewer.until("block", since=since)
    state = viewer.last("state")
    assert (state["phase"], state["seed"]) == ("running", 5) and server.session.remote._process.pid != worker
    (crash,) = {s["crash"] for s in viewer.all("state") if s["crash"]}
    assert crash.startswith("the worker process ") and crash.endswith(" s, and was replaced")
    await viewer.leave()


class Threadless(BarWorld):
    """From its first block on no thread can be started in its process."""

    def step(self, **order):
        def refuse(self):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = refuse
        return super().step(**order)


@asynchronous
async def test_without_a_new_thread_prompts_are_heard_and_recordings_refused(tmp_path, monkeypatch):
    async with running(tmp_path, opener=Threadless) as server:
        viewer = await Viewer.join(server)
        await viewer.until("block")
        assert (await viewer.request("prompt", text="snow"))["type"] == "done"
        await viewer.until("prompt", lambda p: p["state"] == "applied" and p["text"] == "snow")

        def refuse(self):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(recorder.threading.Thread, "start", refuse)
            assert (await viewer.request("record", on=True))["text"] == "record: can't start new thread"
        assert list(server.archive.folder.iterdir()) == []
        assert (await viewer.request("record", on=True))["type"] == "done"
        assert (await viewer.request("record", on=False))["type"] == "done"
        await viewer.leave()


@asynchronous
async def test_a_command_that_needs_no_worlds_ends_none(server, monkeypatch):
    async def fail(self):
        raise RuntimeError("no")

    viewer = await Viewer.join(server)
    monkeypatch.setattr(commands.Commands, "_do_pause", fail)
    assert (await viewer.request("pause"))["text"] == "pause: no"
    await viewer.say("fork", id="f")
    assert (await viewer.request("pause"))["text"] == "pause: no"  # even if it had to wait
    assert server.session.phase == "running" and (await viewer.request("close", world="b"))["type"] == "done"
    await viewer.leave()


@asynchronous
async def test_an_encoder_that_fails_shows_as_a_crash(server, monkeypatch):
    def fail(self, *arguments):
        raise OSError("no more devices")

    viewer = await Viewer.join(server)
    with monkeypatch.context() as patch:
        patch.setattr(JpegEncoder, "encode", fail)
        await viewer.request("video", codec="jpeg")
        state = await viewer.until("state", lambda state: state["phase"] == "crashed")
        assert "jpeg can't be encoded: no more devices" in state["crash"]
    assert (await viewer.request("reset", seed=4))["type"] == "done"
    await until(lambda: viewer.pictures)
    assert viewer.last("state")["phase"] == "running"
    await viewer.leave()


@asynchronous
async def test_a_world_that_cannot_be_opened_says_why(tmp_path):
    settings = {"kv": "int8", "window": None, "sink": None, "seed": 0, "backend": "auto"}
    opener = functools.partial(open_world, "none", undo_seconds=1, worlds=1, **settings)
    server = Server(opener, port=0, folder=str(tmp_path))
    await server.start()
    viewer = await Viewer.join(server)
    state = await viewer.until("state", lambda state: state["phase"] == "crashed")
    assert "model must be one of tiny" in state["crash"]
    await viewer.leave()
    await server.close()


@asynchronous
async def test_a_recording_that_meets_a_full_disk_ends_in_a_message(small_disk):
    async with running(small_disk.folder, seconds=0.01) as server:
        viewer, watcher = await Viewer.join(server), await Viewer.join(server, drive=False)
        name = (await viewer.request("record", on=True))["result"]["name"]
        small_disk.fill()
        for each in (viewer, watcher):
            error = await each.until("error")
            assert (error["code"], error["text"]) == ("internal", f"record: no space left: {name}")
            await each.until("state", lambda state: state["recording"] is None, each.messages.index(error))
        refused = await viewer.request("record", on=True)
        assert refused["code"] == "refused" and refused["text"].startswith("record: no space left: bars-")
        blocks = len(watcher.all("block"))
        await until(lambda: len(watcher.all("block")) > blocks + 3)
        for each in (viewer, watcher):
            await each.leave()


@asynchronous
async def test_a_save_that_meets_a_full_disk_is_refused_in_words(small_disk):
    async with running(small_disk.folder, opener=small_tiny_world) as server:
        viewer = await Viewer.join(server)
        await viewer.until("block")
        small_disk.fill()
        refused = await viewer.request("save")
        assert refused["code"] == "refused" and refused["text"].startswith("save: ")
        assert "no space left" in refused["text"].lower() and str(small_disk.folder) not in refused["text"]
        (small_disk.folder / "fill").unlink()
        blocks = len(viewer.all("block"))
        await until(lambda: len(viewer.all("block")) > blocks + 3)
        await viewer.leave()


def small_tiny_world():
    from tests.decode.test_loop import small_world

    return small_world(window=6)
