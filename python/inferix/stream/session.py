"""The show: orders and keys in, pictures and events out.

Two tasks share a queue of pictures. `_make` follows commands and begins a block when `Lead` says so, with what is
pressed at that moment; it alone changes the worlds, so a command falls between two blocks. The `Player` shows the
pictures by its clock. Neither waits for a viewer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from inferix_kernels import profile

from .archive import Archive
from .commands import Commands
from .measured import Measured
from .player import Picture, Player
from .playout import Lead
from .protocol import Message
from .push import Sink
from .remote import Broken, Refused, Remote
from .steering import Steering, Words

UNREAD = 8  # prompts that may wait for their encoding
AHEAD = 2  # blocks: how far the world may run ahead of what is shown
# A worker that has been at one request for so long counts as stuck, if a reset waits for it: four times as long as
# blocks take, but not before the first of these seconds; before a block has been made, the second.
STUCK, STUCK_AT_FIRST = 120.0, 900.0
AT_ONCE = frozenset({"pause", "resume", "step", "steer", "record"})  # need no worlds, and don't wait for their block


@dataclasses.dataclass(eq=False)
class Command:
    name: str
    arguments: dict[str, Any]
    done: asyncio.Future[dict[str, Any] | None]


class Session(Commands):
    """One running model and all who look at it.

    Args:
        opener: opens the world, in the worker.
        announce: called with each event for every viewer.
        archive: where saved worlds and recordings lie.
        seed: of the first world.
        sinks: where the pictures of world "a" are pushed to.
        measured: where its time goes.
    """

    def __init__(
        self,
        opener: Callable[[], Any],
        announce: Callable[[Message], None],
        archive: Archive,
        seed: int = 0,
        sinks: tuple[Sink, ...] = (),
        measured: Measured | None = None,
    ):
        self.measured = measured or Measured()
        self.opener, self.announce, self.archive = opener, announce, archive
        self.remote: Remote | None = None
        self.model: dict[str, Any] = {}  # Stage.describe
        self.player = Player(announce, self._wake, self._recording_failed, sinks)
        self.phase, self.crash, self.seed = "opening", "", seed
        self.made: dict[str, int] = {"a": 0}
        self.undo: dict[str, int] = {"a": 0}
        self.kv_bytes: dict[str, int] = {}
        self.steering = Steering(None)
        self.lead = Lead(0.5)
        self._commands: deque[Command] = deque()
        self._blocks = self._frames = 0  # made so far; never counted back
        self._steps = 0  # blocks to be made although paused
        self._following = False  # a command, right now
        self._reading, self._unread = asyncio.Lock(), 0  # prompts, one after the other as they were said
        self._changed = asyncio.Event()
        self.tried = asyncio.Event()  # to open the first world: it runs, or `crash` says why not
        self.failed = asyncio.Event()  # a world is broken
        self._watching: set[asyncio.Task[None]] = set()  # over resets
        self._making: asyncio.Task[None] | None = None
        self._showing: asyncio.Task[None] | None = None  # begun anew with each world: what it met ends the world
        self.recent: deque[Message] = deque(maxlen=AHEAD + 2)  # the last blocks' events, for who joins

    async def start(self) -> None:
        """Begin to open the world; returns at once."""
        self.measured.start()
        self._making = asyncio.create_task(self._make(), name="session make")
        for sink in self.player.sinks:
            sink.start(lambda: self.announce(self.state()))

    async def close(self) -> None:
        """End everything; files are finished."""
        tasks = {task for task in (self._making, self._showing) if task}
        while tasks:  # again: before Python 3.12 wait_for swallows it if what it waits for comes just then
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.1)
        self._fail_commands("the server is closing")
        await self.measured.write(self.remote)
        self.measured.stop()
        if self.remote:
            await self.remote.close()
        await self.player.close()

    # What viewers get

    def welcome(self) -> Message:
        model = {name: value for name, value in self.model.items() if name != "kv_bytes"}
        return {"type": "welcome", "version": 1, **model}

    def state(self) -> Message:
        return {
            "type": "state",
            "phase": self.phase,
            "crash": self.crash or None,
            "paused": self.player.paused,
            "seed": self.seed,
            "worlds": list(self.made),
            "steered": self.steering.worlds,
            "prompts": {name: self.steering.prompts.get(name) for name in self.made},
            "made": self.made,
            "undo": self.undo,
            "recording": self.player.recorder.name if self.player.recorder else None,
            "profile": self.measured.level,
            "pushing": [{"to": sink.label, "state": sink.state} for sink in self.player.sinks],
        }

    def _wake(self) -> None:
        self._changed.set()

    def changed(self) -> None:
        self._wake()
        self.announce(self.state())

    # What the driver asks for

    async def command(self, name: str, /, **arguments: Any) -> dict[str, Any] | None:
        """Follow a command: in the order in which they come, and between two blocks if it concerns the worlds.

        Raises:
            Refused: it can't be followed, and nothing has changed.
        """
        if self.phase != "running" and name != "reset":
            raise Refused(
                f"{name}: the world is {'still being opened' if self.phase == 'opening' else 'broken: reset it'}"
            )
        if len(self._commands) >= 16:
            raise Refused(f"{name}: 16 commands are waiting already")
        command = Command(name, arguments, asyncio.get_running_loop().create_future())
        command.done.add_done_callback(asyncio.Future.exception)  # known, even if who asked has left
        if name in AT_ONCE and not self._commands and not self._following:
            await self._follow(command)
        else:
            self._commands.append(command)
            self._changed.set()
        if name == "reset":
            watching = asyncio.create_task(self._see_to(command), name="session reset")
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)
        return await asyncio.shield(command.done)  # who asked may leave; what was asked is done all the same

    async def _see_to(self, reset: Command) -> None:
        """A reset comes about even if the worker is stuck: then it is replaced."""
        while not reset.done.done():
            await asyncio.wait((reset.done,), timeout=1.0)
            expected = self.lead.expected
            limit = STUCK_AT_FIRST if expected is None else max(STUCK, 4 * expected)
            if not reset.done.done() and self.remote and (why := self.remote.hangs(limit)):
                self.remote.kill(f"{why}, and was replaced")

    async def prompt(self, text: str, recache: bool | None, id: str | None) -> None:
        """Words for the steered worlds, from the next block on. They are encoded while blocks are made, one after
        the other: those said last come into force last, however long each takes."""
        if self.phase != "running" or self.remote is None:
            raise Refused("prompt: there is no world to hear it")
        if recache and not self.model["can_recache"]:
            raise Refused("prompt.recache: this model's past was made under actions, and can't be redone under words")
        if self._unread >= UNREAD:
            raise Refused(f"prompt: {UNREAD} are waiting to be read already")
        worlds, self._unread = list(self.steering.worlds), self._unread + 1
        try:
            async with self._reading:
                await self._call("prepare", text=text)
        finally:
            self._unread -= 1
        if not (worlds := [name for name in worlds if name in self.made]):
            raise Refused("prompt: its world has gone")
        for old in self.steering.say(worlds, text, recache, id):
            gone: Message = {"id": old.id, "text": old.text, "worlds": [], "state": "replaced", "frame": None}
            self.announce({"type": "prompt", **gone})
        self.announce({"type": "prompt", "id": id, "text": text, "worlds": worlds, "state": "waiting", "frame": None})
        self._changed.set()

    # Making

    async def _make(self) -> None:
        while True:
            try:
                await self._open()
                while True:
                    await self._until_work()
                    if self._commands:
                        await self._follow(self._commands.popleft())
                    else:
                        await self._block()
            except Broken as error:
                self._crashed(str(error))
            except Exception as error:  # a mistake of ours must show as well, and leave the server up
                self._crashed(f"{type(error).__name__}: {error}")
            await self._until_reset()

    async def _open(self) -> None:
        if self.remote is not None:
            await self.remote.close()
        self.phase, self.crash = "opening", ""
        self._start_over()
        self.changed()
        if self._showing is None or self._showing.done():
            self._showing = asyncio.create_task(self.player.run(), name="session show")
            self._showing.add_done_callback(lambda _: self._wake())
        self.remote = Remote(self.opener)
        self.model = await self.remote.opened()
        fps = self.model["fps"]
        self.player.configure(fps, tuple(self.model["size"]), self.model["scale"])
        self.steering = Steering(self.model["actions"], self.model["keys"], self.model["together"])
        self.steering.say(["a"], self.model["prompts"][0], None, None)
        self.kv_bytes = self.model["kv_bytes"]
        self.lead = Lead(limit=AHEAD * self.model["block"] / fps)
        await self._call("reset", seed=self.seed)
        await self.measured.opened(self.remote)
        self.phase = "running"
        self.tried.set()
        self.announce(self.welcome())
        self.changed()

    def _crashed(self, reason: str) -> None:
        self.phase, self.crash = "crashed", reason[-4000:]
        self.tried.set()
        self.failed.set()
        self.player.clear()
        resets = [command for command in self._commands if command.name == "reset"]
        self._fail_commands("the world is broken: reset it", keep=resets)
        self.changed()

    def _fail_commands(self, why: str, keep: Sequence[Command] = ()) -> None:
        for command in self._commands:
            if command not in keep and not command.done.done():
                command.done.set_exception(Refused(f"{command.name}: {why}"))
        self._commands = deque(keep)

    async def _until_reset(self) -> None:
        while not self._commands:
            self._changed.clear()
            await self._changed.wait()
        command = self._commands.popleft()
        self.seed = command.arguments.get("seed", self.seed)
        command.done.set_result(None)

    async def _until_work(self) -> None:
        """Return when there is a command to follow, or the next block is to be begun."""
        while not self._commands:
            if self._showing and self._showing.done():
                self._showing.result()  # raises what the player met
            wait: float | None = None
            if not self.player.paused or self._steps:
                wait = self.lead.wait(self.player.left())
                if wait <= 0:
                    return
            self._changed.clear()
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    async def _block(self) -> None:
        """Make the next block under what is pressed and said now."""
        block = self._blocks
        orders, seq, said = self.steering.orders(list(self.made))
        if self._steps:
            self._steps, self.player.until = self._steps - 1, block
        ahead, positions = self.player.left(), dict(self.made)
        started = profile.clock()
        try:
            made = await self._call("step", orders=orders)
        except Refused as refusal:  # not even the model's own words: nothing will ever come
            raise Broken(f"the world refuses its next block: {refusal}") from None
        ended = profile.clock()
        profile.record("request", started, ended, track="worlds")
        total = ended - started
        if all(positions.values()):  # a block without a past takes many more steps
            self.lead.made(total)
        for name, why in made["ended"].items():
            other = "b" if name == "a" else "a"
            orders, positions = {"a": orders[other]}, {"a": positions[other]}
            said = [dataclasses.replace(words, worlds=["a"]) for words in said if other in words.worlds]
            await self._closed(name, made)
            text = f"world {name} has ended: {why}"[:500]
            self.announce({"type": "error", "id": None, "code": "internal", "text": text})
            self.changed()
        self._take(made)
        pictures: dict[str, np.ndarray] = made["pictures"]
        count, first = max(map(len, pictures.values())), self._frames
        for i in range(count):
            worlds = {name: frames[min(i, len(frames) - 1)] for name, frames in pictures.items()}
            self.player.queue.append(Picture(first + i, block, worlds))
        self._blocks, self._frames = block + 1, first + count
        spent, queue, late = made["seconds"], len(self.player.queue), self.player.clock.slips
        beside = {"transfer": max(0.0, total - spent["total"]), "encode": self.player.broadcast.encode_seconds * count}
        event = {
            "type": "block",
            "block": block,
            "first": first,
            "frames": count,
            "applied_seq": seq,
            "positions": positions,
            "actions": {name: order.action for name, order in orders.items()},
            "made": self.made,
            "undo": self.undo,
            "ahead": ahead,
            "queue": queue,
            "seconds": {"denoise": spent["denoise"], "pictures": spent["pictures"], **beside, "total": total},
            "spans": self.measured.block(made, total, queue, late) | beside,
            "kv_bytes": self.kv_bytes,
            "slips": late,
        }
        self.recent.append(event)
        self.announce(event)
        self._applied(said, first)
        self.player.ready.set()

    def _applied(self, said: list[Words], frame: int) -> None:
        """These words are in force from this frame on."""
        for words in said:
            self.steering.prompts |= dict.fromkeys(words.worlds, words.text)
            applied = {"id": words.id, "text": words.text, "worlds": words.worlds, "state": "applied", "frame": frame}
            self.announce({"type": "prompt", **applied})
        if said:
            self.announce(self.state())

    async def _follow(self, command: Command) -> None:
        self._following = True
        try:
            result = await getattr(self, f"_do_{command.name}")(**command.arguments)
        except (ValueError, OSError) as refusal:  # Refused, or a file that can't be written
            command.done.set_exception(Refused(self._words(command, refusal)))
        except BaseException as error:
            if isinstance(error, Broken) and command.name == "reset":
                self._commands.appendleft(command)  # that is what it is for
            else:
                what = error.line if isinstance(error, Broken) else error
                command.done.set_exception(Refused(f"{command.name}: {what}"))
            if isinstance(error, Exception) and command.name in AT_ONCE:
                return  # the worlds have no part in it
            raise
        else:
            command.done.set_result(result)
            self.changed()
        finally:
            self._following = False

    def _words(self, command: Command, refusal: Exception) -> str:
        """Begins with the command, and names files without their folder, which is nobody's business."""
        text = str(refusal).replace(f"{self.archive.folder}{os.sep}", "")
        return text if text.startswith(command.name) else f"{command.name}: {text}"
