"""WebRTC against aiortc's other half: packets of ours, host addresses alone, keyframes for who lost one."""

import asyncio
import gc
import random
import re

import pytest

pytest.importorskip("aiortc", reason="needs the extra `stream`")

import aioice.ice
from aiortc import RTCRtpReceiver, RTCRtpSender, RTCSessionDescription

from inferix.stream import webrtc
from inferix.stream.testing import ACTIONS, read_bars
from tests.stream.stream_client import LOOP, PATIENCE, Viewer, asynchronous, running, until


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    addresses = aioice.ice.get_host_addresses
    if not addresses(True, False):  # a sandbox without a network: this machine's own address will do
        aioice.ice.get_host_addresses = lambda *_: ["127.0.0.1"]
    manager = running(tmp_path_factory.mktemp("webrtc"))
    yield LOOP.run_until_complete(manager.__aenter__())
    LOOP.run_until_complete(manager.__aexit__(None, None, None))
    aioice.ice.get_host_addresses = addresses


async def connect(server, codec):
    """A viewer that only knows one codec: (viewer, peer, its track, its channel for keys)."""
    viewer, peer, tracks = await Viewer.join(server), webrtc.Connection(), []
    peer.on("track", tracks.append)
    video = peer.addTransceiver("video", direction="recvonly")
    kinds = RTCRtpReceiver.getCapabilities("video").codecs
    video.setCodecPreferences([kind for kind in kinds if kind.mimeType in (codec, "video/rtx")])
    keys = peer.createDataChannel("keys", ordered=False, maxRetransmits=0)
    await peer.setLocalDescription(await peer.createOffer())
    answer = await viewer.request("offer", sdp=peer.localDescription.sdp)
    await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
    return viewer, peer, tracks[0], keys, answer["sdp"]


@pytest.mark.parametrize("codec", ["video/H264", "video/VP8"])
@asynchronous
async def test_pictures_arrive_in_the_codec_that_a_browser_knows(server, codec):
    viewer, peer, track, keys, sdp = await connect(server, codec)
    assert codec.removeprefix("video/") in sdp
    kinds = re.findall(r"a=candidate:.* typ (\w+)", sdp)
    assert kinds and set(kinds) == {"host"}, "no server was asked who we are"
    picture = (await asyncio.wait_for(track.recv(), PATIENCE)).to_ndarray(format="rgb24")
    read_bars(picture)
    await until(lambda: keys.readyState == "open")
    keys.send('{"type": "keys", "seq": 7, "pressed": ["left"]}')
    block = await viewer.until("block", lambda block: block["applied_seq"] == 7)
    for _ in range(200):
        _, action, _ = read_bars((await asyncio.wait_for(track.recv(), PATIENCE)).to_ndarray(format="rgb24"))
        if ACTIONS[action] == "left":
            break
    assert ACTIONS[action] == block["actions"]["a"] == "left"
    keys.send('{"type": "reset", "id": "no"}')
    assert "takes keys and ping" in (await viewer.until("error", lambda e: e["id"] == "no"))["text"]
    await peer.close()
    await viewer.leave()
    await until(lambda: not server.session.player.broadcast.codecs)


@asynchronous
async def test_a_lost_picture_brings_a_keyframe(server):
    """By aiortc's private name for a browser's request, which an update may take away."""
    assert callable(RTCRtpSender._send_keyframe)
    viewer, peer, track, _, _ = await connect(server, "video/H264")
    await asyncio.wait_for(track.recv(), PATIENCE)
    (client,) = server.lobby.clients
    broadcast, wanted = server.session.player.broadcast, []
    broadcast._keyframe = type("Noting", (set,), {"add": lambda self, codec: wanted.append(codec)})()
    receiver = peer.getReceivers()[0]
    (ssrc,) = {source.source for source in receiver.getSynchronizationSources()}
    for _ in range(PATIENCE * 20):  # by UDP, which may lose it
        await receiver._send_rtcp_pli(ssrc)
        await asyncio.sleep(0.05)
        if wanted:
            break
    broadcast._keyframe = set()
    assert wanted and set(wanted) == {"h264"} and client.peer is not None
    assert (await viewer.until("rtp"))["origin"] >= 0
    await peer.close()
    await viewer.leave()


@asynchronous
async def test_of_several_offers_at_once_one_peer_is_left(server, monkeypatch):
    peers = []

    class Slow:
        def __init__(self, *arguments):
            peers.append(self)

        async def answer(self, sdp):
            await asyncio.sleep(0.05)
            return sdp

        async def close(self):
            await asyncio.sleep(0.1)
            peers.remove(self)

    monkeypatch.setattr(webrtc, "Peer", Slow)
    viewer = await Viewer.join(server)
    for i in range(4):
        await viewer.say("offer", sdp="v=0", id=f"offer{i}")
    for i in range(4):
        assert (await viewer.answer(f"offer{i}"))["type"] == "answer"
    assert len(peers) == 1
    await viewer.leave()
    await until(lambda: not peers)


@pytest.mark.parametrize("sdp", ["nonsense", "v=0\r\nm=video 9 X 1\r\na=rtpmap:1 H264/90000\r\n", "v=0\r\nm=audio"])
@asynchronous
async def test_an_offer_that_makes_no_sense_is_refused(server, sdp):
    viewer = await Viewer.join(server)
    refused = await viewer.request("offer", sdp=sdp)
    assert refused["code"] == "refused" and refused["text"].startswith("offer:")
    assert not server.session.player.broadcast.codecs
    await viewer.leave()


def files_of(before):
    """Whose code the tasks run that were not there before."""
    return [task.get_coro().cr_code.co_filename for task in asyncio.all_tasks(LOOP) - before]


@asynchronous
async def test_a_connection_that_is_closed_while_it_is_made_leaves_nothing_behind(server):
    """At any moment of it, by either side first."""
    failed, generator = [], random.Random(0)
    LOOP.set_exception_handler(lambda loop, context: failed.append(context))
    before = asyncio.all_tasks(LOOP)

    async def join_and_leave(moment):
        viewer, peer, *_ = await connect(server, "video/H264")
        await asyncio.sleep(moment)
        first, second = generator.sample([peer.close, viewer.leave], 2)
        await first()
        await second()

    try:
        for _ in range(4):
            await asyncio.gather(*(join_and_leave(generator.uniform(0.0, 0.3)) for _ in range(8)))
        await until(lambda: not server.lobby.clients)
        # The world goes on: a block under way has a task of its own.
        await until(lambda: not any("aiortc" in code or "aioice" in code for code in files_of(before)))
        gc.collect()  # of a task whose exception nobody takes asyncio speaks when it is collected
    finally:
        LOOP.set_exception_handler(None)
    assert not failed
