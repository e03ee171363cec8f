"""The server: the page, the WebSocket behind it, and the recordings.

On 127.0.0.1 whoever can open a socket may watch and drive; anywhere else only who knows the token. Either way a page
of another site can't reach us through a visitor's browser: a WebSocket's Origin must be our own address, and without a
token so must be the Host. Files are found by name in a list that the server made; nothing a client sends is ever part
of a path.
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from ..profile.rows import CONTENT_TYPE
from . import MAX_FILES, MAX_GB, protocol
from .access import is_loopback, is_welcome
from .archive import Archive
from .client import Client, Lobby
from .door import Door
from .measured import Measured
from .push import Sink
from .session import Session

MAX_VIEWERS = 32
MAX_DOWNLOADS = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Server:
    """Serves one session until it is closed.

    Args:
        opener: opens the world, in a process of its own.
        host, port: to listen at; port 0 takes any that is free.
        token: whoever comes must know it; None makes one, unless the host is this machine alone.
        folder: for saved worlds and recordings; max_files, max_gb: see Archive.
        push: addresses and files that the video also goes to.
        profile: folder for a report of where the time went, written at the end.
    """

    def __init__(
        self,
        opener: Callable[[], Any],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        folder: str = "inferix-worlds",
        seed: int = 0,
        push: tuple[str, ...] = (),
        max_files: int = MAX_FILES,
        max_gb: float = MAX_GB,
        profile: str | None = None,
    ):
        self.host, self.port = host, port
        self.token = token or (None if is_loopback(host) else secrets.token_urlsafe(16))
        self.archive = Archive(folder, max_files, max_gb)
        sinks = tuple(Sink(target) for target in push)
        self.measured = Measured(profile)
        self.session = Session(
            opener, lambda message: self.lobby.announce(message), self.archive, seed, sinks, self.measured
        )
        self.lobby = Lobby(self.session)
        self.pages = _pages()
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._downloads = 0

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/" + (f"?token={quote(self.token, safe='')}" if self.token else "")

    async def start(self) -> None:
        """Listen, and begin to open the world.

        Raises:
            ValueError: the host or port can't be had.
        """
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/ws", self._socket)
        app.router.add_get("/files/{name}", self._file)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/profile", self._profile)
        app.router.add_get("/{page}", self._page)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.5)
        await self._runner.setup()
        assert self._runner.server is not None
        self._door = Door(self._runner.server)
        try:
            await self._door.open(self.host, self.port)
        except (OSError, OverflowError, UnicodeError) as error:
            await self._runner.cleanup()
            raise ValueError(f"host, port: cannot listen at {self.host}:{self.port} ({error})") from None
        self.port = self._door.port
        await self.session.start()

    async def close(self) -> None:
        """Send everyone home, end the worker, finish all files."""
        for client in tuple(self.lobby.clients):
            await client.leave()
        await self.session.close()
        if self._door is not None:
            self._door.close()
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[..., Any]) -> web.StreamResponse:
        assert self._door is not None
        try:
            welcome = is_welcome(request, self.host, self.token)
        except ValueError:  # cookies or a query that can't be read
            welcome = False
        if not welcome:
            text = "This world is not open to you. Use the address that `inferix play` printed.\n"
            raise _refusal(web.HTTPForbidden, text)
        if request.body_exists:
            raise _refusal(web.HTTPBadRequest, "A request must have no body.\n")
        self._door.welcome(request)
        response: web.StreamResponse = await handler(request)
        if self.token and "token" in request.query and not response.prepared:
            response.set_cookie("inferix", self.token, httponly=True, samesite="Strict")
        return response

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info.get("page", "index.html")
        if name not in self.pages:
            raise web.HTTPNotFound(text="There is no such page.\n")
        body, kind = self.pages[name]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _metrics(self, request: web.Request) -> web.Response:
        """For Prometheus."""
        return web.Response(body=self.measured.figures.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _profile(self, request: web.Request) -> web.Response:
        """Where the time has gone so far, as a page."""
        remote = self.session.remote if self.session.phase == "running" else None
        text = await self.measured.report(remote)
        headers = HEADERS | {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = self.archive.videos().get(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound(text="There is no such recording.\n")
        if self._downloads >= MAX_DOWNLOADS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_DOWNLOADS} recordings are being fetched already.\n")
        return _Download(self, path)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if len(self.lobby.clients) >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} are watching already.\n")
        # What is larger than MAX_BYTES is answered; what is larger than this ends the connection before it is read.
        # Not compressed: most of it is video, which would only cost time once more.
        socket = web.WebSocketResponse(
            protocols=[protocol.SUBPROTOCOL],
            heartbeat=10.0,
            max_msg_size=8 * protocol.MAX_BYTES,
            timeout=0.5,
            compress=False,
        )
        assert self._door is not None
        with self._door.host(request):
            await socket.prepare(request)
            client = Client(self.lobby, socket, self.lobby.name())
            self.lobby.enter(client)
            try:
                await client.run()
            finally:
                self.lobby.leave(client)
        return socket


class _Download(web.FileResponse):
    """A recording on its way, which may take a while."""

    def __init__(self, server: Server, path: Path):
        super().__init__(path, headers=HEADERS | {"Content-Disposition": f'attachment; filename="{path.name}"'})
        self._server = server

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Send it, all of it."""
        server = self._server
        assert server._door is not None
        server._downloads += 1
        try:
            with server._door.host(request):
                return await super().prepare(request)
        finally:
            server._downloads -= 1


def _refusal(kind: type[web.HTTPError], text: str) -> web.HTTPError:
    """An answer after which nothing more is read."""
    refusal = kind(text=text)
    refusal.force_close()
    return refusal


def _pages() -> dict[str, tuple[bytes, str]]:
    """name -> (content, type) of all that is served besides recordings; read once."""
    package = resources.files(__package__)
    files = [*(package / "static").iterdir(), package / "asyncapi.json"]
    return {file.name: (file.read_bytes(), TYPES["." + file.name.rpartition(".")[2]]) for file in files}


def keep_memory() -> None:
    """Have malloc keep what a picture took for the next one.

    It would give blocks of this size back to the system each time, and new pages for a picture of a megabyte cost as
    much as coding it.
    """
    with suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 64 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


async def serve(server: Server, announce: Callable[[str], None]) -> None:
    """Run until cancelled. `announce` is called with the address once the page can be opened."""
    keep_memory()
    try:
        await server.start()
        announce(server.address)
        await asyncio.Event().wait()
    finally:
        await server.close()
