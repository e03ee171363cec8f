"""`inferix play`: a world on a page."""

from __future__ import annotations

import argparse
import asyncio
import functools
import signal
import sys

from ..stream import log
from ..stream.remote import last_line
from ..stream.server import Server, serve
from ..stream.worker import open_world


def play(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Raises:
        ValueError: an option is not what it must be, or the world can't be opened.
    """
    opener = functools.partial(
        open_world,
        args.model,
        undo_seconds=args.undo,
        worlds=args.worlds,
        threads=args.threads,
        kv=args.kv,
        window=args.window,
        sink=args.sink,
        seed=args.seed,
        backend=args.backend,
        weights=args.weights,
        lora=args.lora,
        size=args.size,
        device=args.device,
    )
    log.configure()
    server = Server(
        opener,
        host=args.host,
        port=args.port,
        token=args.token,
        folder=args.folder,
        seed=args.seed,
        push=tuple(args.push),
        max_files=args.max_files,
        max_gb=args.max_gb,
    )
    asyncio.run(_until_interrupted(server, args.model))
    return 0


async def _until_interrupted(server: Server, model: str) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def announce(address: str) -> None:
        print(f"The {model} world is at {address}", "Ctrl-C ends it.", sep="\n", flush=True)

    running, stopped = asyncio.create_task(serve(server, announce)), asyncio.create_task(stop.wait())
    tried = asyncio.create_task(server.session.tried.wait())
    await asyncio.wait((running, stopped, tried), return_when=asyncio.FIRST_COMPLETED)
    crash = server.session.crash  # of a world that has never run: there is nothing to serve
    if not crash:
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in (running, stopped, tried):
        task.cancel()
    try:
        await running
    except asyncio.CancelledError:
        if crash:
            raise ValueError(last_line(crash)) from None
        print("ended", file=sys.stderr)
