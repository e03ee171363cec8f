"""What the driver may ask of the worlds, each a command that falls between two blocks: `_do_` and its name.

A part of the session, whose state it changes: the rest is about when something is done, this is about what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .archive import Archive
from .measured import Measured
from .player import Player
from .protocol import Message
from .recorder import Recorder
from .remote import Refused, Remote
from .steering import Steering

STEPS = 8  # that may wait to be made


class Commands:
    """See Session, which sets these."""

    announce: Callable[[Message], None]
    archive: Archive
    measured: Measured
    remote: Remote | None
    model: dict[str, Any]
    player: Player
    steering: Steering
    seed: int
    made: dict[str, int]
    undo: dict[str, int]
    kv_bytes: dict[str, int]
    _steps: int
    changed: Callable[[], None]

    async def _call(self, request: str, /, **arguments: Any) -> Any:
        assert self.remote is not None
        return await self.remote.call(request, **arguments)

    def _take(self, reply: dict[str, Any]) -> None:
        """The extent of the worlds after a request."""
        self.made, self.undo, self.kv_bytes = reply["made"], reply["undo"], reply["kv_bytes"]
        self.steering.keep(list(self.made))

    def _start_over(self) -> None:
        self.made, self.undo = {"a": 0}, {"a": 0}
        self.player.clear()
        self.player.last, self.player.until, self._steps = {}, -1, 0

    async def _do_pause(self) -> None:
        self.player.paused, self.player.until, self._steps = True, -1, 0

    async def _do_resume(self) -> None:
        self.player.paused = False
        self.player.clock.rest()
        self.player.ready.set()

    async def _do_step(self) -> None:
        if not self.player.paused:
            raise Refused("step: pause first")
        if self._steps >= STEPS:
            raise Refused(f"step: {STEPS} blocks are to be made already")
        self._steps += 1

    async def _do_reset(self, seed: int | None = None) -> None:
        self.seed = self.seed if seed is None else seed
        self._take(await self._call("reset", seed=self.seed))
        prompt = self.steering.prompts.get("a") or self.model["prompts"][0]
        self._start_over()
        await self._end_orphaned_recording()
        self.steering.begin(prompt)
        self._steps = int(self.player.paused)  # so that there is something to see

    async def _do_fork(self) -> None:
        self._take(await self._call("fork"))
        self.steering.fork()
        for picture in self.player.queue:
            picture.worlds.setdefault("b", picture.worlds["a"])
        if shown := self.player.last:
            await self.player.show(shown | {"b": shown["a"]})

    async def _do_close(self, world: str) -> None:
        await self._closed(world, await self._call("close", name=world))

    async def _closed(self, world: str, reply: dict[str, Any]) -> None:
        """Of two worlds this one has gone; the other is "a" from now on."""
        other = "b" if world == "a" else "a"
        self.steering.close(world)
        self._take(reply)
        for picture in self.player.queue:
            picture.worlds = {"a": picture.worlds.get(other, picture.worlds["a"])}
        if recorder := self.player.recorder:
            recorder.world = "a" if recorder.world == other else "closed"
        await self._end_orphaned_recording()
        if other in self.player.last:
            await self.player.show({"a": self.player.last[other]})

    async def _do_steer(self, worlds: list[str]) -> None:
        if missing := [name for name in worlds if name not in self.made]:
            raise Refused(f"steer: worlds must be of {', '.join(self.made)}, got {', '.join(missing)}")
        self.steering.worlds = sorted(worlds)

    async def _do_rewind(self, frame: int) -> None:
        names = list(self.steering.worlds)
        reply = await self._call("rewind", names=names, position=frame)
        self._take(reply)
        self.player.clear()
        shown = {name: picture for name, picture in reply["pictures"].items() if picture is not None}
        await self.player.show(self.player.last | shown)

    async def _do_save(self) -> dict[str, Any]:
        name = self.archive.new(self.model["model"])
        world, folder, room = self.steering.worlds[0], self.archive.world(name), self.archive.room()
        self._take(await self._call("save", name=world, folder=folder, most=room))
        self.announce(self.archive.listing())
        return {"name": name}

    async def _do_load(self, name: str) -> None:
        if name not in self.archive.worlds():
            raise Refused(f"load: name must be that of a saved world, got {name!r}")
        reply = await self._call("load", folder=self.archive.world(name))
        self._start_over()
        self._take(reply)
        await self._end_orphaned_recording()
        self.steering.begin(None, reply["prompt"])
        if reply["picture"] is not None:
            await self.player.show({"a": reply["picture"]})

    async def _do_profile(self, level: str) -> None:
        await self.measured.set_level(level, self.remote)

    async def _do_record(self, on: bool) -> dict[str, Any] | None:
        if not on:
            return await self._stop_recording()
        if self.player.recorder is not None:
            raise Refused("record: a recording is under way")
        name, world = self.archive.new(self.model["model"]), self.steering.worlds[0]
        shape = self.model["fps"], tuple(self.model["size"]), self.model["scale"]
        self.player.recorder = recorder = Recorder(self.archive.video(name), world, *shape, self.archive.room)
        return {"name": recorder.name}

    async def _end_orphaned_recording(self) -> None:
        """Worlds have gone: end the recording if its world is one of them."""
        recorder = self.player.recorder
        if recorder is not None and recorder.world not in self.made:
            await self._stop_recording()
            text = f"record: {recorder.name} has ended with its world"
            self.announce({"type": "error", "id": None, "code": "internal", "text": text})

    async def _stop_recording(self) -> dict[str, Any] | None:
        recorder = await self.player.stop_recording()
        if recorder is None:
            return None
        if recorder.error:
            self._recording_failed(recorder)
        else:
            self.announce(self.archive.listing())
        return {"name": recorder.name, "frames": recorder.frames}

    def _recording_failed(self, recorder: Recorder) -> None:
        text = f"record: {recorder.error}"[:500]
        self.announce({"type": "error", "id": None, "code": "internal", "text": text})
        self.announce(self.archive.listing())
        self.changed()
