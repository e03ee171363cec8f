"""The server as a program sees it: messages, commands, who drives. No browser, no network model."""

import asyncio
import time
from contextlib import suppress

import av
import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream import commands, protocol
from inferix.stream.archive import Archive
from inferix.stream.client import MAX_EVENTS, Bucket
from inferix.stream.session import UNREAD, Session
from inferix.stream.testing import ACTIONS, WORDS, BarWorld, open_bars, read_bars
from tests.stream.stream_client import Viewer, asynchronous, running, until


@asynchronous
async def test_keys_steer_the_next_block_and_are_echoed(server):
    viewer = await Viewer.join(server)
    await viewer.until("block")
    since = len(viewer.messages)
    await viewer.say("keys", seq=5, pressed=["up"])
    block = await viewer.until("block", lambda block: block["applied_seq"] == 5, since)
    assert block["actions"] == {"a": "up"}
    await viewer.say("keys", seq=4, pressed=["left"])  # came late, on an unordered channel
    await viewer.say("keys", seq=6, pressed=["up", "d"])  # a key stands for its action; the last one wins
    block = await viewer.until("block", lambda block: block["applied_seq"] == 6, since)
    assert block["actions"] == {"a": "right"}
    assert not [b for b in viewer.all("block") if b["actions"] == {"a": "left"}]
    await viewer.leave()


@asynchronous
async def test_a_tap_between_two_blocks_is_not_lost(tmp_path):
    async with running(tmp_path, seconds=0.15) as server:
        viewer = await Viewer.join(server)
        await viewer.until("block")
        await viewer.say("keys", seq=1, pressed=["left"])
        await viewer.say("keys", seq=2, pressed=[])
        block = await viewer.until("block", lambda block: block["applied_seq"] == 2)
        following = await viewer.until("block", lambda b: b["block"] == block["block"] + 1)
        assert (block["actions"], following["actions"]) == ({"a": "left"}, {"a": "none"})
        await viewer.leave()


@asynchronous
async def test_pictures_are_the_ones_announced_and_begin_with_a_keyframe(server):
    viewer = await Viewer.join(server)
    await viewer.say("keys", seq=1, pressed=["up"])
    await viewer.request("video", codec="h264")
    await until(lambda: len(viewer.pictures) >= 12)
    decoder = av.CodecContext.create("h264", "r")
    frames = {frame["pts"]: frame for frame in viewer.all("frame")}
    for (version, key, codec, _, number, pts), data in viewer.pictures[:12]:
        assert (version, codec) == (1, protocol.CODECS["h264"])
        assert key == (number == viewer.pictures[0][0][4])  # the first one, and no other for the next two seconds
        (picture,) = decoder.decode(av.Packet(data))
        shown, action, words = read_bars(picture.to_ndarray(format="rgb24"))
        (block,) = [b for b in viewer.all("block") if b["block"] == frames[pts]["block"]]
        assert number == frames[pts]["frame"] and shown == block["positions"]["a"] + number - block["first"]
        assert ACTIONS[action] == block["actions"]["a"] and WORDS[words] == "calm"
    await viewer.leave()


@asynchronous
async def test_who_joins_late_begins_with_a_keyframe_even_of_a_world_at_rest(server):
    first = await Viewer.join(server)
    await first.request("video", codec="h264")
    await until(lambda: len(first.pictures) > 5)
    late = await Viewer.join(server, drive=False)
    await late.request("video", codec="h264")
    await until(lambda: late.pictures)
    assert late.pictures[0][0][1] == 1
    await first.request("pause")
    third = await Viewer.join(server, drive=False)
    await third.request("video", codec="jpeg")
    await until(lambda: third.pictures)
    assert third.pictures[0][1].startswith(b"\xff\xd8")
    for viewer in (first, late, third):
        await viewer.leave()


@asynchronous
async def test_one_drives_and_the_others_watch(server):
    driver, watcher = await Viewer.join(server), await Viewer.join(server)
    before = server.session.state()["paused"]
    refused = await watcher.request("pause")
    assert refused["code"] == "watching" and server.session.player.paused == before
    await watcher.say("keys", seq=99, pressed=["up"])
    assert (await watcher.until("error", lambda e: e["text"].startswith("keys")))["code"] == "watching"
    assert server.session.steering.seq == -1
    await watcher.request("wheel", take=True)  # it is taken: nothing happens
    assert (await watcher.request("pause"))["type"] == "error"
    await driver.leave()
    await watcher.until("state", lambda state: state["driver"] is None)
    await watcher.request("wheel", take=True)
    assert (await watcher.request("pause"))["type"] == "done" and server.session.player.paused
    await watcher.leave()


