"""The worlds, in a process of their own: they never hold up the server, and what breaks here leaves it standing.

The parent sends (id, name, arguments) and gets (id, result, error) for each. It decides when a block is made and
under which controls; here it is only made. Requests are done one by one, but for `prepare`, which may take seconds for
a large text encoder and runs at the same time. A heartbeat, None, says every second that the process lives. All threads
are there before the first request: one that can't be started later ends nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferix_kernels import profile

from ..launcher import launched_rank

if TYPE_CHECKING:
    from ..ranks import Ranks

PROCESS = "inferix-worlds"  # its name
REFUSED, BROKEN = "refused", "broken"
END = "end"  # a request that nothing answers
HEARTBEAT = 1.0  # seconds
# Requests that leave the worlds as they were if they fail, for whatever reason: a full disk, a store without room.
HARMLESS = frozenset({"prepare", "fork", "save", "load"})


@dataclasses.dataclass(frozen=True)
class Order:
    """The controls of one world's next block; None: no actions, the prompt it has, the model's own way."""

    action: str | None = None
    prompt: str | None = None
    recache: bool | None = None


@dataclasses.dataclass
class Running:
    """One world, and how far it can be rewound: (pictures, latent frames) of its last blocks, newest last."""

    world: Any
    blocks: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    pictures: int = 0  # made so far, those taken back apart

    @property
    def undo(self) -> int:
        """Pictures that can be taken back."""
        return sum(pictures for pictures, _ in self.blocks) if self.world.can_rewind else 0


class Stage:
    """Worlds by name over one store: "a", and "b" while there is a fork.

    Args:
        opener: opens the first one: a `World`, with room for a second one if there may be a fork.
        profiled: a Profiling, of what happens in this process.
    """

    def __init__(self, opener: Callable[[], Any], profiled: Any = None):
        self.worlds = {"a": Running(opener())}
        self.profiled = profiled
        self._rows: list[profile.Row] = []  # of this step's blocks
        if profiled is not None:
            profile.on_block(self._rows.append)

    def describe(self) -> dict[str, Any]:
        """What the page needs to know of the model."""
        world = self.worlds["a"].world
        adapter, presentation = world.model.adapter, world.model.presentation
        return {
            "model": adapter.name,
            "fps": presentation.fps,
            "size": list(adapter.size),
            "scale": presentation.scale,
            "block": adapter.block_frames,
            "actions": list(adapter.actions),
            "keys": dict(presentation.keys),
            "together": adapter.together,
            "words": adapter.words,
            "prompts": list(presentation.example_prompts),
            "recache": bool(adapter.recache),
            # Of what was done in past blocks nothing is kept: they can be computed again for words alone.
            "can_recache": not adapter.actions,
            "can_rewind": bool(world.can_rewind),
            "can_fork": world.worlds > 1,
            "kv_bytes": world.kv_bytes(),
        }

    def step(self, orders: dict[str, Order]) -> dict[str, Any]:
        """The next block of every world: pictures uint8 [n, height, width, 3] by name, and where the time went.

        Of two worlds one whose block is not finite is gone: `ended` says why, by the name that it had, and the other,
        whose block this is, is "a" from now on.

        Raises:
            NotFinite: no world is left that can go on; a reset or a load begins anew.
        """
        with profile.timed("request") as taken:
            pictures, ended, denoising = self._blocks(orders)
        total = taken.seconds
        seconds = {"denoise": denoising, "pictures": total - denoising, "total": total}
        measured = {"profile": self._measured()} if self.profiled is not None else {}
        return {"pictures": pictures, "seconds": seconds, "ended": ended, **measured, **self._extent()}

    def _blocks(self, orders: dict[str, Order]) -> tuple[dict[str, Any], dict[str, str], float]:
        """(pictures by name, why worlds have ended by name, seconds of denoising)."""
        from inferix.finite import NotFinite

        denoising, pictures, ended = 0.0, {}, {}
        coming, latents = {}, {}
        for name, running in self.worlds.items():  # one is denoised while the pictures of the other are decoded
            order, before = orders[name], running.world.frames
            try:
                coming[name] = running.world.advance(action=order.action, prompt=order.prompt, recache=order.recache)
            except NotFinite as error:  # it has released itself, and only itself
                ended[name] = error
                continue
            denoising += running.world.denoising
            latents[name] = running.world.frames - before
        for name, there in coming.items():
            running = self.worlds[name]
            try:
                pictures[name] = there.result()
            except NotFinite as error:
                running.world.release()
                ended[name] = error
                continue
            running.pictures += len(pictures[name])
            running.blocks.append((len(pictures[name]), latents[name]))
            self._forget_what_rewind_cannot_reach(running)
        if len(ended) == len(self.worlds):
            self.worlds = {"a": running}
            raise next(iter(ended.values()))
        for name in ended:
            self.close(name)
            pictures = {"a": next(iter(pictures.values()))}
        return pictures, {name: str(why) for name, why in ended.items()}, denoising

    def _measured(self) -> dict[str, Any]:
        """The profiler's: seconds by span of this step's blocks, those within apart, and totals since it began."""
        spans: dict[str, float] = {}
        for row in self._rows:
            for name, each in row.spans.items():
                spans[name] = spans.get(name, 0.0) + each.own
        self._rows.clear()
        return {"spans": spans, "totals": self.profiled.totals()}

    def set_level(self, level: str) -> None:
        """How much the profiler records from now on."""
        profile.set_level(level)

    def snapshot(self) -> dict[str, Any]:
        """All that the profiler has recorded."""
        taken: dict[str, Any] = self.profiled.snapshot()
        return taken

    def commit_pending(self) -> None:
        """What can be done while a block is shown, so that the next one comes sooner after its controls."""
        for running in self.worlds.values():
            running.world.commit_pending()

    def prepare(self, text: str) -> None:
        """Raise ValueError unless the model knows what these words mean; make them quick to use."""
        self.worlds["a"].world.model.prepare(text)

    def fork(self) -> dict[str, Any]:
        one = self.worlds["a"]
        if "b" in self.worlds:
            raise ValueError("fork: there are two worlds already: close one")
        if one.world.worlds < 2:
            raise ValueError("fork: there is room for one world: play --worlds 2")
        self.worlds["b"] = Running(one.world.fork(), list(one.blocks), one.pictures)
        return self._extent()

    def close(self, name: str) -> dict[str, Any]:
        """End one of two worlds; the other is "a" from then on."""
        if len(self.worlds) < 2 or name not in self.worlds:
            raise ValueError(f"close: world must be one of two, got {name!r} of {', '.join(self.worlds)}")
        self.worlds.pop(name).world.release()
        self.worlds = {"a": next(iter(self.worlds.values()))}
        return self._extent()

    def rewind(self, names: list[str], position: int) -> dict[str, Any]:
        """Take back whole blocks, until at most `position` pictures of each world are left."""
        for name in names:
            running = self.worlds[name]
            if not running.world.can_rewind:
                raise ValueError(
                    "rewind: this model's pictures depend on those before: keep a fork, or play --undo SECONDS"
                )
            if position < running.pictures - running.undo:
                raise ValueError(
                    f"rewind: frame must be {running.pictures - running.undo} or later, as far back as world "
                    f"{name} remembers, got {position}"
                )
        for name in names:
            running = self.worlds[name]
            latents, blocks, left = 0, list(running.blocks), running.pictures
            while left > position:
                count, frames = blocks.pop()
                left, latents = left - count, latents + frames
            running.world.rewind(latents)
            running.blocks, running.pictures = blocks, left
        return {"pictures": {name: self.worlds[name].world.last_picture() for name in names}, **self._extent()}

    def reset(self, seed: int) -> dict[str, Any]:
        """One world again, from nothing."""
        if "b" in self.worlds:
            self.close("b")
        running = self.worlds["a"]
        running.world.reset(seed)
        running.blocks, running.pictures = [], 0
        return self._extent()

    def save(self, name: str, folder: Path, most: int | None = None) -> dict[str, Any]:
        """Into `folder`, which is to take at most so many bytes; None: no bound."""
        from inferix.saved import save

        save(self.worlds[name].world, folder, most)
        return self._extent()

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on with a saved world, alone. Nothing ends before it is there."""
        from inferix.saved import load
        from inferix_kernels import OutOfPages

        old = [running.world for running in self.worlds.values()]
        if old[0].worlds < 2:
            raise ValueError("load: there is no room for a second world: play --worlds 2")
        try:
            world = load(old[0], folder)
        except OutOfPages as error:
            if len(old) < 2:
                raise
            raise ValueError(f"load: there is no room for a third world, close one first ({error})") from None
        self.worlds = {"a": Running(world)}
        for one in old:
            one.release()
        return {"picture": world.last_picture(), "prompt": world.prompt, **self._extent()}

    def _extent(self) -> dict[str, Any]:
        """By world: pictures made, and how many of the last ones can be taken back; bytes of the store by format."""
        return {
            "made": {name: running.pictures for name, running in self.worlds.items()},
            "undo": {name: running.undo for name, running in self.worlds.items()},
            "kv_bytes": self.worlds["a"].world.kv_bytes(),
        }

    def _forget_what_rewind_cannot_reach(self, running: Running) -> None:
        """The world says how far it can be rewound: after a new rollout, or a recache, not as far as before."""
        reach = running.world.undo
        while sum(latents for _, latents in running.blocks) > reach:
            running.blocks.pop(0)


