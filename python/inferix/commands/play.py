"""`inferix play`: a world that is steered, on a page or in the terminal."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import signal
import sys
from typing import TYPE_CHECKING, Any

from ..launcher import launched_rank
from .configs import PlayConfig
from .interactive import open_world
from .options import configured, declared

if TYPE_CHECKING:
    from ..stream.server import Server


def play(config: PlayConfig | None = None, /, **options: Any) -> None:
    """Serve a world, whose address is printed, until Ctrl-C; or play it in this terminal until q.

    Args:
        config: what to play; without one, the defaults.
        options: fields of PlayConfig, in place of those of `config`.

    The worlds of a page run in a process of their own, which imports the script that calls this: there the call stands
    under `if __name__ == "__main__":`.

    Raises:
        ValueError: an option is not what it must be, or the world can't be opened.

    Example:
        >>> inferix.play(model="tiny", port=8001, undo=30)  # doctest: +SKIP
        The tiny world is at http://127.0.0.1:8001/
        Ctrl-C ends it.
    """
    config = configured(PlayConfig, config, options)
    settings = {"threads": config.threads, "image": config.image, "parallel": config.parallel}
    settings |= config.arguments("model") | config.arguments("world")
    if config.terminal:
        _in_terminal(config, settings)
    else:
        _on_page(config, settings)


def run(config: PlayConfig) -> int:
    play(config)
    return 0


def _in_terminal(config: PlayConfig, settings: dict[str, Any]) -> None:
    from ..profile import profiling
    from . import terminal

    page_only = [each for each in declared(PlayConfig) if each.option.page_only]
    if given := [each.name for each in page_only if getattr(config, each.name) != each.default]:
        raise ValueError(f"{', '.join(given)}: for the page only, not with `terminal`")
    if launched_rank() is not None:
        raise ValueError("terminal must not be given under torchrun: rank 0 has the page, and no rank a terminal")
    world = open_world(config.model, undo_seconds=0, worlds=1, **settings)
    presentation = world.model.presentation
    level = "block" if config.profile is None else "layer"
    with profiling(level, config.profile, title=f"{config.model}, played in a terminal"):
        terminal.play(world, presentation.example_prompts, presentation.keys)


def _on_page(config: PlayConfig, settings: dict[str, Any]) -> None:
    try:
        from ..stream.server import Server
    except ModuleNotFoundError as error:
        from inferix_kernels._install import install

        raise ImportError(f"the page needs {error.name}: {install('stream')}, or play in the `terminal`") from None
    from ..stream import log
    from ..stream.worker import PROCESS

    if multiprocessing.current_process().name == PROCESS:
        raise RuntimeError(
            'in a script, call play under `if __name__ == "__main__":`, as its worlds\' process imports it'
        )
    opener = functools.partial(open_world, config.model, undo_seconds=config.undo, worlds=config.worlds, **settings)
    log.configure()
    if launched_rank():  # rank 0 has the page; its worlds' process is the group's first
        ranks = opener().ranks
        assert ranks is not None
        with ranks:
            ranks.follow()
        return
    asyncio.run(_until_interrupted(Server(opener, seed=config.seed, **config.arguments("server")), config.model))


async def _until_interrupted(server: Server, model: str) -> None:
    from ..stream.remote import last_line
    from ..stream.server import serve

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def announce(address: str) -> None:
        print(f"The {model} world is at {address}", "Ctrl-C ends it.", sep="\n", flush=True)

    session = server.session
    running, stopped = asyncio.create_task(serve(server, announce)), asyncio.create_task(stop.wait())
    tried, failed = asyncio.create_task(session.tried.wait()), asyncio.create_task(session.failed.wait())
    await asyncio.wait((running, stopped, tried), return_when=asyncio.FIRST_COMPLETED)
    fatal = bool(session.crash)  # of a world that has never run: there is nothing to serve
    if not fatal:
        grouped = launched_rank() is not None  # what is broken can't be reset: its processes are one group
        await asyncio.wait((running, stopped, *[failed] * grouped), return_when=asyncio.FIRST_COMPLETED)
        fatal = grouped and bool(session.crash)
    for task in (running, stopped, tried, failed):
        task.cancel()
    try:
        await running
    except asyncio.CancelledError:
        if fatal:
            raise ValueError(last_line(session.crash)) from None
        print("ended", file=sys.stderr)
