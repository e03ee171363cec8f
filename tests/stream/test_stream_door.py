"""Connections of strangers: half-sent requests, bodies, garbage, more of them than there are descriptors."""

import asyncio
import contextlib
import errno
import logging
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream import access, door, log
from inferix.stream.door import Door
from inferix.stream.server import MAX_DOWNLOADS, Server
from inferix.stream.testing import open_bars
from tests.stream.stream_client import PATIENCE, Viewer, asynchronous, running, until

ROOT = Path(__file__).parents[2]
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "


class Slow:
    """Connections that send a request's first lines and then a byte now and then; those closed are opened again."""

    def __init__(self, port, count):
        self.port, self.count, self.opened, self.closed = port, count, 0, 0
        self._tasks = []

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._drip()) for _ in range(self.count)]
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drip(self):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                self.opened += 1
                try:
                    writer.write(HALF)
                    while not writer.is_closing():
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(0.1)
                finally:
                    self.closed += 1
                    writer.close()
            await asyncio.sleep(0.01)


@asynchronous
async def test_two_hundred_descriptors_and_four_hundred_slow_connections(tmp_path):
    """Who watches goes on watching, who comes is let in, and the log stays short."""
    errors = tmp_path / "errors.txt"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.stream.stream_descriptors", "200"], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        server = SimpleNamespace(port=int(line))
        viewer = await Viewer.join(server)
        await viewer.request("video", codec="jpeg")
        async with Slow(server.port, 400) as slow:
            await until(lambda: slow.opened >= 800)  # each has been sent away once
            seen = len(viewer.pictures)
            await until(lambda: len(viewer.pictures) > seen + 20)
            late = await Viewer.join(server, drive=False)
            await late.request("video", codec="jpeg")
            await until(lambda: len(late.pictures) > 5)
            async with late.http.get(f"http://127.0.0.1:{server.port}/app.js") as response:
                assert response.status == 200 and len(await response.read()) > 1000
        began = asyncio.get_running_loop().time()
        for _ in range(300):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n: no name\r\n\r\n")
            assert b" 400 " in await reader.readline()
            writer.close()
        seconds = asyncio.get_running_loop().time() - began
        await late.leave()
        await viewer.leave()
        process.stdin.close()
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
    finally:
        process.kill()
    lines = errors.read_text().splitlines()
    assert 1 <= len(lines) <= seconds + 1 and all(line.startswith("inferix play: Error handling") for line in lines)


async def ended(reader):
    """What came until the server closed the connection."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), PATIENCE)


@pytest.mark.parametrize(
    "sent, answered",
    [
        (b"", b""),
        (HALF, b""),
        (b"GET /app.js HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200 "),  # and nothing after it
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n", b"HTTP/1.1 400 "),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n", b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.1\r\nHost: elsewhere\r\n\r\n", b"HTTP/1.1 403 "),
    ],
    ids=["nothing", "half a header", "one request", "half a body", "half a chunk", "another name"],
)
@asynchronous
async def test_who_does_not_go_on_is_sent_away(sent, answered, server, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    assert (await ended(reader) or b"").startswith(answered)
    writer.close()
    await until(lambda: not server._door._guests)


@asynchronous
async def test_bytes_that_drip_are_no_request(server, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.5)
    async with Slow(server.port, 3) as slow:
        await until(lambda: slow.closed >= 3)


@asynchronous
async def test_viewers_and_downloads_may_stay(server, monkeypatch):
    """Both last longer than a guest may; and the number of downloads has a bound."""
    monkeypatch.setattr(door, "PATIENCE", 0.3)
    viewer = await Viewer.join(server)
    path = server.archive.video(server.archive.new("bars"))
    path.write_bytes(b"x" * 2**24)  # more than sockets hold
    fetching = []
    for _ in range(MAX_DOWNLOADS):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**16)
        writer.write(f"GET /files/{path.name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b" 200 " in await reader.readline()
        fetching.append((reader, writer))
    async with viewer.http.get(f"http://127.0.0.1:{server.port}/files/{path.name}") as response:
        assert response.status == 503
    await asyncio.sleep(3 * door.PATIENCE)
    for reader, writer in fetching:
        await reader.readuntil(b"\r\n\r\n")
        assert len(await reader.readexactly(2**24)) == 2**24
        writer.close()
    await until(lambda: server._downloads == 0)
    assert (await viewer.request("pause"))["type"] == "done"
    await viewer.leave()
    path.unlink()


@asynchronous
async def test_the_oldest_of_the_largest_crowd_makes_room_and_who_was_welcome_last():
    gate = Door(None, most=4)
    sent = []

    class Guest:
        def __init__(self, address, welcome=False):
            self.address, self.welcome = address, welcome
            gate.receive(self)

        def abort(self):
            sent.append(self)

    one, two, three, friend = Guest("10.0.0.1"), Guest("10.0.0.2"), Guest("10.0.0.2"), Guest("10.0.0.2", True)
    assert not gate._make_room(), "all have just come"
    for each in (one, two, three, friend):
        gate._guests[each].cancel()
        gate._guests[each] = SimpleNamespace(when=lambda: 0.0, cancel=lambda: None)
    for _ in range(4):
        assert gate._make_room()
    assert sent == [two, one, three, friend]
    assert not gate._make_room() and not gate._guests


@asynchronous
async def test_without_descriptors_the_door_rests_and_says_so_once(caplog, monkeypatch):
    """The system reports a connection that can't be accepted again and again, as fast as it is asked."""
    monkeypatch.setattr(door, "REST", 0.3)
    knocks = []

    class Listening(socket.socket):
        def accept(self):
            knocks.append(1)
            raise OSError(errno.EMFILE, "Too many open files")

    with Listening() as listening, socket.socket() as knocking:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        knocking.connect(listening.getsockname())
        gate = Door(None)
        gate._sockets.append(listening)
        gate._go_on(listening)
        await until(lambda: len(knocks) >= 3)
        gate.close()
    assert len(caplog.records) == len(knocks), "a line for each time it rested, and none between"
    assert caplog.messages[0] == "connections have to wait: Too many open files"


