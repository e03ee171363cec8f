"""The door: accepts connections, and keeps those that are nobody's yet few and short.

A connection is a guest until a request is followed that lasts: a viewer's WebSocket, a download. Guests have a few
seconds for a request, and their number is bounded; one more takes the place of the oldest. So half-sent requests,
however many, leave the descriptors that viewers need, and somebody who comes is heard at once.

asyncio's own accept is not used: without descriptors it logs a traceback for each connection that waits, and goes on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from aiohttp import web

PATIENCE = 10.0  # seconds for a request, its header and its body, and as long again for who takes a short answer
GUESTS = 128  # at most; a quarter of the process's descriptors, if those are few
GRACE = 0.25  # seconds in which nobody is sent away: a request is on its way with the connection, as a rule
BACKLOG = 1024  # connections that the system keeps until they are accepted
PAUSE = 0.02  # seconds until the next try while everybody here is that new
REST = 1.0  # seconds until the next try while there are no descriptors
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})  # localhost may be named in IPv6 where there is none

_log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp's protocol, which tells the door when it begins and ends."""

    def __init__(self, door: Door, server: web.Server, **options: Any):
        super().__init__(server, **options)
        self._door = door
        self.address, self.welcome = "", False
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its own before all that it wrote is out

    @property
    def lost(self) -> bool:
        return self._wire is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._wire = cast(asyncio.Transport, transport)
        self.address = (transport.get_extra_info("peername") or ("",))[0]
        self._door.receive(self)

    def connection_lost(self, error: BaseException | None) -> None:
        self._wire = None
        self._door.forget(self)
        super().connection_lost(error)

    def abort(self) -> None:
        if self._wire is not None:
            self._wire.abort()


class Door:
    """Listens for a server of aiohttp.

    Args:
        server: of a runner that is set up.
        most: guests at a time; None: GUESTS, or a quarter of the descriptors that this process may have.
    """

    def __init__(self, server: web.Server, most: int | None = None):
        self._server, self._loop = server, asyncio.get_running_loop()
        self.most = most or max(4, min(GUESTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._guests: dict[Connection, asyncio.TimerHandle] = {}  # oldest first, with what ends their patience
        self._arriving: set[asyncio.Task[None]] = set()
        self._sockets: list[socket.socket] = []

    @property
    def port(self) -> int:
        return int(self._sockets[0].getsockname()[1])

    async def open(self, host: str, port: int) -> None:
        """Listen at every address of `host` that this machine has.

        Raises:
            OSError, OverflowError: it has none of them, or one is taken.
        """
        found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        failed: OSError | None = None
        for family, _, _, _, address in dict.fromkeys(found):
            wanted = (address[0], self.port if self._sockets else port, *address[2:])
            try:
                self._sockets.append(socket.create_server(wanted, family=family, backlog=BACKLOG))
            except OSError as error:
                failed = error
                if error.errno not in ABSENT:
                    self.close()
                    break
        if not self._sockets:
            raise failed or OSError(f"{host!r} has no address")
        for listening in self._sockets:
            listening.setblocking(False)
            self._loop.add_reader(listening, self._accept, listening)

    def close(self) -> None:
        """Accept nobody any more. Who is here stays."""
        for listening in self._sockets:
            self._loop.remove_reader(listening)
            listening.close()
        self._sockets.clear()

    # One connection at a time: the loop comes back for the next, and what was let go has its descriptor free by then

    def _accept(self, listening: socket.socket) -> None:
        if len(self._guests) + len(self._arriving) >= self.most and not self._make_room():
            return self._rest(listening, PAUSE)
        try:
            arrived, _ = listening.accept()
        except OSError as error:
            if error.errno in EXHAUSTED and not self._make_room():
                _log.warning("connections have to wait: %s", error.strerror)
                self._rest(listening, REST)
            return  # there is room the next time; or who knocked is gone
        arrived.setblocking(False)
        task = self._loop.create_task(self._admit(arrived))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _admit(self, arrived: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._connection, arrived)
        except OSError:
            arrived.close()

    def _connection(self) -> Connection:
        return Connection(self, self._server, loop=self._loop, access_log=None)

    def _rest(self, listening: socket.socket, seconds: float) -> None:
        """The system would call us again at once, and for nothing."""
        self._loop.remove_reader(listening)
        self._loop.call_later(seconds, self._go_on, listening)

    def _go_on(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _make_room(self) -> bool:
        """Send away the oldest guest of the address that has the most; first of those who were never welcome. False if
        all have just come."""
        newest = self._loop.time() + PATIENCE - GRACE
        old = [guest for guest, timer in self._guests.items() if timer.when() <= newest]
        guests = [guest for guest in old if not guest.welcome] or old
        if not guests:
            return False
        (crowded, _), *_ = Counter(guest.address for guest in guests).most_common(1)
        self._end(next(guest for guest in guests if guest.address == crowded))
        return True

    def _end(self, guest: Connection) -> None:
        self.forget(guest)
        guest.abort()

    # Guests

    def receive(self, connection: Connection) -> None:
        """A guest comes, or has asked for something and may ask again."""
        self.forget(connection)
        self._guests[connection] = self._loop.call_later(PATIENCE, self._end, connection)

    def forget(self, connection: Connection) -> None:
        """No guest any more."""
        if timer := self._guests.pop(connection, None):
            timer.cancel()

    def welcome(self, request: web.BaseRequest) -> None:
        """This request will be followed: who asks has time again, and is not the first to be sent away."""
        connection = request.protocol
        if isinstance(connection, Connection) and connection in self._guests:
            connection.welcome = True
            self.receive(connection)

    @contextmanager
    def host(self, request: web.BaseRequest) -> Iterator[None]:
        """While this lasts, who asks is no guest."""
        connection = request.protocol
        assert isinstance(connection, Connection)
        self.forget(connection)
        try:
            yield
        finally:
            if not connection.lost:
                self.receive(connection)
