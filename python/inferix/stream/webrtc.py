"""WebRTC through aiortc, which is handed packets that are coded already: any rate and preset, one encoder for all.

Three of aiortc's private names are used, each for want of a public one, and a test notices if they go: a browser's
request for a keyframe (`RTCRtpSender._send_keyframe`); the random start of RTP's clock, without which a browser can't
say which picture it shows; and the task in which a connection is made, which may be under way when it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from fractions import Fraction

import av
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError

from .protocol import Message
from .remote import Refused
from .video import TICKS, Broadcast, Packet

CODECS = {"video/H264": "h264", "video/VP8": "vp8"}  # in the order of preference


class PacketTrack(MediaStreamTrack):
    """The broadcast as aiortc wants it: `recv` gives coded packets, which it cuts up and sends.

    Args:
        first_sent: called with the timestamp in ticks of the first packet once it has been sent.
    """

    kind = "video"

    def __init__(self, broadcast: Broadcast, codec: str, first_sent: Callable[[int], None]):
        super().__init__()
        self._broadcast, self._arrived = broadcast, asyncio.Event()
        self._first_sent: Callable[[int], None] | None = first_sent
        self._last: Packet | None = None
        self.subscription = broadcast.subscribe(codec, self._arrived.set)

    async def recv(self) -> av.Packet:
        if self._last and self._first_sent:  # being asked for the next one, we know that the last one is out
            self._first_sent(self._last.pts)
            self._first_sent = None
        while (packet := self.subscription.pop()) is None:
            if self.readyState != "live":
                raise MediaStreamError
            self._arrived.clear()
            await self._arrived.wait()
        self._last = packet
        out = av.Packet(packet.data)
        out.pts, out.time_base = packet.pts, Fraction(1, TICKS)
        return out

    def stop(self) -> None:
        super().stop()
        self._broadcast.unsubscribe(self.subscription)
        self._arrived.set()


class Connection(RTCPeerConnection):
    """aiortc's, which may be closed at any moment. aiortc itself would go on to connect, and start to send and receive
    what nobody ends any more."""

    def __init__(self, configuration: RTCConfiguration | None = None):
        super().__init__(configuration)
        self._connecting: set[asyncio.Task[None]] = set()

    async def _RTCPeerConnection__connect(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connecting.add(task)
        try:
            await super()._RTCPeerConnection__connect()
        finally:
            self._connecting.discard(task)

    async def close(self) -> None:
        connecting = list(self._connecting)
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        await super().close()


class Peer:
    """One browser's connection.

    Args:
        on_keys: called with each message of the data channel labelled "keys".
        tell: sends a message by the WebSocket.
    """

    def __init__(self, broadcast: Broadcast, on_keys: Callable[[str | bytes], None], tell: Callable[[Message], None]):
        self._broadcast, self._tell = broadcast, tell
        # No servers: the addresses of this machine, and no word to anyone else. Left out, aiortc would ask Google's.
        self.connection = Connection(RTCConfiguration(iceServers=[]))
        self._track: PacketTrack | None = None
        self._sender: RTCRtpSender | None = None

        @self.connection.on("datachannel")
        def open_channel(channel: RTCDataChannel) -> None:
            if channel.label == "keys":
                channel.on("message", on_keys)

        @self.connection.on("connectionstatechange")
        def lost() -> None:
            if self.connection.connectionState in ("failed", "closed") and self._track:
                self._track.stop()

    async def answer(self, sdp: str) -> str:
        """Our half of the session description.

        Raises:
            Refused: theirs can't be read, or has no video that we could send.
        """
        mime = next((mime for mime in CODECS if f" {mime.removeprefix('video/')}/{TICKS}".lower() in sdp.lower()), None)
        if mime is None:
            raise Refused(f"offer: must ask for video in one of {', '.join(CODECS)}")
        self._track = PacketTrack(self._broadcast, CODECS[mime], self._tell_origin)
        video = self.connection.addTransceiver(self._track, "sendonly")
        kinds = RTCRtpSender.getCapabilities("video").codecs
        video.setCodecPreferences([kind for kind in kinds if kind.mimeType in (mime, "video/rtx")])
        self._sender = video.sender
        self._sender._send_keyframe = self._track.subscription.request_keyframe
        try:
            await self.connection.setRemoteDescription(RTCSessionDescription(_known_addresses(sdp), "offer"))
            await self.connection.setLocalDescription(await self.connection.createAnswer())
        except Exception as error:  # whatever a parser meets in a stranger's text
            await self.close()
            raise Refused(f"offer: the session description can't be used ({type(error).__name__}: {error})") from None
        return str(self.connection.localDescription.sdp)

    def _tell_origin(self, pts: int) -> None:
        sent: int = self._sender._RTCRtpSender__rtp_timestamp  # type: ignore[union-attr]
        self._tell({"type": "rtp", "origin": (sent - pts) % 2**32})

    async def close(self) -> None:
        if self._track is not None:
            self._track.stop()
        await self.connection.close()


def _known_addresses(sdp: str) -> str:
    """Without candidates that hide their address behind a .local name. Resolving one takes a second here and is not
    needed: the browser finds us by our addresses, and we learn its own when it does. So the list has no end, either:
    at its end aioice would give up."""
    hidden = [line for line in sdp.splitlines() if line.startswith("a=candidate:") and ".local " in line]
    dropped = {*hidden, "a=end-of-candidates"} if hidden else set()
    return "".join(f"{line}\r\n" for line in sdp.splitlines() if line not in dropped)
