"""Bugs put into schedules: each is caught, by a transport that is as late as it may be, or by what ranks compare."""

import collections
import dataclasses
import threading
from functools import partial

import pytest
import torch

from inferix_kernels import Policy, compiled
from inferix_kernels.distributed import Gather, arriving, run_ranks, shard_for
from inferix_kernels.distributed.exchange import NOTHING
from inferix_kernels.distributed.gather import _ArrivingGather, _Gather
from inferix_kernels.distributed.ring import _ArrivingRing, _Ring
from inferix_kernels.reference import attention as reference
from tests.distributed.lazy import lazy
from tests.distributed.matrix import alone
from tests.distributed.worlds import Story, store_of, tell, whole

STORY = Story(layers=2, blocks=2)


@dataclasses.dataclass(frozen=True)
class Planted:
    transport: object
    kind: type

    def bind(self, reads):
        return self.kind(reads, self.transport)


class MissingWait(_Gather):
    def _send_keys(self):
        super()._send_keys()
        return NOTHING


class EarlyScribble(_Gather):
    def _send_keys(self):
        ticket = super()._send_keys()
        self._staged.zero_()  # as if the next layer were written already
        return ticket


class SingleBuffer(_Ring):
    def __init__(self, *args):
        super().__init__(*args)
        self._buffers[1] = self._buffers[0]


class WrongOwner(_Ring):
    def __init__(self, *args):
        super().__init__(*args)
        self.visits = self.visits[1:] + self.visits[:1]


class EarlyCounter(_ArrivingGather):
    """Its pages are not whole yet."""

    def _attend_past(self, layer, asked):
        coming = self._taken()
        for counter in range(len(self._counters)):
            self._counters.raise_to(counter, 1)
        super()._attend_past(layer, asked)
        arriving.deliver(coming, self._counters)


ASKED = collections.defaultdict(threading.Event)  # by the address of counters, and counter


class Asking:
    """Each delivery comes when attention finds that it is not there, or when attention is done: no sooner."""

    def _bring(self, layer, q):
        for key in self.keys():
            ASKED[key].set() if q is None else ASKED[key].clear()
        super()._bring(layer, q)

    def keys(self):
        return [(self._counters.values.data_ptr(), counter) for counter in range(len(self._counters))]

    def _taken(self):
        def late(counter, bring):
            if counter != arriving.NONE:
                ASKED[self.keys()[counter]].wait()
            bring()

        return [arriving.Delivery(counter, partial(late, counter, bring)) for counter, bring in super()._taken()]

    def attend(self, *args):
        super().attend(*args)
        for key in self.keys():
            ASKED[key].set()


class AskingGather(Asking, _ArrivingGather):
    pass


class WrongCounter(AskingGather):
    """Pages of the second delivery wait for the first one."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.plan is not None:
            self.plan.arrivals[:, 0].clamp_(max=0)


def error(schedule, kind, size=3, story=STORY, **options):
    """The largest error of any number; infinite, if one is NaN."""

    def rank(transport):
        shard = shard_for(schedule, transport.rank, size, story.heads)
        return tell(story, store_of(story, shard, **options), Planted(transport, kind)).outs

    told = whole(story, run_ranks(lazy(size), rank))
    pairs = [(a, b) for a, b in zip(told, alone(story).outs) if a is not None]
    return max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    monkeypatch.setattr(compiled, "ISA", min(compiled.ISA, compiled.Isa.avx2))


@pytest.fixture
def asking(monkeypatch):
    """The reference, which asks by this function."""
    has_arrived = reference.has_arrived

    def ask(plan, arrival):
        if not (there := has_arrived(plan, arrival)):
            ASKED[plan.counters.data_ptr(), arrival[0]].set()
        return there

    monkeypatch.setattr(reference, "has_arrived", ask)


RIGHT = [("gather", _Gather), ("ring", _Ring), ("gather", _ArrivingGather), ("ring", _ArrivingRing)]


@pytest.mark.parametrize("schedule, right", RIGHT)
def test_without_a_bug_there_is_no_error(schedule, right):
    assert error(schedule, right) <= 2e-5


@pytest.mark.parametrize(
    "schedule, kind",
    [
        ("gather", MissingWait),
        ("gather", EarlyScribble),
        ("ring", SingleBuffer),
        ("ring", WrongOwner),
        ("gather", EarlyCounter),
    ],
)
def test_a_bug_is_caught(schedule, kind):
    try:
        found = error(schedule, kind)
    except ValueError:  # a message of another size than its receiver expects
        return
    assert found > 1e-2


def test_pages_that_wait_for_another_delivery_are_caught(asking):
    assert error("gather", AskingGather, story=STORY._replace(layers=1), backend="reference") <= 2e-5
    assert error("gather", WrongCounter, story=STORY._replace(layers=1), backend="reference") == torch.inf


def test_a_stale_plan_is_caught():
    """A rank goes on with what it planned before a rewind."""

    def rank(transport):
        store = store_of(STORY, shard_for("gather", transport.rank, 3, STORY.heads))
        told = tell(STORY, store, Gather(transport))
        block = told.table.open_block(2)
        stale = told.table.plan([block], attention=Gather(transport))
        told.table.abandon()
        told.table.rewind(2)
        passed = stale
        if transport.rank != 1:
            passed = told.table.plan([told.table.open_block(2)], attention=Gather(transport))
        qkv = torch.zeros(42, 3 * 4 * 16)
        passed._edits = []  # the rank that has the bug does not look
        passed.attend(0, store.shard.own(qkv, 21), None, None)

    with pytest.raises(ValueError, match=r"^see must be the same on all ranks, got .* on rank 1 and .* on rank 0$"):
        run_ranks(lazy(3), rank)


def test_a_policy_that_one_rank_has_is_caught():
    def rank(transport):
        store = store_of(STORY, shard_for("gather", transport.rank, 2, STORY.heads))
        table = store.open(Policy(window=4))
        block = table.open_block(2)
        clean = table.plan([block], commit=block if transport.rank else None, attention=Gather(transport))
        clean.attend(0, store.shard.own(torch.zeros(42, 192), 21), None, None)

    with pytest.raises(ValueError, match=r"commit must be the same on all ranks, got .*scratch 0 to fp32 0"):
        run_ranks(lazy(2), rank)