@asynchronous
async def test_who_leaves_before_the_answer_harms_nobody(server):
    watcher = await Viewer.join(server, drive=False)
    fields = {"prompt": {"text": "snow"}, "record": {"on": True}, "rewind": {"frame": 10**9}}
    for request in ("fork", "prompt", "record", "rewind"):
        viewer = await Viewer.join(server)
        await viewer.say(request, id="x", **fields.get(request, {}))
        await viewer.leave()
    await watcher.until("state", lambda state: state["driver"] is None)
    blocks = len(watcher.all("block"))
    await until(lambda: len(watcher.all("block")) > blocks + 3)
    assert server.session.phase == "running"
    await server.session.command("record", on=False)
    await watcher.leave()


@asynchronous
async def test_pause_stops_and_step_makes_exactly_one_block(server):
    viewer = await Viewer.join(server)
    await viewer.until("frame")
    await viewer.request("pause")
    assert (await viewer.request("close", world="b"))["code"] == "refused"  # by the worker: no block is under way now
    blocks, frames = len(viewer.all("block")), len(viewer.all("frame"))
    await asyncio.sleep(0.5)  # a block would have come by then, on a machine that is not busy
    assert (len(viewer.all("block")), len(viewer.all("frame"))) == (blocks, frames)
    await viewer.request("step")
    await viewer.until("frame", lambda frame: frame["frame"] == viewer.last("block")["first"] + 2)
    assert len(viewer.all("block")) == blocks + 1
    await viewer.request("resume")
    await until(lambda: len(viewer.all("block")) > blocks + 3)
    await viewer.leave()


@asynchronous
async def test_pausing_does_not_wait_for_a_slow_block(tmp_path):
    async with running(tmp_path, seconds=0.01) as server:
        viewer = await Viewer.join(server)
        await viewer.until("frame")
        await viewer.request("prompt", text="hang")  # the next block takes a minute
        await until(lambda: not server.session.steering._waiting)  # and has begun
        assert (await viewer.request("pause"))["type"] == "done"
        assert (await viewer.request("record", on=True))["type"] == "done"
        await viewer.leave()


@asynchronous
async def test_the_world_does_not_run_ahead(server):
    viewer = await Viewer.join(server)
    await until(lambda: len(viewer.all("block")) > 15)
    queues = [block["queue"] for block in viewer.all("block")[5:]]
    assert max(queues) <= 2 * 3, "at most two blocks wait to be shown"
    await viewer.leave()


@asynchronous
async def test_a_prompt_says_when_it_takes_effect(server):
    viewer = await Viewer.join(server)
    refused = await viewer.request("prompt", text="nonsense")
    assert refused["code"] == "refused" and "must be one of calm" in refused["text"]
    refused = await viewer.request("prompt", text="storm", recache=True)
    assert refused["text"].startswith("prompt.recache: this model's past was made under actions")
    assert viewer.last("welcome")["can_recache"] is False and not [
        p for p in viewer.all("prompt") if p["text"] != "calm"
    ]
    await viewer.request("prompt", text="storm", recache=False)
    waiting = await viewer.until("prompt", lambda prompt: prompt["text"] == "storm")
    assert waiting["state"] == "waiting" and waiting["frame"] is None
    applied = await viewer.until("prompt", lambda p: p["state"] == "applied" and p["text"] == "storm")
    assert applied["frame"] in [block["first"] for block in viewer.all("block")]
    assert applied["id"] == waiting["id"]
    assert (await viewer.until("state", lambda s: s["prompts"]["a"] == "storm"))["phase"] == "running"
    await viewer.leave()


@asynchronous
async def test_however_much_is_said_in_a_pause_nobody_is_sent_away(server):
    """Each prompt but the last is replaced at once; `resume` has one to announce."""
    driver, watcher = await Viewer.join(server), await Viewer.join(server, drive=False)
    await driver.request("pause")
    (client,) = [client for client in server.lobby.clients if client is server.lobby.driver]
    client._quick = client._slow = client._complaints = Bucket(1e9, 1e9)
    for i in range(MAX_EVENTS + 88):
        assert (await driver.request("prompt", text=WORDS[i % 3]))["type"] == "done"
    assert len(server.session.steering._waiting) == 1
    await driver.request("resume")
    for viewer in (driver, watcher):
        await viewer.until("prompt", lambda p: p["state"] == "applied" and p["text"] == WORDS[(MAX_EVENTS + 87) % 3])
        states = [prompt["state"] for prompt in viewer.all("prompt") if prompt["id"]]  # without: the world's own first
        assert states[-1] == "applied" and states.count("replaced") == MAX_EVENTS + 87
        assert not viewer.socket.closed
        await viewer.leave()


