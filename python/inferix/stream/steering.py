"""What the driver wants: keys as state, words on their way, and which worlds follow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from .worker import Order

SILENCE = 1.0  # seconds without a word from the keys: they count as released


@dataclasses.dataclass
class Words:
    """A prompt on its way into some worlds."""

    worlds: list[str]
    text: str
    recache: bool | None
    id: str | None


class Steering:
    """Turns keys and prompts into one order per world and block.

    Args:
        actions: what can be done, the first being nothing; empty for a model that is steered by words alone; None as
            long as no world is open.
        keys: key -> action.
        together: what is held at once is done at once, named "forward+left"; else the action that came last.
    """

    def __init__(self, actions: Sequence[str] | None, keys: Mapping[str, str] | None = None, together: bool = False):
        self.opened, self.actions, self.together = actions is not None, tuple(actions or ()), together
        self._names = dict(keys or {}) | {action: action for action in self.actions}
        self.worlds = ["a"]  # that follow
        self.prompts: dict[str, str | None] = {}  # in force
        self.seq = -1
        self._held: tuple[str, ...] = ()
        self._tapped: str | None = None  # pressed since the last block, even if released by now
        self._heard = 0.0
        self._waiting: list[Words] = []

    def press(self, seq: int, pressed: Sequence[str], now: float | None = None) -> bool:
        """Take the state of the keys; False if a later one is known.

        Raises:
            ValueError: a name that the model does not know; nothing has changed.
        """
        unknown = [name for name in pressed if name not in self._names]
        if unknown and not self.opened:
            raise ValueError("keys: the world is still being opened")
        if unknown:
            known = ", ".join(self.actions) or "none: this model is steered by words alone"
            raise ValueError(f"keys.pressed must be of {known}, got {unknown[0]!r}")
        if seq <= self.seq:
            return False
        held = tuple(self._names[name] for name in pressed)
        fresh = [action for action in held if action not in self._held]
        if fresh:
            self._tapped = fresh[-1]
        self.seq, self._held, self._heard = seq, held, time.monotonic() if now is None else now
        return True

    def let_go(self) -> None:
        """The driver is gone, or another one comes: all keys are up, and sequence numbers begin anew."""
        self.seq, self._held, self._tapped = -1, (), None

    def say(self, worlds: Sequence[str], text: str, recache: bool | None, id: str | None) -> list[Words]:
        """Words for some worlds, from the next block on. They take the place of others that wait for it, so that each
        world has one prompt waiting at most, however long the block takes to come.

        Returns:
            those that no world will follow any more.
        """
        replaced = self._follow(lambda words: [name for name in words.worlds if name not in worlds])
        self._waiting.append(Words(list(worlds), text, recache, id))
        return replaced

    def orders(self, worlds: Sequence[str], now: float | None = None) -> tuple[dict[str, Order], int, list[Words]]:
        """One order per world for the block that begins now, the keys' sequence number, the words that it follows."""
        said, self._waiting = self._waiting, []
        action = self._action(time.monotonic() if now is None else now)
        orders = {}
        for name in worlds:
            words = next((words for words in said if name in words.worlds), None)
            orders[name] = Order(
                action=action if name in self.worlds else self.actions[0] if self.actions else None,
                prompt=words.text if words else None,
                recache=words.recache if words else None,
            )
        return orders, self.seq, said

    def _action(self, now: float) -> str | None:
        if not self.actions:
            return None
        tapped, self._tapped = self._tapped, None
        if now - self._heard > SILENCE:
            self._held = ()
        if self.together and self._held:
            return "+".join(dict.fromkeys(self._held))
        return self._held[-1] if self._held else tapped or self.actions[0]

    # Worlds come and go

    def _follow(self, worlds: Callable[[Words], list[str]]) -> list[Words]:
        """Say anew for which worlds the words are that wait. Returns those that are for none, and wait no more."""
        for words in self._waiting:
            words.worlds = worlds(words)
        gone = [words for words in self._waiting if not words.worlds]
        self._waiting = [words for words in self._waiting if words.worlds]
        return gone

    def keep(self, worlds: Sequence[str]) -> None:
        """Only these worlds exist now."""
        self.worlds = [name for name in self.worlds if name in worlds] or ["a"]
        self.prompts = {name: text for name, text in self.prompts.items() if name in worlds}
        self._follow(lambda words: [name for name in words.worlds if name in worlds])

    def fork(self) -> None:
        """The new world knows the words of the first, and is the one to follow."""
        self.prompts["b"] = self.prompts.get("a")
        for words in self._waiting:
            if "a" in words.worlds:
                words.worlds.append("b")
        self.worlds = ["b"]

    def close(self, world: str) -> None:
        """Of two worlds one ends; the other is "a" from now on, under its own words."""
        other = "b" if world == "a" else "a"
        self.prompts = {"a": self.prompts.get(other)}
        self._follow(lambda words: ["a"] if other in words.worlds else [])
        self.worlds = ["a"]

    def begin(self, text: str | None, known: str | None = None) -> None:
        """One world from its start, under the prompt `text`; or one that is loaded and knows its words."""
        self._waiting, self.worlds, self.prompts = [], ["a"], {"a": known}
        if text is not None:
            self.say(["a"], text, None, None)
