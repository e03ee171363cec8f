"""Recordings and saved worlds as a program sees them: names, bounds, and what ends a recording."""

import os

import av
import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream import commands
from inferix.stream.testing import read_bars
from tests.stream.stream_client import Viewer, asynchronous, running, until


def small_tiny_world():
    from tests.decode.test_loop import small_world

    return small_world(window=6)


@asynchronous
async def test_recordings_and_saves_get_names_from_the_server(server, tmp_path):
    viewer = await Viewer.join(server)
    await viewer.until("frame")
    name = (await viewer.request("record", on=True))["result"]["name"]
    assert (await viewer.request("record", on=True))["code"] == "refused"
    frames = len(viewer.all("frame"))
    await until(lambda: len(viewer.all("frame")) > frames + 9)
    made = (await viewer.request("record", on=False))["result"]
    assert made["name"] == name and made["frames"] >= 9
    assert viewer.last("files")["videos"][0] == name
    async with viewer.http.get(f"http://127.0.0.1:{server.port}/files/{name}") as response:
        path = tmp_path / "fetched.mp4"
        path.write_bytes(await response.read())
    with av.open(str(path)) as video:
        numbers = [read_bars(frame.to_ndarray(format="rgb24"))[0] for frame in video.decode(video=0)]
    assert len(numbers) == made["frames"] and np.all(np.diff(numbers) == 1)
    await viewer.leave()


@asynchronous
async def test_a_recording_that_can_not_begin_is_refused_even_if_it_had_to_wait(server, monkeypatch):
    def refuse(*arguments):
        raise ValueError("path: cannot write there")

    monkeypatch.setattr(commands, "Recorder", refuse)
    viewer = await Viewer.join(server)
    await viewer.say("fork", id="f")
    assert (await viewer.request("record", on=True))["code"] == "refused"
    assert server.session.phase == "running" and (await viewer.request("close", world="b"))["type"] == "done"
    await viewer.leave()


@pytest.mark.parametrize("closing, command", [("a", "close"), ("b", "close"), ("b", "reset")])
@asynchronous
async def test_a_recording_follows_its_world_and_ends_with_it(closing, command, server):
    viewer = await Viewer.join(server)
    await viewer.request("fork")
    await viewer.say("keys", seq=1, pressed=["left"])  # "b", which is steered and recorded
    await viewer.until("block", lambda b: b["actions"].get("b") == "left")
    name = (await viewer.request("record", on=True))["result"]["name"]
    await viewer.until("frame")  # the block is announced before its pictures are shown
    begun = viewer.last("frame")["frame"]
    await viewer.until("frame", lambda frame: frame["frame"] > begun + 6)
    since = len(viewer.messages)
    await viewer.request(command, **({"world": closing} if command == "close" else {}))
    if closing == "a":
        begun = viewer.last("frame")["frame"]
        await viewer.until("frame", lambda frame: frame["frame"] > begun + 6)
        assert viewer.last("state")["recording"] == name
        assert (await viewer.request("record", on=False))["result"]["frames"] >= 12
    else:
        assert (await viewer.until("error", since=since))["text"] == f"record: {name} has ended with its world"
        await viewer.until("state", lambda state: state["recording"] is None, since)
    with av.open(str(server.archive.folder / name)) as video:
        numbers = [read_bars(frame.to_ndarray(format="rgb24"))[0] for frame in video.decode(video=0)]
    assert len(numbers) >= 6 and np.all(np.diff(numbers) == 1)
    await viewer.leave()


@asynchronous
async def test_the_folder_has_a_bound(tmp_path):
    async with running(tmp_path, max_files=1) as server:
        viewer = await Viewer.join(server)
        await viewer.request("record", on=True)
        frames = len(viewer.all("frame"))
        await until(lambda: len(viewer.all("frame")) > frames + 3)
        assert (await viewer.request("record", on=False))["type"] == "done"
        for command, fields in (("record", {"on": True}), ("save", {})):
            refused = await viewer.request(command, **fields)
            assert refused["code"] == "refused" and refused["text"].startswith(
                f"{command}: worlds holds 1 of at most 1 worlds and recordings, "
            )
        await viewer.leave()


@asynchronous
async def test_a_save_keeps_within_the_bound(tmp_path):
    """What it takes is known once it is written: then it has never been."""
    async with running(tmp_path, opener=small_tiny_world, max_gb=1e-6) as server:
        viewer = await Viewer.join(server)
        await viewer.until("block")
        refused = await viewer.request("save")
        assert refused["code"] == "refused" and refused["text"].startswith("save: folder: 'tiny-")
        assert refused["text"].endswith(" bytes, at most 1,000 are left for it")
        assert os.listdir(tmp_path / "worlds") == []
        server.archive.max_bytes = 10**9
        saved = await viewer.request("save")
        assert os.listdir(tmp_path / "worlds") == [saved["result"]["name"]]
        await viewer.leave()