def serve(connection: Connection, opener: Callable[[], Any]) -> None:
    """The process: answers until the parent hangs up."""
    _leave_signals_to_parent()
    from inferix_kernels.distributed import PeerLost  # brings torch

    lock, stage = threading.Lock(), list[Stage]()
    texts: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()

    def reply(number: int, name: str, work: Callable[..., Any], /, **arguments: Any) -> None:
        result, error = None, None
        try:
            result = work(**arguments)
        except ValueError as refusal:
            error = (REFUSED, str(refusal))
        except PeerLost as loss:
            error = (BROKEN, str(loss))
        except Exception as failure:
            error = (BROKEN, traceback.format_exc())
            if name in HARMLESS:
                error = (REFUSED, f"{name}: {(str(failure).splitlines() or [type(failure).__name__])[0]}")
        with lock:
            connection.send((number, result, error))

    def open_stage() -> dict[str, Any]:
        from ..profile import Profiling

        stage.append(Stage(opener, Profiling("block", "worlds")))
        return stage[0].describe()

    def beat() -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            while True:
                with lock:
                    connection.send(None)
                time.sleep(HEARTBEAT)

    def read_texts() -> None:
        with contextlib.suppress(OSError):
            while True:
                number, arguments = texts.get()
                reply(number, "prepare", stage[0].prepare, **arguments)

    try:
        for run in (beat, read_texts):
            threading.Thread(target=run, daemon=True, name=run.__name__).start()
        reply(0, "open", open_stage)
        while stage and (request := connection.recv())[1] != END:
            number, name, arguments = request
            if name == "prepare":
                texts.put((number, arguments))
            else:
                reply(number, name, getattr(stage[0], name), **arguments)
            if name == "step" and not connection.poll():
                with contextlib.suppress(PeerLost):  # the next request says so
                    stage[0].commit_pending()
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        if stage:
            _end_together(stage[0].worlds["a"].world.ranks)


def _leave_signals_to_parent() -> None:
    """Ctrl-C in a terminal reaches us too, and of several ranks what ends torchrun; the parent ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if launched_rank() is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_together(ranks: Ranks | None) -> None:
    if ranks is not None:
        with contextlib.suppress(RuntimeError):  # one is lost: the parent knows, or will not ask any more
            ranks.__exit__(None, None, None)
