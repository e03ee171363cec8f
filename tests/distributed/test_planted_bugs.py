"""Bugs put into schedules: each is caught, by a transport that is as late as it may be, or by what ranks compare."""

import dataclasses

import pytest
import torch

from inferix_kernels import Policy, compiled
from inferix_kernels.distributed import Gather, run_ranks, shard_for
from inferix_kernels.distributed.exchange import NOTHING
from inferix_kernels.distributed.gather import _Gather
from inferix_kernels.distributed.ring import _Ring
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
        self._visits = self._visits[1:] + self._visits[:1]


def error(schedule, kind, size=3):
    """The largest error of any number; infinite, if one is NaN."""

    def rank(transport):
        shard = shard_for(schedule, transport.rank, size, STORY.heads)
        return tell(STORY, store_of(STORY, shard), Planted(transport, kind)).outs

    told = whole(STORY, run_ranks(lazy(size), rank))
    pairs = [(a, b) for a, b in zip(told, alone(STORY).outs) if a is not None]
    return max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    monkeypatch.setattr(compiled, "ISA", min(compiled.ISA, compiled.Isa.avx2))


@pytest.mark.parametrize("schedule, right", [("gather", _Gather), ("ring", _Ring)])
def test_without_a_bug_there_is_no_error(schedule, right):
    assert error(schedule, right) <= 2e-5


@pytest.mark.parametrize(
    "schedule, kind",
    [("gather", MissingWait), ("gather", EarlyScribble), ("ring", SingleBuffer), ("ring", WrongOwner)],
)
def test_a_bug_is_caught(schedule, kind):
    try:
        found = error(schedule, kind)
    except ValueError:  # a message of another size than its receiver expects
        return
    assert found > 1e-2


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
