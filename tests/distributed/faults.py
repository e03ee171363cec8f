"""Faults put into gloo groups: does every wait end, and is the right rank named?

`python -m tests.distributed.faults --count 100`
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from inferix_kernels.distributed import Message, ProcessGroupTransport, Transport, faults
from tests.distributed.groups import ENDED, LIMIT, Group

BLOB = 20_000
STEPS = 40
LAST = STEPS - 5  # with a fault; who has sent and received all would end in another way
DEADLINE = 2.0  # seconds of each wait, where it is the deadline by which a fault is found
PATIENT = LIMIT / 2  # where it is not


class Case(NamedTuple):
    """A fault of one rank.

    Args:
        apart: the ranks can't see each other's processes, as on several machines.
        hosted: the store is in rank 0's process.
    """

    kind: str
    pattern: str
    size: int
    victim: int
    step: int
    apart: bool
    hosted: bool


def ring(transport: Transport, mine: torch.Tensor) -> None:
    after, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    transport.post([Message(after, mine)], [Message(before, torch.empty_like(mine))]).wait()


def gather(transport: Transport, mine: torch.Tensor) -> None:
    received = [torch.empty_like(mine) for _ in range(transport.size)]
    transport.all_gather(mine, received).wait()
    assert all((x == r).all() for r, x in enumerate(received)), "what was received is not what was sent"


def relay(transport: Transport, mine: torch.Tensor) -> None:
    """From the last rank to the first, one after another: most wait for who waits for another one."""
    if transport.rank + 1 < transport.size:
        transport.post([], [Message(transport.rank + 1, torch.empty_like(mine))]).wait()
    if transport.rank:
        transport.post([Message(transport.rank - 1, mine)], []).wait()


PATTERNS: dict[str, Callable[[Transport, torch.Tensor], None]] = {"ring": ring, "gather": gather, "relay": relay}


def compare(transport: Transport, plan: str) -> None:
    """As before the first message of a block: all ranks have the same plan, or each says which has another."""
    mine = torch.frombuffer(bytearray(hashlib.sha256(plan.encode()).digest()), dtype=torch.uint8)
    theirs = [torch.empty_like(mine) for _ in range(transport.size)]
    transport.all_gather(mine, theirs).wait()
    texts = [bytes(x.numpy()) for x in theirs]
    usual = max(texts, key=texts.count)
    if other := [r for r, text in enumerate(texts) if text != usual]:
        raise ValueError(f"plan must be the same on all ranks, got another one on rank {other[0]}")


def endless() -> None:
    while True:
        time.sleep(1)


def raised() -> None:
    raise KeyError("a planted fault")


PLANTED: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "pause": lambda: os.kill(os.getpid(), signal.SIGSTOP),  # and goes on before the deadline: no fault
    "stall": endless,
    "exception": raised,
    "mismatch": lambda: None,
}


class Outcome(NamedTuple):
    """How a rank ended: with what, naming whom, when (of the machine's monotonic clock)."""

    error: str
    ranks: tuple[int, ...]
    text: str
    when: float


def work(case: Case, rank: int, send: Callable[[Any], None]) -> None:
    if case.apart:
        faults._host = lambda: ""
    mine = torch.full((BLOB,), rank, dtype=torch.uint8)
    error, when = None, 0.0
    try:
        with ProcessGroupTransport(deadline=DEADLINE if case.kind in ("stop", "stall") else PATIENT) as transport:
            for step in range(STEPS):
                planted = rank == case.victim and step == case.step
                if planted:
                    send(time.monotonic())
                    PLANTED[case.kind]()
                transport.at(case.pattern, step, 7)
                try:
                    if step == case.step and case.kind == "mismatch":
                        compare(transport, f"{planted}")
                    PATTERNS[case.pattern](transport, mine)
                finally:
                    when = time.monotonic()
    except Exception as caught:
        error = caught
    send(Outcome(type(error).__name__, getattr(error, "ranks", ()), str(error), when))
    if isinstance(error, KeyError):  # the others' waits end though this process does not
        endless()


class Run:
    """A case under way."""

    def __init__(self, case: Case):
        self.case = case
        self.began = time.monotonic()
        self.planted = 0.0  # when; of the monotonic clock
        self.outcomes: dict[int, Outcome] = {}
        self.group = Group(case.size, lambda rank, send: work(case, rank, send), case.hosted)

    def poll(self) -> bool:
        """Whether it is over."""
        case = self.case
        for rank, said in self.group.receive(0.01):
            if isinstance(said, Outcome):
                self.outcomes[rank] = said
            elif said is not ENDED:
                self.planted = said
        if case.kind == "stop":
            goes_on = not self.others - self.outcomes.keys()  # when it has been given up
        else:
            short = 2 * faults.MISSED * faults.BEAT
            goes_on = case.kind == "pause" and bool(self.planted) and time.monotonic() > self.planted + short
        if goes_on and case.victim not in self.outcomes:
            os.kill(self.group.processes[case.victim].pid, signal.SIGCONT)
        return not self.hanging() or time.monotonic() > self.began + LIMIT

    @property
    def others(self) -> set[int]:
        return set(range(self.case.size)) - {self.case.victim}

    def hanging(self) -> set[int]:
        silent = {self.case.victim} if self.case.kind in ("kill", "stall") else set()
        return set(range(self.case.size)) - silent - self.outcomes.keys()

    def seconds(self) -> float:
        """From the fault to the last of the others that knew of it."""
        return max(self.outcomes[r].when for r in self.others & self.outcomes.keys()) - (self.planted or self.began)

    def wrong(self) -> list[str]:
        """What should have been otherwise."""
        case = self.case
        found = [f"rank {r} hangs" for r in sorted(self.hanging())]
        for rank, (error, ranks, text, _) in sorted(self.outcomes.items()):
            if case.kind == "pause":
                right = error == "NoneType"
            elif case.kind == "mismatch":
                # Some may learn of it from another rank first.
                right = f"another one on rank {case.victim}" in text
            elif rank == case.victim:  # which goes on after it was stopped, and given up
                right = error == ("PeerLost" if case.kind == "stop" else "KeyError")
            else:
                right = error == "PeerLost" and ranks == (case.victim,) and f"lost in {case.pattern}, layer " in text
                right = right and (case.kind != "exception" or "KeyError: 'a planted fault'" in text)
            if not right:
                found.append(f"rank {rank}: {error}: {text}")
        if self.others & self.outcomes.keys() and self.seconds() > PATIENT / 2:
            found.append("a wait ended by its deadline alone")
        return found


def draw(count: int, seed: int, kinds: Sequence[str]) -> list[Case]:
    """Kinds and patterns in turn, all else by chance."""
    chance, cases = random.Random(seed), []
    for i in range(count):
        size = chance.randint(2 + (kinds[i % len(kinds)] == "mismatch"), 4)  # of two, nobody knows which has it wrong
        victim, apart = chance.randrange(size), chance.random() < 0.5
        # Of a store that is lost with its machine, nobody could know more than that a connection was closed.
        hosted = not (apart and victim == 0) and chance.random() < 0.5
        pattern = list(PATTERNS)[i // len(kinds) % len(PATTERNS)]
        cases.append(Case(kinds[i % len(kinds)], pattern, size, victim, chance.randrange(1, LAST), apart, hosted))
    return cases


def run(cases: Sequence[Case], at_once: int) -> list[Run]:
    """Most of the time all that a case does is to wait: so several at once."""
    todo, open_, done = list(cases), [], []
    while todo or open_:
        while todo and len(open_) < at_once:
            open_.append(Run(todo.pop(0)))
        for one in [one for one in open_ if one.poll()]:
            one.group.close()
            open_.remove(one)
            done.append(one)
            for line in one.wrong():
                print(f"{one.case}: {line}", flush=True)
    return done


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=list(PLANTED), default=list(PLANTED))
    options = parser.parse_args(arguments)
    done = run(draw(options.count, options.seed, options.kinds), options.at_once)
    for kind in options.kinds:
        mine = [one for one in done if one.case.kind == kind]
        if mine:
            took = [one.seconds() for one in mine if one.outcomes]
            hang = sum(bool(one.hanging()) for one in mine)
            wrong = sum(bool(one.wrong()) for one in mine)
            print(
                f"{kind:10} {len(mine):4} faults, {hang} hangs, {wrong} wrong; from the fault to the last rank that"
                f" knows: median {statistics.median(took):.2f} s, at most {max(took):.2f} s"
            )
    return int(any(one.wrong() for one in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
