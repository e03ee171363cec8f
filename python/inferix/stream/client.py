"""Viewers: what each sends is checked, limited and followed; what it is sent never holds up the show; who drives."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from aiohttp import WSMsgType, web

from inferix_kernels import profile

from . import protocol
from .protocol import Invalid, Message
from .remote import Broken, Refused
from .session import Session
from .video import Subscription

MAX_EVENTS = 512  # that may wait for a viewer; one that is further behind is gone, or as good as gone
FREE = frozenset({"hello", "video", "offer", "ping", "wheel"})  # what a viewer may do without the wheel


class Bucket:
    """So many messages per second, with so many at once."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst, self.level, self.at = rate, burst, burst, time.monotonic()

    def take(self, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        self.level, self.at = min(self.burst, self.level + self.rate * (now - self.at)), now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Lobby:
    """Everyone who is here, the session they look at, and which of them is at the wheel."""

    def __init__(self, session: Session):
        self.session = session
        self.clients: list[Client] = []
        self.driver: Client | None = None
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"viewer-{self._count}"

    def enter(self, client: Client) -> None:
        self.clients.append(client)
        if self.session.model:
            client.tell(self._addressed(self.session.welcome(), client))
        for message in (self.session.archive.listing(), *self.session.recent):
            client.tell(message)
        self.announce(self.session.state())

    def leave(self, client: Client) -> None:
        self.clients.remove(client)
        self.let_go(client)

    def drive(self, client: Client) -> None:
        """Put a client at the wheel, if nobody else is."""
        if self.driver not in (None, client):
            return
        if self.driver is None:
            self.session.steering.let_go()
        self.driver = client
        self.announce(self.session.state())

    def let_go(self, client: Client) -> None:
        if self.driver is client:
            self.driver = None
            self.session.steering.let_go()
        self.announce(self.session.state())

    def announce(self, message: Message) -> None:
        """Tell everyone."""
        if message["type"] == "state":
            driver = self.driver.name if self.driver else None
            message = {**message, "driver": driver, "viewers": len(self.clients)}
        for client in tuple(self.clients):
            client.tell(self._addressed(message, client))

    def _addressed(self, message: Message, client: Client) -> Message:
        if message["type"] != "welcome":
            return message
        return {**message, "client": client.name, "webrtc": has_webrtc()}


def has_webrtc() -> bool:
    return find_spec("aiortc") is not None


class Client:
    """A viewer; perhaps the driver.

    Args:
        lobby: everyone who is here, and the session.
        socket: the WebSocket, prepared.
    """

    def __init__(self, lobby: Lobby, socket: web.WebSocketResponse, name: str):
        self.lobby, self.socket, self.name = lobby, socket, name
        self.session = lobby.session
        self.subscription: Subscription | None = None
        self.peer: Any = None
        self._answering = asyncio.Lock()  # one peer is made at a time, or the last but one would be forgotten
        self._quick, self._slow, self._complaints = Bucket(120, 240), Bucket(10, 30), Bucket(2, 20)
        self._events: deque[str] = deque()
        self._wake = asyncio.Event()
        self._requests: set[asyncio.Task[None]] = set()
        self._leaving: asyncio.Future[bool] | None = None

    async def run(self) -> None:
        """Until the viewer leaves."""
        sender = asyncio.create_task(self._send(), name=f"sender {self.name}")
        try:
            async for message in self.socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    self.receive(message.data)
        finally:
            for task in (sender, *self._requests):
                task.cancel()
            await asyncio.gather(sender, *self._requests, return_exceptions=True)
            self.subscribe("none")
            await self._end_peer()

    async def leave(self) -> None:
        """Send the viewer home."""
        with suppress(TimeoutError, asyncio.TimeoutError, ConnectionError):
            await asyncio.wait_for(self.socket.close(code=1001, message=b"the server is closing"), 0.5)

    def tell(self, message: Message) -> None:
        """Put a message on its way."""
        if self._leaving is not None:
            return
        if len(self._events) >= MAX_EVENTS:
            self._events.clear()
            self._leaving = asyncio.ensure_future(self.socket.close(code=1008, message=b"too slow"))
            return
        self._events.append(protocol.encode(message))
        self._wake.set()

    # What comes in

    def receive(self, data: str | bytes, keys_only: bool = False) -> None:
        """Follow a message, or answer what is wrong with it. Never raises for what a client sent."""
        id = None
        try:
            if not self._quick.take():
                raise Invalid("too many messages: 120 per second are read", "rate")
            message = protocol.parse(data)
            id, kind = message.get("id"), message["type"]
            if keys_only and kind not in ("keys", "ping"):
                raise Invalid(f"the channel of keys takes keys and ping, got {kind}", id=id)
            if kind not in ("keys", "ping") and not self._slow.take():
                raise Invalid("too many requests: 10 per second are followed", "rate", id)
            if kind not in FREE and self.lobby.driver is not self:
                raise Invalid(f"{kind}: you are watching; take the wheel first", "watching", id)
            self._follow(kind, message)
        except Invalid as error:
            self._complain(error.id or id, error.code, str(error))
        except ValueError as error:  # the session's word on it
            self._complain(id, "refused", str(error))

    def _follow(self, kind: str, message: Message) -> None:
        if kind == "keys":
            self.session.steering.press(message["seq"], message["pressed"])
        elif kind == "ping":
            self.tell({"type": "pong", "time": message["time"], "clock": self.session.player.ticks()})
        elif kind in ("hello", "wheel"):
            take = message.get("take", message.get("drive"))
            self.lobby.drive(self) if take else self.lobby.let_go(self)
            self._done(message)
        elif kind == "video":
            self._spawn(self._end_peer(), message)  # unless too much is under way: then nothing is changed
            self.subscribe(message["codec"])
            self._done(message)
        else:
            self._spawn(self._request(kind, message), message)

    def _spawn(self, work: Coroutine[Any, Any, None], message: Message) -> None:
        kind = message["type"]
        if len(self._requests) >= 8:
            work.close()
            raise Invalid(f"{kind}: 8 of your requests are under way", "rate", message.get("id"))
        task = asyncio.create_task(work, name=f"{kind} {self.name}")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _request(self, kind: str, message: Message) -> None:
        """What takes a while; the answer comes when it is done."""
        id, arguments = message.get("id"), {name: x for name, x in message.items() if name not in ("type", "id")}
        try:
            if kind == "offer":
                await self._answer(arguments["sdp"], id)
                return
            if kind == "prompt":
                await self.session.prompt(arguments["text"], arguments.get("recache"), id)
                result = None
            else:
                result = await self.session.command(kind, **arguments)
        except (Refused, ValueError) as error:
            self._complain(id, "refused", str(error))
        except Broken as error:
            self._complain(id, "internal", error.line)
        except Exception as error:  # a mistake of ours must show, and who asked must not wait for ever
            self._complain(id, "internal", f"{kind}: {type(error).__name__}: {error}")
            context = {"message": f"{kind} of {self.name} could not be followed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        else:
            self._done(message, result)

    def _done(self, message: Message, result: dict[str, Any] | None = None) -> None:
        if "id" in message:
            self.tell({"type": "done", "id": message["id"], "result": result})

    def _complain(self, id: str | None, code: str, text: str) -> None:
        """Whoever gave an id waits for its answer; the others, who may be sending rubbish, get one now and then."""
        if id is not None or self._complaints.take():
            self.tell({"type": "error", "id": id, "code": code, "text": text[:500]})

    # Video

    def subscribe(self, codec: str) -> None:
        """Send video over this socket, in this form or not at all."""
        broadcast = self.session.player.broadcast
        if self.subscription is not None:
            broadcast.unsubscribe(self.subscription)
            self.subscription = None
        if codec != "none":
            self.subscription = broadcast.subscribe(codec, self._wake.set)
        self._wake.set()

    async def _answer(self, sdp: str, id: str | None) -> None:
        try:
            from .webrtc import Peer
        except ImportError:
            raise Refused("offer: WebRTC needs aiortc, which is not installed here") from None
        async with self._answering:
            await self._end_peer()
            peer = self.peer = Peer(self.session.player.broadcast, self._from_channel, self.tell)
            answer = await peer.answer(sdp)
        self.tell({"type": "answer", "id": id, "sdp": answer})

    def _from_channel(self, data: str | bytes) -> None:
        self.receive(data, keys_only=True)

    async def _end_peer(self) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            await peer.close()

    # What goes out

    async def _send(self) -> None:
        """A viewer to whom nothing can be sent any more is gone, whatever the reason."""
        try:
            await self._send_all()
        except ConnectionError:
            pass
        except Exception as error:  # a mistake of ours must show
            context = {"message": f"nothing can be sent to {self.name} any more", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            self._leaving = asyncio.ensure_future(self.socket.close(code=1011, message=b"nothing can be sent"))

    async def _send_all(self) -> None:
        """Events first, then video; one at a time, as fast as the viewer takes them."""
        while not self.socket.closed:
            while self._events:
                await self.socket.send_str(self._events.popleft())
            subscription = self.subscription
            packet = subscription.pop() if subscription else None
            if subscription and packet:
                codec = protocol.CODECS[subscription.codec]
                header = protocol.HEADER.pack(1, packet.keyframe, codec, 0, packet.frame, packet.pts)
                began = profile.clock()
                await self.socket.send_bytes(header + packet.data)
                profile.record("send", began, profile.clock(), track="viewers")
                profile.count("bytes sent", len(packet.data))
            elif not self._events:
                self._wake.clear()
                await self._wake.wait()
