"""A server over a world of bars, and a client that speaks its protocol, for the tests of inferix.stream."""

import asyncio
import functools
from contextlib import asynccontextmanager

import aiohttp

from inferix.stream import protocol
from inferix.stream.server import Server
from inferix.stream.testing import open_bars

PATIENCE = 60  # seconds: only a hang takes so long, on a machine that is busy as well


@asynccontextmanager
async def running(tmp_path, opener=None, **options):
    """A server whose world is there."""
    world = {name: options.pop(name) for name in ("seconds", "can_rewind", "actions") if name in options}
    server = Server(opener or functools.partial(open_bars, **world), port=0, folder=str(tmp_path / "worlds"), **options)
    await server.start()
    try:
        await until(lambda: server.session.phase == "running")
        yield server
    finally:
        await server.close()


async def until(condition):
    """Wait until something is so."""
    for _ in range(PATIENCE * 100):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


class Viewer:
    """One connection. Every message that comes is checked against the document."""

    def __init__(self, session, socket):
        self.http, self.socket = session, socket
        self.messages, self.pictures = [], []  # pictures: (header, data)
        self._count = 0
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def join(cls, server, drive=True, **options):
        http = aiohttp.ClientSession()
        url = f"http://127.0.0.1:{server.port}/ws"
        try:
            socket = await http.ws_connect(url, protocols=[protocol.SUBPROTOCOL], max_msg_size=0, **options)
        except BaseException:
            await http.close()
            raise
        viewer = cls(http, socket)
        await viewer.request("hello", drive=drive)
        return viewer

    async def _read(self):
        async for message in self.socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                header = protocol.HEADER.unpack(message.data[: protocol.HEADER.size])
                self.pictures.append((header, message.data[protocol.HEADER.size :]))
            else:
                event = message.json()
                protocol.check(event, "server")
                self.messages.append(event)

    def all(self, type):
        return [message for message in self.messages if message["type"] == type]

    def last(self, type):
        """The newest message of a type that is known to have come."""
        return self.all(type)[-1]

    async def send(self, data):
        await (self.socket.send_bytes(data) if isinstance(data, bytes) else self.socket.send_str(data))

    async def say(self, type, **fields):
        await self.send(protocol.encode({"type": type, **fields}))

    async def request(self, type, **fields):
        """The `done` or `error` that answers."""
        self._count += 1
        id = f"t{self._count}"
        await self.say(type, id=id, **fields)
        return await self.answer(id)

    async def answer(self, id):
        def found():
            return [m for m in self.messages if m.get("id") == id and m["type"] in ("done", "error", "answer")]

        await until(lambda: found() or self._reader.done())
        return found()[0]

    async def until(self, type, condition=lambda message: True, since=0):
        """The first message of a type, after the first `since` ones, that is so."""

        def found():
            return [m for m in self.messages[since:] if m["type"] == type and condition(m)]

        await until(lambda: found() or self._reader.done())
        return found()[0]

    async def leave(self):
        await self.socket.close()
        await self.http.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


LOOP = asyncio.new_event_loop()  # one for all tests, so that a server can serve several of them


def asynchronous(test):
    """Run a coroutine test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        return LOOP.run_until_complete(asyncio.wait_for(test(*args, **kwargs), 3 * PATIENCE))

    return run