@asynchronous
async def test_steps_are_made_no_further_ahead_than_anything_else(server):
    viewer = await Viewer.join(server)
    await viewer.request("pause")
    (client,) = server.lobby.clients
    client._quick = client._slow = client._complaints = Bucket(1e9, 1e9)
    answers = [await viewer.request("step") for _ in range(60)]
    refused = [answer["text"] for answer in answers if answer["type"] == "error"]
    assert set(refused) == {f"step: {commands.STEPS} blocks are to be made already"}
    await until(lambda: not server.session._steps)
    assert max(block["queue"] for block in viewer.all("block")[-10:]) <= 3 * 3
    await viewer.leave()


class Reader(BarWorld):
    """Takes a while to read some words, and can read one thing at a time."""

    reading = 0

    def _prepare(self, text):
        assert not self.reading
        self.reading += 1
        time.sleep(0.4 if text == "storm" else 0.05)
        self.reading -= 1


@asynchronous
async def test_the_words_said_last_win_however_long_they_take_to_read(tmp_path):
    async with running(tmp_path, opener=Reader) as server:
        viewer = await Viewer.join(server)
        for text in ("storm", "snow"):
            await viewer.say("prompt", text=text, id=text)
        await viewer.until("prompt", lambda p: p["state"] == "applied" and p["text"] == "snow")
        waiting = [prompt["text"] for prompt in viewer.all("prompt") if prompt["state"] == "waiting"]
        assert waiting[-2:] == ["storm", "snow"] and server.session.steering.prompts == {"a": "snow"}
        server.session._unread = UNREAD
        assert "8 are waiting to be read" in (await viewer.request("prompt", text="calm"))["text"]
        await viewer.leave()


@asynchronous
async def test_fork_steer_and_close(server):
    viewer = await Viewer.join(server)
    await viewer.request("video", codec="jpeg")
    await viewer.request("fork")
    state = await viewer.until("state", lambda state: state["worlds"] == ["a", "b"])
    assert state["steered"] == ["b"]
    await viewer.say("keys", seq=1, pressed=["left"])
    await viewer.until("block", lambda b: b["actions"] == {"a": "none", "b": "left"})
    await viewer.request("prompt", text="snow")
    await viewer.until("state", lambda s: s["prompts"] == {"a": "calm", "b": "snow"})
    await viewer.request("steer", worlds=["a", "b"])
    await viewer.say("keys", seq=2, pressed=["up"])
    await viewer.until("block", lambda b: b["actions"] == {"a": "up", "b": "up"})
    assert (await viewer.request("fork"))["code"] == "refused"
    await viewer.request("close", world="a")  # "b" is "a" from now on
    state = await viewer.until("state", lambda s: s["worlds"] == ["a"], len(viewer.messages) - 5)
    assert state["prompts"] == {"a": "snow"}
    assert (await viewer.request("close", world="a"))["code"] == "refused"
    await viewer.leave()


@asynchronous
async def test_rewind_takes_back_whole_blocks_and_no_more_than_is_remembered(server):
    viewer = await Viewer.join(server)
    await until(lambda: viewer.all("block") and viewer.last("block")["made"]["a"] >= 21)
    await viewer.request("pause")
    await viewer.request("rewind", frame=10)
    state = await viewer.until("state", lambda state: state["made"]["a"] == 9)
    assert state["undo"] == {"a": 9}
    await viewer.request("step")
    block = await viewer.until("block", lambda block: block["positions"]["a"] == 9)
    assert block["first"] > 9, "pictures are counted as they are made, and never again"
    await viewer.leave()


@asynchronous
async def test_a_model_that_cannot_rewind_says_so(tmp_path):
    async with running(tmp_path, can_rewind=False) as server:
        viewer = await Viewer.join(server)
        assert viewer.last("welcome")["can_rewind"] is False
        await viewer.until("block")
        refused = await viewer.request("rewind", frame=0)
        assert refused["code"] == "refused" and "keep a fork" in refused["text"]
        assert server.session.phase == "running" and viewer.last("block")["undo"] == {"a": 0}
        await viewer.leave()


@asynchronous
async def test_a_model_without_actions_is_steered_by_words(tmp_path):
    async with running(tmp_path, actions=()) as server:
        viewer = await Viewer.join(server)
        assert viewer.last("welcome")["can_recache"]
        assert (await viewer.request("prompt", text="storm", recache=True))["type"] == "done"
        assert (await viewer.until("block"))["actions"] == {"a": None}
        await viewer.say("keys", seq=1, pressed=["up"])
        assert "words alone" in (await viewer.until("error"))["text"]
        await viewer.leave()


@asynchronous
async def test_closing_goes_on_until_it_is_heard(tmp_path):
    async def deaf():
        with suppress(asyncio.CancelledError):  # as wait_for may, before Python 3.12
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    show = Session(open_bars, lambda message: None, Archive(tmp_path))
    show._making = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await asyncio.wait_for(show.close(), 10)
    assert show._making.done()
