"""The KV store against a model of it that cannot be wrong: one list of tensors per world.

`Play` makes random steps on worlds of one small store: blocks with several open at once, forks, rewinds, conversions,
moves to host memory and back, saves, loads, worlds that are released or only dropped. Copies arrive late, as on a GPU;
operations are made to fail. After each step every world must hold what the model says, before or after the step, every
frame and every plan must read so, and every slot must have an owner; all others are filled with NaN, so that whoever
reads one is found out.
"""

import dataclasses
import gc
import itertools
import tempfile
from pathlib import Path

import torch
from injected import SEAMS, Injected, at_call, at_instruction

from inferix_kernels import KVPages, KVStore, NotResident, OutOfPages, PageList, Policy
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.reference import kv_append, kv_gather
from inferix_kernels.snapshot import load, save
from inferix_kernels.testing import POISON

LAYERS, HEADS, HEAD_DIM, TOKENS, PAGE = 2, 1, 4, 11, 8  # two pages per frame, the second holds three tokens


class LateStore(KVStore):
    """Copies between the device and host memory happen when they are waited for, as late as a GPU may have them."""

    late: list

    def _transfer(self, pairs, to_host):
        self.late = [*getattr(self, "late", []), (list(pairs), to_host)]

    def _wait(self):
        for pairs, to_host in getattr(self, "late", []):
            TRANSFER(self, pairs, to_host)
        self.late = []  # only now: waiting may be interrupted, and is done again


TRANSFER = KVStore._transfer  # what is under way by then can't be made to fail
STORE_SEAMS = [(LateStore if owner is KVStore else owner, name) for owner, name in SEAMS]


def through(format, k, v):
    """k, v [tokens, heads, D] as a page of this format gives them back."""
    pages, where = KVPages.empty(format, 2, HEADS, PAGE, HEAD_DIM), PageList.of([0, 1], [PAGE, TOKENS - PAGE])
    kv_append(k, v, pages, where)
    return kv_gather([pages], where, out=(torch.empty_like(k), torch.empty_like(v)))


@dataclasses.dataclass(frozen=True)
class Open:
    """An open block: what its clean pass is given, in each layer, and how far that has come."""

    frames: range
    inputs: list
    planned: bool = False
    done: bool = False


@dataclasses.dataclass
class World:
    """What a page table should hold. frames: frame -> (format, [(k, v) of each layer])."""

    policy: Policy
    frames: dict = dataclasses.field(default_factory=dict)
    cold: set = dataclasses.field(default_factory=set)
    pinned: set = dataclasses.field(default_factory=set)
    next_frame: int = 0
    means: list | None = None
    blocks: list = dataclasses.field(default_factory=list)

    def copy(self):
        return dataclasses.replace(
            self, frames=dict(self.frames), cold=set(self.cold), pinned=set(self.pinned), blocks=list(self.blocks)
        )

    def fork(self):
        return dataclasses.replace(self.copy(), blocks=[])

    def forget(self, frames):
        for frame in list(frames):
            del self.frames[frame]
        self.cold, self.pinned = (group.difference(frames) for group in (self.cold, self.pinned))
        return self

    def evict(self, end):
        leaving = [f for f in self.frames if f not in self.pinned and not self.policy.keeps(f, end)]
        if self.policy.archive:
            self.cold.update(leaving)
            return self
        return self.forget(leaving)

    def turn(self, end):
        self.evict(end)
        if older := self.policy.older:
            for frame, (format, layers) in self.frames.items():
                old = format == self.policy.format and self.policy.format_of(frame, end) == older[1]
                if old and frame not in self.cold:
                    self.frames[frame] = older[1], [through(older[1], *kv) for kv in layers]
        return self

    def seal(self):
        opened = self.blocks.pop(0)
        for i, frame in enumerate(opened.frames):
            part, format = slice(i * TOKENS, (i + 1) * TOKENS), self.policy.format_of(frame, opened.frames.stop)
            layers = [(k - mean, v) for (k, v), mean in zip(opened.inputs, self.means or itertools.repeat(0))]
            self.frames[frame] = format, [through(format, k[part], v[part]) for k, v in layers]
        self.next_frame = opened.frames.stop
        return self

    def rewind(self, end):
        self.forget([frame for frame in self.frames if frame >= end])
        self.next_frame, self.means = end, self.means if end else None
        return self

    def convert(self, frames, format):
        for frame in frames:
            was, layers = self.frames[frame]
            if was != format:
                self.frames[frame] = format, [through(format, *kv) for kv in layers]
                self.cold.discard(frame)
        return self


def policies(format, older):
    return (
        Policy(window=None, format=format),
        Policy(window=3, sink=1, format=format),
        Policy(window=4, undo=2, format=format),
        Policy(window=5, sink=1, sink_format=older, older=(2, older), format=format),
        Policy(window=4, older=(2, older), format=format),
        Policy(window=2, archive=True, format=format),
        Policy(window=2, format=older),
        Policy(window=3, sink=1, format=format, on_evict=follow),
    )


def mix(layer, k, v):
    return layer - k, v / -2  # neither grows, however often


def follow(table, frame):
    """A sink that follows what leaves, as far as it can be read and there is room."""
    if 0 in table.held and 0 not in table.cold:
        table.rewrite(0, mix, sink=True)


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
                self.settle,
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

    def settle(self):
        entry = self.pick()
        self.attempt(entry, self.store.settle, entry[1])

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
            if made._edits != table.state.edits:
                self.plans.remove((table, made, where, want))
            elif want:
                self.counts["plans read"] += 1
                k, _ = self.store.gather(self.store.layers[0], where, torch.float32)
                assert torch.equal(k, torch.cat([layers[0][0] for layers in want])), "a plan reads something else"
        self.check_owners()

    def check_owners(self):
        """Every slot that is taken has an owner, and no two slots are one."""
        owners = list(self.store._moving)
        for table, _ in self.worlds:
            owners += table.state.all_slots()
            owners += [extent.host for extent in table.held.values() if extent.host is not None]
        for pool in (*self.store.pools.values(), *self.store.host.values()):
            taken = {id(slot): slot for holder in pool._holders if (slot := holder()) is not None}
            ours = {id(slot): slot for slot in owners if slot.pool is pool}
            assert taken.keys() == ours.keys(), f"{pool.format} slots leaked"
            for slot in pool.free:
                for layer in range(LAYERS):
                    for tensor in pool.slot(layer, slot):
                        if tensor is not None:
                            tensor.view(torch.uint8).fill_(POISON)  # NaN in every float format

    def end(self):
        """All worlds go, some of them only dropped: the store must be empty."""
        while self.worlds:
            self.release()
        self.plans.clear()
        self.store.settle()
        gc.collect()
        for pools, sizes in ((self.store.pools, self.sizes), (self.store.host, self.host_sizes)):
            for format, pool in pools.items():
                assert len(pool.free) == sizes[format], f"{format} pages leaked"
        assert self.store.turn.acquire(blocking=False), "the store's lock was left locked"
        self.store.turn.release()
        self.folder.cleanup()


PAIRS = list(zip(KV_FORMATS, (*KV_FORMATS[1:], KV_FORMATS[0])))
