"""The KV store against a model of it that cannot be wrong: one list of tensors per world.

Hypothesis plays thousands of random blocks, forks, rewinds, conversions, moves to host memory and back, saves and
loads. After each of them every held frame must read as the model says, reference counts and free slots must add up,
and every free page is filled with NaN, so that whoever reads one is found out.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inferix_kernels import KVPages, KVStore, NotResident, OutOfPages, PageList, Policy
from inferix_kernels.reference import kv_append, kv_gather
from inferix_kernels.snapshot import load, save
from inferix_kernels.testing import POISON

LAYERS, HEADS, HEAD_DIM, TOKENS, PAGE = 2, 1, 4, 11, 8  # two pages per frame, the second holds three tokens
POOLS = {"int8": 7, "fp32": 4, "int4": 4}
HOST = {"int8": 5, "int4": 3}
POLICIES = (
    Policy(window=None),
    Policy(window=3, sink=1),
    Policy(window=4, undo=2),
    Policy(window=5, sink=1, sink_format="fp32", older=(2, "int4")),
    Policy(window=2, archive=True),
    Policy(window=2, format="fp32"),
)


def through(format, k, v):
    """k, v [tokens, heads, D] as a page of this format gives them back."""
    pages, where = KVPages.empty(format, 2, HEADS, PAGE, HEAD_DIM), PageList.of([0, 1], [PAGE, TOKENS - PAGE])
    kv_append(k, v, pages, where)
    return kv_gather([pages], where, out=(torch.empty_like(k), torch.empty_like(v)))


class World:
    """What a page table should hold: frame -> (format, [(k, v) of each layer])."""

    def __init__(self, policy):
        self.policy, self.frames, self.next_frame, self.pinned, self.means = policy, {}, 0, set(), None

    def copy(self):
        other = World(self.policy)
        other.__dict__ |= {"frames": dict(self.frames), "next_frame": self.next_frame}
        other.__dict__ |= {"pinned": set(self.pinned), "means": self.means}
        return other

    def turn_page(self, end):
        for frame in list(self.frames):
            if frame not in self.pinned and not self.policy.keeps(frame, end) and not self.policy.archive:
                del self.frames[frame]

    def age(self, end, cold):
        """Frames in the policy's format change with their age; a sink that was converted by hand stays as it is."""
        old = self.policy.older[1] if self.policy.older else None
        for frame, (format, layers) in self.frames.items():
            if frame not in cold and format == self.policy.format and self.policy.format_of(frame, end) == old:
                self.frames[frame] = old, [through(old, *kv) for kv in layers]


class StoreModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.store = KVStore(
            layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, frame_tokens=TOKENS, block_frames=2, pools=POOLS,
            host=HOST, page_size=PAGE, backend="reference",
        )  # fmt: skip
        self.worlds = []  # (page table, World)
        self.folder = tempfile.TemporaryDirectory()
        self.saved = None
        self.random = torch.Generator().manual_seed(0)

    def teardown(self):
        for table, _ in self.worlds:
            table.release()
        self.store.settle()
        for format, pool in self.store.pools.items():
            assert len(pool.free) == POOLS[format], f"{format} pages leaked"
        for format, pool in self.store.host.items():
            assert len(pool.free) == HOST[format], f"{format} pages leaked in host memory"
        self.folder.cleanup()

    def pick(self, data):
        return data.draw(st.sampled_from(self.worlds))

    def some_frames(self, data, world, most=3):
        return data.draw(st.lists(st.sampled_from(sorted(world.frames)), min_size=1, max_size=most, unique=True))

    @precondition(lambda self: len(self.worlds) < 4)
    @rule(policy=st.sampled_from(POLICIES))
    def open(self, policy):
        table = self.store.open(policy)
        self.worlds.append((table, World(table.policy)))

    @precondition(lambda self: self.worlds)
    @rule(data=st.data(), frames=st.integers(1, 2), seal=st.booleans())
    def block(self, data, frames, seal):
        table, world = self.pick(data)
        end = world.next_frame + frames
        try:
            block = table.open_block(frames)
        except OutOfPages:  # ageing, or the archive, found no room; what was let go before stays gone
            table.abandon()
            world.frames = {frame: kept for frame, kept in world.frames.items() if frame in table.held}
            assert all(frame in table.held for frame in world.frames)
            return
        world.turn_page(end)
        world.age(end, table.cold)
        assert list(block.frames) == list(range(world.next_frame, end))
        seen = [f for f in world.frames if f in world.pinned or world.policy.sees(f, end)]
        assert table.past(block) == seen
        try:
            passed = table.plan([block], commit=block)
        except (OutOfPages, NotResident):
            table.abandon()
            return
        layers, means = [], []
        for layer in range(LAYERS):
            k, v = (torch.randn(frames * TOKENS, HEADS, HEAD_DIM, generator=self.random) + layer for _ in range(2))
            passed.append(layer, k, v)
            means.append(k.mean(0) if world.means is None else world.means[layer])
            layers.append((k - means[layer], v))
        if not seal:
            table.abandon()
            return
        table.seal(block)
        world.next_frame, world.means = end, means
        for i, frame in enumerate(block.frames):
            part, format = slice(i * TOKENS, (i + 1) * TOKENS), world.policy.format_of(frame, end)
            world.frames[frame] = format, [through(format, k[part], v[part]) for k, v in layers]

    @precondition(lambda self: self.worlds and len(self.worlds) < 4)
    @rule(data=st.data())
    def fork(self, data):
        table, world = self.pick(data)
        self.worlds.append((table.fork(), world.copy()))

    @precondition(lambda self: self.worlds)
    @rule(data=st.data(), frames=st.integers(0, 3))
    def rewind(self, data, frames):
        table, world = self.pick(data)
        end = world.next_frame - frames
        wanted = {f for f in range(max(end, 0)) if world.policy.sees(f, end + 2)}
        if end < 0 or not wanted <= set(world.frames):
            with pytest.raises(ValueError, match=r"frames .* (to|have left)"):
                table.rewind(frames)
            return
        table.rewind(frames)
        world.frames = {frame: kept for frame, kept in world.frames.items() if frame < end}
        world.next_frame, world.pinned = end, {f for f in world.pinned if f < end}
        world.means = world.means if end else None

    @precondition(lambda self: any(world.frames for _, world in self.worlds))
    @rule(data=st.data(), format=st.sampled_from(sorted(POOLS)))
    def convert(self, data, format):
        table, world = data.draw(st.sampled_from([w for w in self.worlds if w[1].frames]))
        frames = self.some_frames(data, world)
        try:
            table.convert(frames, format, sink=True)
        except (OutOfPages, NotResident):
            return
        for frame in frames:
            was, layers = world.frames[frame]
            world.frames[frame] = format, layers if was == format else [through(format, *kv) for kv in layers]

    @precondition(lambda self: any(world.frames for _, world in self.worlds))
    @rule(data=st.data())
    def rewrite(self, data):
        table, world = data.draw(st.sampled_from([w for w in self.worlds if w[1].frames]))
        (frame,) = self.some_frames(data, world, most=1)
        try:
            table.rewrite(frame, lambda layer, k, v: (k + layer, 2 * v), sink=True)
        except (OutOfPages, NotResident):
            return
        format, layers = world.frames[frame]
        world.frames[frame] = format, [through(format, k + i, 2 * v) for i, (k, v) in enumerate(layers)]

    @precondition(lambda self: any(world.frames for _, world in self.worlds))
    @rule(data=st.data(), action=st.sampled_from(["offload", "prefetch", "pin", "unpin"]))
    def move(self, data, action):
        table, world = data.draw(st.sampled_from([w for w in self.worlds if w[1].frames]))
        frames = self.some_frames(data, world)
        try:
            getattr(table, action)(frames)
        except OutOfPages:
            return
        world.pinned = world.pinned | set(frames) if action == "pin" else world.pinned
        world.pinned = world.pinned - set(frames) if action == "unpin" else world.pinned

    @rule()
    def settle(self):
        self.store.settle()

    @precondition(lambda self: self.worlds)
    @rule(data=st.data())
    def save(self, data):
        table, world = self.pick(data)
        save(table, Path(self.folder.name) / "world.safetensors")
        self.saved = world.copy()

    @precondition(lambda self: self.saved is not None and len(self.worlds) < 4)
    @rule()
    def load(self):
        try:
            table = load(self.store, Path(self.folder.name) / "world.safetensors")
        except OutOfPages:
            return
        self.worlds.append((table, self.saved.copy()))

    @precondition(lambda self: self.worlds)
    @rule(data=st.data())
    def release(self, data):
        table, world = self.pick(data)
        self.worlds.remove((table, world))
        table.release()

    @invariant()
    def every_world_reads_what_its_model_holds(self):
        for table, world in self.worlds:
            assert list(table.held) == list(world.frames) and table.next_frame == world.next_frame
            assert table.pinned == world.pinned
            for frame, (format, layers) in world.frames.items():
                extent = table.held[frame]
                assert extent.format == format
                if not extent.resident:
                    assert frame in table.cold or extent.arriving
                    continue
                for layer, (k, v) in enumerate(layers):
                    got = table.gather(layer, [frame])
                    assert torch.equal(got[0], k) and torch.equal(got[1], v)

    @invariant()
    def counts_add_up_and_no_slot_has_two_owners(self):
        held = [(extent, frame in t.cold) for t, _ in self.worlds for frame, extent in t.held.items()]
        extents = {id(extent): extent for extent, _ in held}
        for extent in extents.values():
            assert extent.references == sum(other is extent for other, _ in held)
            assert extent.hot == sum(other is extent and not cold for other, cold in held)
        extents |= {id(extent): extent for extent in self.store._unsettled}
        for pools, attribute in ((self.store.pools, "slot"), (self.store.host, "host_slot")):
            for format, pool in pools.items():
                taken = [getattr(e, attribute) for e in extents.values() if e.format == format]
                taken = [slot for slot in taken if slot is not None]
                assert sorted(taken + pool.free) == list(range(pool.frames))

    @invariant()
    def free_pages_are_poisoned_before_the_next_step(self):
        for pools in (self.store.pools, self.store.host):
            for pool in pools.values():
                for slot in pool.free:
                    for layer in range(LAYERS):
                        for tensor in pool.slot(layer, slot):
                            if tensor is not None:
                                tensor.view(torch.uint8).fill_(POISON)  # NaN in every float format


StoreModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreModel = StoreModel.TestCase
