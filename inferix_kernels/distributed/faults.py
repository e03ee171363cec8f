"""Which rank is lost, and how the others learn of it.

Neither gloo nor NCCL says which rank a broken wait was for, and NCCL may say nothing at all. So each rank has a thread
that writes a heartbeat into the group's store, its `Status`, several times a second, and reads everybody else's:

- a rank whose process has ended is lost at once. On its own machine it is looked for in /proc; from another one, a
  closed connection and missing heartbeats are taken for it;
- a rank whose heartbeats are missing, but whose connection is open, may come back until a wait's deadline: a process
  can be stopped, a machine can be slow;
- a rank that lives and posts nothing is found at the deadline, from who waits for whom;
- where the store is in a process that is stopped or gone itself, processes of this machine are looked for all the
  same; of other machines' no more is known than whose messages did not come;
- what one rank finds, or what ended it, is in its status: the others' waits end with the same ranks and reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 0.2  # seconds between two heartbeats
MISSED = 5  # in a row, after which a rank may be lost: one second
PATIENCE = (MISSED + 2) * BEAT  # for evidence of who it was, once a connection is closed


class Where(NamedTuple):
    """What a rank is doing: for messages."""

    op: str = "a message"
    layer: int = -1
    block: int = -1


class PeerLost(RuntimeError):
    """Ranks that others waited for, and in what. Every wait of a transport ends, in this if in nothing else.

    Attributes:
        ranks: of the group, ascending.
        op, layer, block: what the waiting rank had announced with `Transport.at`; -1: nothing.
        waited: seconds.
        reason: what is known of the ranks: "its process has ended", the message of an exception raised there, …

    Example:
        >>> from inferix_kernels.distributed import PeerLost
        >>> str(PeerLost([2], "ring hop 3 of 7", 12, 41, 10.0, "its process has ended"))
        'rank 2 was lost in ring hop 3 of 7, layer 12, block 41, after 10.0 s: its process has ended'
    """

    def __init__(self, ranks: Iterable[int], op: str, layer: int, block: int, waited: float, reason: str):
        self.ranks = tuple(sorted(ranks))
        self.op, self.layer, self.block, self.waited, self.reason = op, layer, block, waited, reason
        super().__init__(self.ranks, op, layer, block, waited, reason)  # as pickle calls it again

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]} was" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))} were"
        layer, block = (f", {name} {i}" if i >= 0 else "" for name, i in (("layer", self.layer), ("block", self.block)))
        return f"{who} lost in {self.op}{layer}{block}, after {self.waited:.1f} s: {self.reason}"


class Loss(NamedTuple):
    ranks: tuple[int, ...]
    reason: str


class Status(NamedTuple):
    """What a rank says of itself with each heartbeat, as JSON in the store.

    Args:
        beat: counts the heartbeats.
        host, pid, started: where its process is to be looked for; see `_host` and `_process`.
        waits: ranks that it waits for now.
        left: 1: it has closed its transport; 2: and has seen that all have.
        lost, reason: the first `Loss` that it knows of; itself, if an exception ended it.
    """

    beat: int
    host: str
    pid: int
    started: str
    waits: tuple[int, ...] = ()
    left: int = 0
    lost: tuple[int, ...] = ()
    reason: str = ""


class FailureDetector:
    """One rank's heartbeat, and what it knows of the others.

    Args:
        store: any of torch.distributed's, the same for all ranks, who make their detectors over it in the same order.
        deadline: seconds to wait for all ranks, here and in `close`.
        on_loss: called once, by the detector's thread, when a rank is known to be lost: ends waits that are under way.
        late: peers of messages that the host does not wait for, whose deadline has passed.

    Attributes:
        loss: the first that is known for certain.
        waits: ranks that this one waits for, to be set by who waits: others look for the end of a chain.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        deadline: float,
        on_loss: Callable[[], None] = lambda: None,
        late: Callable[[], Sequence[int]] = tuple,
    ):
        self.rank, self.size, self.deadline = rank, size, deadline
        self.loss: Loss | None = None
        self.waits: tuple[int, ...] = ()
        self._on_loss, self._late = on_loss, late
        # A connection of its own: a get of somebody else's would hold it up. torch's stub leaves out most of a store.
        self._store: Any = store.clone()  # type: ignore[attr-defined]  # None: it is gone
        turn = self._store.add(f"inferix/watches/{rank}", 1)
        self._keys = [f"inferix/watch/{turn}/{r}" for r in range(size)]
        self._changed = threading.Condition()  # guards what is below
        self._mine = Status(0, _host(), os.getpid(), _process(os.getpid()).started)
        self._written = 0  # the last beat of ours that is in the store
        self._answered = time.monotonic()  # when the store last did
        self._urgent = False  # a status that can not wait for the next beat
        self._closed = False
        self._statuses: list[Status] = []
        self._missed = [0] * size
        self._thread = threading.Thread(target=self._live, name=f"heartbeat of rank {rank}", daemon=True)

    def start(self) -> None:
        """Wait for all ranks, and begin.

        Raises:
            PeerLost: a rank did not come.
        """
        self._store.set(self._keys[self.rank], json.dumps(self._mine))
        try:
            self._store.wait(self._keys, timedelta(seconds=self.deadline))
        except RuntimeError as error:
            absent = [r for r, key in enumerate(self._keys) if not self._store.check([key])]
            raise PeerLost(absent, "the group's beginning", -1, -1, self.deadline, "it has not come") from error
        self._statuses, self._answered = self._read(), time.monotonic()
        self._thread.start()

    def lost(self, where: Where, peers: Sequence[int], began: float, broken: bool) -> PeerLost:
        """Who it was that a wait has failed for. The other ranks are told.

        Args:
            peers: whose messages did not come.
            began: when the wait did, of the monotonic clock.
            broken: a connection failed; else the deadline has passed.
        """
        with self._changed:
            if broken:
                self._changed.wait_for(lambda: self.loss or self._stopped(range(self.size)), PATIENCE)
                found = self.loss or self._stopped(range(self.size)) or Loss(tuple(peers), "its connection is closed")
            else:
                found = self.loss or self._blamed(peers)
        self.tell(found)
        return PeerLost(found.ranks, *where, time.monotonic() - began, found.reason)

    def tell(self, loss: Loss) -> None:
        """The others, unless they have been told of another one; returns when it is in the store, or can't be."""
        with self._changed:
            self.loss = self.loss or loss
            if not self._mine.lost:
                self._mine = self._mine._replace(lost=loss.ranks, reason=loss.reason)
                self._say()

    def close(self, orderly: bool) -> None:
        """The heartbeat ends.

        Args:
            orderly: wait until all ranks have closed theirs: none ends while another still reads from it.

        Raises:
            PeerLost: a rank was lost before all had closed theirs in order.
        """
        began = time.monotonic()
        others = [r for r in range(self.size) if r != self.rank]
        with self._changed:
            if orderly:
                self._leave(1, lambda: all(self._statuses[r].left for r in others), self.deadline)
            # Rank 0, in whose process the store may be, is the last to go.
            last = self.rank == 0
            self._leave(2, lambda: not last or all(self._parted(r) for r in others), PATIENCE)
            self._closed = True
            self._say()
        self._thread.join(PATIENCE)
        if orderly and self.loss is not None:
            raise PeerLost(self.loss.ranks, *Where("the group's end"), time.monotonic() - began, self.loss.reason)

    def _leave(self, stage: int, others_have: Callable[[], bool], patience: float) -> None:
        self._mine = self._mine._replace(left=stage)
        self._say()
        self._changed.wait_for(lambda: others_have() or (stage == 1 and self.loss) or not self._hears(), patience)

    def _parted(self, rank: int) -> bool:
        """Whether a rank has no more need of the store."""
        status = self._statuses[rank]
        return status.left == 2 or bool(status.lost) or (self.loss is not None and rank in self.loss.ranks)

    def _hears(self) -> bool:
        """Whether the store answers: it can be in a process that is lost."""
        silent = time.monotonic() - self._answered > MISSED * BEAT
        return self._store is not None and self._thread.is_alive() and not silent

    def _say(self) -> None:
        """Wait until what `_mine` is now has been written. `_changed` is held."""
        beat = self._mine.beat + 1
        self._urgent = True
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._written >= beat or not self._hears(), PATIENCE)

    def _live(self) -> None:
        try:
            while self._beat():
                pass
        except Exception as error:  # who waits shall know why
            self.loss = self.loss or Loss((self.rank,), f"its heartbeat failed: {type(error).__name__}: {error}")
            raise
        finally:
            with self._changed:
                self._changed.notify_all()

    def _beat(self) -> bool:
        """Whether there will be another one."""
        with self._changed:
            mine = self._mine = self._mine._replace(beat=self._mine.beat + 1, waits=self.waits)
            closed, self._urgent = self._closed, False
        gone = self._gone()  # before statuses are read: a process leaves its last status before it ends
        statuses = self._exchange(mine)
        late = self._late()
        with self._changed:
            if statuses is not None:
                for r, (status, before) in enumerate(zip(statuses, self._statuses, strict=True)):
                    self._missed[r] = 0 if status.beat != before.beat else self._missed[r] + (not mine.left)
                self._statuses, self._written, self._answered = statuses, mine.beat, time.monotonic()
            known, self.loss = self.loss, self.loss or self._told() or self._ended(gone)
            if self.loss is None and late:
                self.loss = self._blamed(late)
            if self.loss is not None and not self._mine.lost:  # the others shall know that it is known here
                self._mine, self._urgent = self._mine._replace(lost=self.loss.ranks, reason=self.loss.reason), True
            found = self.loss is not None and known is None
            self._changed.notify_all()
        if found:
            self._on_loss()
        if closed or (mine.lost and self.rank != 0):  # nothing more to say; rank 0 sees the others go
            return False
        with self._changed:
            self._changed.wait_for(lambda: self._urgent, BEAT / 10 if mine.left else BEAT)  # who leaves looks around
        return True

    def _exchange(self, mine: Status) -> list[Status] | None:
        """This rank's status for everybody's; None without a store."""
        if self._store is None:
            return None
        try:
            self._store.set(self._keys[self.rank], json.dumps(mine))
            return self._read()
        except RuntimeError:  # it is gone with the process that it was in
            self._store = None
            return None

    def _read(self) -> list[Status]:
        store, keys = self._store, self._keys
        found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
        return [Status._make(tuple(x) if isinstance(x, list) else x for x in json.loads(text)) for text in found]

    def _told(self) -> Loss | None:
        return next((Loss(status.lost, status.reason) for status in self._statuses if status.lost), None)

    def _gone(self) -> list[int]:
        """Ranks on this machine whose process is no more."""
        return [r for r, status in self._here() if not _process(status.pid).runs(status.started)]

    def _here(self) -> list[tuple[int, Status]]:
        host = self._mine.host
        return [(r, status) for r, status in enumerate(self._statuses) if host and status.host == host]

    def _ended(self, gone: Sequence[int]) -> Loss | None:
        ended = tuple(r for r in gone if not self._statuses[r].left)
        return Loss(ended, "its process has ended") if ended else None

    def _stopped(self, ranks: Iterable[int]) -> Loss | None:
        """Those whose heartbeats are missing, as far as the store tells."""
        stopped = tuple(r for r in ranks if self._missed[r] >= MISSED and not self._statuses[r].left)
        return Loss(stopped, f"no heartbeat for {MISSED * BEAT:.0f} s or more") if stopped else None

    def _blamed(self, peers: Sequence[int]) -> Loss:
        """Of a wait that met its deadline: the end of the chain of who waits for whom."""
        seen: set[int] = set()
        todo = list(peers)
        while todo:
            if (r := todo.pop()) not in seen and r != self.rank:
                seen.add(r)
                todo += self._statuses[r].waits
        if not self._hears():
            halted = tuple(r for r, status in self._here() if _process(status.pid).state in ("T", "t"))
            unknown = Loss(tuple(peers), "it has not posted its side, and the group's store does not answer")
            return Loss(halted, "its process is stopped") if halted else unknown
        if stopped := self._stopped(seen):
            return stopped
        if left := tuple(r for r in seen if self._statuses[r].left):
            return Loss(left, "it has left the group")
        if idle := tuple(r for r in seen if not self._statuses[r].waits):
            return Loss(idle, "its process lives, but it has not posted its side")
        return Loss(tuple(seen), "they wait for each other: what they posted differs, or is still under way")


class _Process(NamedTuple):
    """Args:
    state: "Z", "X": it has ended; "T", "t": it is stopped; "": there is none.
    started: when, in clock ticks since the machine was: another process may have the same id later.
    """

    state: str
    started: str

    def runs(self, started: str) -> bool:
        return self.state not in ("", "Z", "X") and self.started == started


def _process(pid: int) -> _Process:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _Process("", "")
    return _Process(fields[0], fields[19])  # proc(5) counts them from 1, with two before the bracket


def _host() -> str:
    """Of processes that see each other in /proc; "": there is no /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""