def test_a_line_a_second_is_logged(monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    logger = logging.getLogger("a test of ours")
    handler = logging.Handler()
    handler.emit = lambda record: written.append(handler.format(record))
    handler.addFilter(log.Sparing())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        for second in range(3):
            now[0] = 100.0 + second
            for i in range(5):
                try:
                    raise ValueError("two\nlines")
                except ValueError:
                    logger.exception("request %d", i)
    finally:
        logger.removeHandler(handler)
    assert len(written) == 3 and not any("\n" in line for line in written)
    assert written[0].startswith("request 0 (ValueError: two lines, ") and written[1].endswith("[4 more]")


HOSTS = {
    "localhost": "localhost",
    "LocalHost:8000": "localhost",
    "127.0.0.1:65535": "127.0.0.1",
    "[::1]:8000": "::1",
    "[0:0:0:0:0:0:0:1]": "::1",
    "my_host-2.lan": "my_host-2.lan",
    "": None,
    "x@localhost": None,
    "x:y@localhost:8000": None,
    "localhost.": None,
    "localhost:": None,
    "localhost:65536": None,
    "localhost:-1": None,
    "localhost:80:80": None,
    "localhost:٣": None,
    "[::1%25lo]": None,
    "[::1%lo]:8000": None,
    "[::1": None,
    "[]": None,
    "[localhost]": None,
    "::1": None,
    "localhost/": None,
    "localhost?x": None,
    "localhost#": None,
    "local host": None,
    "localhost,evil.example": None,
    "ｌocalhost": None,
}


@pytest.mark.parametrize("header", HOSTS)
def test_a_host_is_a_name_and_perhaps_a_port(header):
    assert access.host_of(header) == HOSTS[header]


@pytest.mark.parametrize(
    "headers, status",
    [
        ("Host: localhost", 200),
        ("Host: localhost:1", 200),  # through a tunnel
        ("Host: localhost\r\nOrigin: http://localhost", 200),
        ("Host: localhost\r\nOrigin: https://LOCALHOST", 200),
        ("Host: x@localhost", 403),
        ("Host: localhost.", 403),
        ("Host: [::1%25lo]", 403),
        ("Host: localhost:99999", 403),
        ("Host: localhost\r\nOrigin: null", 403),
        ("Host: \r\nOrigin: null", 403),
        ("Host: localhost\r\nOrigin: ", 403),
        ("Host: localhost\r\nOrigin: http://localhost\r\nOrigin: http://evil.example", 403),
        ("Host: localhost\r\nOrigin: http://x@localhost", 403),
        ("Host: localhost\r\nOrigin: http://localhost/", 403),
        ("Host: localhost\r\nOrigin: file://localhost", 403),
        ("Host: localhost\r\nOrigin: localhost", 403),
        ("X: y", 400),  # by aiohttp itself, as it is today
        ("Host: localhost\r\nHost: evil.example", 400),
        ("Host: localhost\r\nHost: localhost", 400),
    ],
)
@asynchronous
async def test_what_a_request_says_of_where_it_comes_from(headers, status, server):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET /app.js HTTP/1.1\r\n{headers}\r\n\r\n".encode())
    answer = await reader.readline()
    writer.close()
    assert answer.split()[1] in ({b"400", b"403"} if status == 400 else {str(status).encode()}), answer


@asynchronous
async def test_a_name_is_listened_at_on_all_its_addresses(tmp_path):
    async with running(tmp_path, host="localhost") as server:
        for listening in server._door._sockets:
            _, writer = await asyncio.open_connection(listening.getsockname()[0], server.port)
            writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", server.port)


@asynchronous
async def test_a_name_of_which_one_address_is_taken_is_not_had(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(open_bars, host="localhost", port=taken.getsockname()[1], folder=str(tmp_path))
        with pytest.raises(ValueError, match=r"cannot listen at localhost:.*in use"):
            await server.start()
    assert server._door._sockets == []
