"""Random steps on the KV store, held against the model of it in store_model.py.

`Play` makes steps on worlds of one small store: blocks with several open at once, forks, rewinds, conversions, moves to
host memory and back, saves, loads, worlds that are released or only dropped. Copies arrive late, as on a GPU;
operations are made to fail. After each step every world must hold what the model says, before or after the step, every
frame and every plan must read so, and every slot must have an owner; all others are filled with NaN, so that whoever
reads one is found out. Long because it has a step for every operation of the store.
"""

import dataclasses
import gc
import tempfile
from pathlib import Path

import torch

from inferix_kernels import NotResident, OutOfPages, PageList
from inferix_kernels.store.snapshot import load, save
from inferix_kernels.testing import POISON
from tests.store.injected import Injected, at_call, at_instruction
from tests.store.store_model import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    PAGE,
    STORE_SEAMS,
    TOKENS,
    LateStore,
    Open,
    World,
    mix,
    policies,
    through,
)


class Play:
    """Steps on worlds of one store.

    Args:
        choose: where choices come from: choice(sequence), sample(sequence, n), randint(a, b), as random.Random.
        formats: of most frames, and of those that grew old.
        failures: share of the operations that are made to fail, in percent.
        instructions: some of them as an interruption by a signal does.
    """

    def __init__(self, choose, formats=("int8", "int4"), failures=0, instructions=False):
        self.choose, self.formats, self.failures, self.instructions = choose, formats, failures, instructions
        format, older = formats
        self.sizes, self.host_sizes = {format: 8, older: 4}, {format: 5, older: 3}
        self.store = LateStore(
            layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, frame_tokens=TOKENS, block_frames=2, pools=self.sizes,
            host=self.host_sizes, page_size=PAGE, scratch_blocks=3, scratch_format="fp32", backend="reference",
        )  # fmt: skip
        self.quantized = self.store.freezes_mean
        self.worlds = []  # [page table, World], as lists: the model is replaced by each step
        self.plans = []  # (page table, its edits, page list, frames, what they must read in layer 0)
        self.folder = tempfile.TemporaryDirectory()
        self.saved = []  # (path, World)
        self.random = torch.Generator().manual_seed(choose.randint(0, 2**31))
        self.counts = dict.fromkeys(("steps", "done", "failures", "refused", "frames read", "plans read"), 0)

    # A step: an operation on a world, and what it makes of the model

    def step(self):
        self.counts["steps"] += 1
        todo = [self.open] if len(self.worlds) < 2 else []
        if self.worlds:
            todo += [self.block] * 16 + [self.open_block] * 4 + [self.plan] * 5 + [self.commit] * 5 + [self.seal] * 5
            todo += [self.convert] * 4 + [self.rewrite] * 2 + [self.offload] * 5 + [self.prefetch] * 5 + [self.pin] * 2
            todo += [
                self.abandon,
                self.rewind,
                self.unpin,
                self.forget,
                self.sync_copies,
                self.save,
                self.load,
                self.release,
            ]
            todo += [self.fork] * 2
        self.told = self.choose.choice(todo)
        self.told()
        self.check()

    def pick(self):
        return self.choose.choice(self.worlds)

    def some(self, entry, most=3):
        frames = sorted(entry[1].frames)
        return self.choose.sample(frames, self.choose.randint(1, min(most, len(frames)))) if frames else []

    def attempt(self, entry, real, after, between=None):
        """Make an operation, perhaps with a failure; the world is then its model before it or `after` it.

        Args:
            between: what the model may be besides, if the operation fails half way and says so.
        Returns:
            whether it was done, and its result.
        """
        table, before = entry
        try:
            with self.failing() as failure:
                result = real()
        except Injected:
            models = [before, after, *([between] if between is not None else [])]
            entry[1] = next((model for model in models if self.agrees(table, model)), None)
            assert entry[1] is not None, f"a failed {real.__qualname__} left something between before and after"
            return False, None
        except (OutOfPages, NotResident):
            self.counts["refused"] += 1
            assert self.agrees(table, before), "nothing was changed, says the error"
            return False, None
        finally:
            self.counts["failures"] += failure.fired
        entry[1] = after
        self.counts["done"] += 1
        assert self.agrees(table, after)
        return True, result

    def failing(self):
        if self.choose.randint(0, 99) >= self.failures:
            return at_call(0)
        if self.instructions and self.choose.randint(0, 1):
            return at_instruction(self.choose.randint(1, self.choose.choice([10, 50, 250])))
        return at_call(self.choose.randint(1, 4), STORE_SEAMS, late=bool(self.choose.randint(0, 1)))

    def agrees(self, table, world):
        """Does the page table hold what the model says, contents apart?"""
        formats = {frame: extent.format for frame, extent in table.held.items()}
        means = [mean for mean in table.k_means if mean is not None]
        return (
            list(formats.items()) == [(frame, format) for frame, (format, _) in world.frames.items()]
            and (table.next_frame, table.cold, table.pinned) == (world.next_frame, world.cold, world.pinned)
            and [block.frames for block in table.open_blocks] == [opened.frames for opened in world.blocks]
            and bool(table.state.target) == any(opened.planned for opened in world.blocks)
            and len(means) == len(world.means or [])
            and all(torch.equal(a, b) for a, b in zip(means, world.means or []))
            and self.reads(table, world)
        )

    def reads(self, table, world):
        """Does every frame that can be read read as the model says?"""
        frames = [frame for frame in world.frames if table.state.slot(frame) is not None]
        if any(f not in frames and f not in world.cold and not table.held[f].arriving for f in world.frames):
            return False
        if not frames:
            return True
        self.counts["frames read"] += len(frames)
        for layer in range(LAYERS):
            k, v = table.gather(layer, frames)
            want = [world.frames[frame][1][layer] for frame in frames]
            if not torch.equal(k, torch.cat([k for k, _ in want])) or not torch.equal(
                v, torch.cat([v for _, v in want])
            ):
                return False
        return True

    # Blocks

    def open(self):
        policy = self.choose.choice(policies(*self.formats))
        self.worlds.append([self.store.open(policy), World(policy)])

    def block(self):
        """A block from its beginning to its end, if nothing fails; of a world that has one open, the oldest."""
        entry = self.pick()
        if not entry[1].blocks:
            self.open_block(entry)
        self.commit(entry)
        if entry[1].blocks and entry[1].blocks[0].done:
            self.seal(entry)

    def open_block(self, entry=None):
        entry = entry or self.pick()
        table, world = entry
        frames, after = self.choose.randint(1, 2), world.copy()
        if len(world.blocks) == 3:
            try:
                table.open_block(frames)
            except RuntimeError:
                return
            raise AssertionError("scratch holds no more blocks")
        first = world.blocks[-1].frames.stop if world.blocks else world.next_frame
        evicted = None
        if not world.blocks:
            evicted, sinks = self.evicted(world, first + frames)
            after = sinks(after).turn(first + frames)
        scale, shape = self.choose.randint(1, 3), (frames * TOKENS, HEADS, HEAD_DIM)
        inputs = [
            tuple(torch.randn(shape, generator=self.random) * scale + layer for _ in range(2))
            for layer in range(LAYERS)
        ]
        after.blocks.append(Open(range(first, first + frames), inputs))
        self.attempt(entry, lambda: table.open_block(frames), after, evicted)
        if entry[1] is after:
            end, pinned = first + frames, after.pinned
            seen = [f for f in after.frames if f < first and (f in pinned or world.policy.sees(f, end))]
            assert table.past(table.open_blocks[-1]) == seen

    def evicted(self, world, end):
        """The model without what leaves the window there, and what the policy's on_evict makes of a model then."""
        evicted = world.copy().evict(end)
        leaving = [frame for frame in world.frames if frame not in evicted.frames]

        def sinks(model):
            for _ in leaving if world.policy.on_evict is not None else ():
                if 0 in model.frames and 0 not in model.cold:
                    format, layers = model.frames[0]
                    model.frames[0] = format, [through(format, *mix(i, *kv)) for i, kv in enumerate(layers)]
            return model

        return sinks(evicted), sinks

    def plan(self):
        """A noisy pass over the oldest open block; what it sees of the past is read for as long as it is good."""
        entry = self.pick()
        table, world = entry
        if not world.blocks:
            return
        block = table.open_blocks[0]
        done, made = self.attempt(entry, lambda: table.plan([block]), world)
        if done:
            past = table.past(block)
            where = PageList(*(x[: 2 * len(past)] for x in (made.plan.page_ids, made.plan.page_lens)))
            self.plans.append((table, made, where, [world.frames[frame][1] for frame in past]))

    def commit(self, entry=None):
        """The clean pass of the oldest open block."""
        entry = entry or self.pick()
        table, world = entry
        if not world.blocks:
            return
        opened, block, after = world.blocks[0], table.open_blocks[0], world.copy()
        after.blocks[0] = planned = dataclasses.replace(opened, planned=True)
        done, made = self.attempt(entry, lambda: table.plan([block], commit=block), after)
        if not done:
            return
        for layer, (k, v) in enumerate(opened.inputs):
            world, after = entry[1], entry[1].copy()
            if layer == LAYERS - 1:
                after.blocks[0] = dataclasses.replace(planned, done=True)
                if after.means is None and self.quantized:
                    after.means = [k.mean(0) for k, _ in opened.inputs]
            frozen = world.copy()  # the keys' means are there once all layers have written them
            frozen.means = after.means
            if not self.attempt(entry, lambda layer=layer, k=k, v=v: made.append(layer, k, v), after, frozen)[0]:
                if entry[1].blocks[0].done:  # it failed after everything, or nothing shows yet: another pass will do
                    entry[1].blocks[0] = planned
                return

    def seal(self, entry=None):
        ready = [entry for entry in self.worlds if entry[1].blocks and entry[1].blocks[0].done]
        if not ready:
            return
        entry = entry or self.choose.choice(ready)
        table, world = entry
        block, after, between = table.open_blocks[0], world.copy().seal(), None
        if after.blocks:
            end = after.blocks[0].frames.stop
            between, sinks = self.evicted(after, end)
            between.forget([frame for frame in block.frames if frame in between.frames])
            between.blocks, between.next_frame = list(world.blocks), world.next_frame
            after = sinks(after).turn(end)
        self.attempt(entry, lambda: table.seal(block), after, between)

    def abandon(self):
        entry = self.pick()
        table, world = entry
        after, keep = world.copy(), world.blocks[:1] if self.choose.randint(0, 1) else []
        after.blocks = list(keep)
        after.means = after.means if world.next_frame else None
        if keep and not after.means and self.quantized:  # what was committed without its mean is to be made again
            after.blocks = [dataclasses.replace(keep[0], done=False)]
        self.attempt(entry, lambda: table.abandon(table.open_blocks[: len(keep)]), after)

    # The past

    def fork(self):
        if len(self.worlds) < 4:
            entry = self.pick()
            done, table = self.attempt(entry, entry[0].fork, entry[1])
            if done:
                self.worlds.append([table, entry[1].fork()])

    def rewind(self):
        entry = self.pick()
        table, world = entry
        frames = self.choose.randint(0, 3)
        end = world.next_frame - frames
        wanted = {f for f in range(max(end, 0)) if world.policy.sees(f, end + 2)}
        if world.blocks or end < 0 or not wanted <= set(world.frames):
            try:
                table.rewind(frames)
            except (ValueError, RuntimeError) as error:
                assert ("sealed or abandoned" in str(error)) == bool(world.blocks)
                return
            raise AssertionError("rewind must refuse what is gone")
        self.attempt(entry, lambda: table.rewind(frames), world.copy().rewind(end))

    def forget(self):
        entry = self.pick()
        if frames := self.some(entry):
            self.attempt(entry, lambda: entry[0].forget(frames), entry[1].copy().forget(frames))

    def convert(self):
        entry = self.pick()
        frames, format = self.some(entry), self.choose.choice(self.formats)
        if frames:
            after = entry[1].copy().convert(frames, format)
            self.attempt(entry, lambda: entry[0].convert(frames, format, sink=True), after)

    def rewrite(self):
        entry = self.pick()
        if frames := self.some(entry, most=1):
            after = entry[1].copy()
            format, layers = after.frames[frames[0]]
            after.frames[frames[0]] = format, [through(format, *mix(i, *kv)) for i, kv in enumerate(layers)]
            after.cold.discard(frames[0])
            self.attempt(entry, lambda: entry[0].rewrite(frames[0], mix, sink=True), after)

    def offload(self):
        entry = self.pick()
        if frames := self.some(entry):
            after = entry[1].copy()
            after.cold.update(frames)
            self.attempt(entry, lambda: entry[0].offload(frames), after)

    def prefetch(self):
        entry = self.pick()
        if frames := self.some(entry):
            after = entry[1].copy()
            after.cold.difference_update(frames)
            self.attempt(entry, lambda: entry[0].prefetch(frames), after)

    def pin(self):
        entry = self.pick()
        if frames := self.some(entry):
            after = entry[1].copy()
            after.pinned.update(frames)
            self.attempt(entry, lambda: entry[0].pin(frames), after)

    def unpin(self):
        entry = self.pick()
        if frames := self.some(entry):
            after = entry[1].copy()
            after.pinned.difference_update(frames)
            self.attempt(entry, lambda: entry[0].unpin(frames), after)

    def sync_copies(self):
        entry = self.pick()
        self.attempt(entry, self.store.sync_copies, entry[1])

    def save(self):
        entry = self.pick()
        path = Path(self.folder.name) / f"{len(self.saved) % 3}.safetensors"
        self.saved = [(at, world) for at, world in self.saved if at != path]
        if self.attempt(entry, lambda: save(entry[0], path), entry[1])[0]:
            self.saved.append((path, entry[1].fork()))

    def load(self):
        if self.saved and len(self.worlds) < 4:
            path, world = self.choose.choice(self.saved)
            entry = self.pick()
            done, table = self.attempt(entry, lambda: load(self.store, path, world.policy), entry[1])
            if done:
                self.worlds.append([table, world.copy()])

    def release(self):
        entry = self.pick()
        self.worlds = [other for other in self.worlds if other is not entry]
        if self.choose.randint(0, 1):
            entry[0].release()
        self.plans = [plan for plan in self.plans if plan[0] is not entry[0]]

    # What must hold after each step

    def check(self):
        for table, world in self.worlds:
            assert self.agrees(table, world)
        for table, made, where, want in list(self.plans):
            if made.stale:
                self.plans.remove((table, made, where, want))
            elif want:
                self.counts["plans read"] += 1
                k, _ = self.store.gather(self.store.layers[0], where, torch.float32)
                assert torch.equal(k, torch.cat([layers[0][0] for layers in want])), "a plan reads something else"
        self.check_owners()

    def check_owners(self):
        """Every slot that is taken has an owner, and no two slots are one."""
        owners = list(self.store.copies.moving)
        for table, _ in self.worlds:
            owners += table.state.all_slots()
            extents = [*table.held.values(), *(extent for extent, _ in table.state.target)]
            owners += [extent.host for extent in extents if extent.host is not None]
        for pool in (*self.store.pools.values(), *self.store.host.values()):
            ours = {id(slot) for slot in owners if slot.pool is pool}
            assert self.taken(pool) == ours, f"{pool.format} slots leaked"
            for slot in pool.free:
                for layer in range(LAYERS):
                    for tensor in pool.slot(layer, slot).tensors.values():
                        tensor.view(torch.uint8).fill_(POISON)  # NaN in every float format

    @staticmethod
    def taken(pool):
        return {id(slot) for holder in pool._holders if (slot := holder()) is not None}

    def end(self):
        """All worlds go, some of them only dropped: the store must be empty."""
        while self.worlds:
            self.release()
        self.plans.clear()
        self.store.sync_copies()
        gc.collect()
        for pools, sizes in ((self.store.pools, self.sizes), (self.store.host, self.host_sizes)):
            for format, pool in pools.items():
                assert len(pool.free) == sizes[format], f"{format} pages leaked"
        assert self.store.turn.acquire(blocking=False), "the store's lock was left locked"
        self.store.turn.release()
        self.folder.cleanup()
