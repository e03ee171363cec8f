"""A step of a block asks nothing of the host but launches: no tensor is made, none moved, none read back."""

import contextlib
from collections import defaultdict

import numpy as np
import pytest
import torch

from benchmarks.host import OnTheDevice, tensors_in
from inferix import World
from inferix.decode.timesteps import Timesteps
from inferix_kernels import KVPages, ops
from tests.decode.recording_backend import installed, listening
from tests.decode.test_loop import small_world
from tests.models.test_wan_world import wan
from tests.models.wan_golden import random_network, tiny_config


@pytest.fixture(params=["tiny", "wan"])
def world(request):
    with installed() as backend:
        if request.param == "tiny":
            yield small_world(kv="int8", window=6, sink=1, steps=3, backend=backend)
        else:
            two_steps = {"times": (1.0, 0.5), "timesteps": (1000.0, 500.0)}
            yield World(wan(window=6, **two_steps), kv="int8", backend=backend)


def conditioning(world):
    actions = ["up"] * 3 if world.model.adapter.actions else []
    return world.model.conditioning("desert day" if actions else "fog", actions)


def step(world):
    return world.decoder.step(conditioning(world))


def watched(world, mode):
    """Every forward of the world's network that predicts something, under this mode."""
    predict = world.model.predict

    def under(inputs, attend):
        with mode if any(block.predict for block in inputs) else contextlib.nullcontext():
            return predict(inputs, attend)

    world.model.predict = under


def test_a_step_makes_no_tensor_and_moves_none(world):
    """From the first block of a world that was warmed up on."""
    world.decoder.warm_up(conditioning(world))
    watched(world, OnTheDevice(pytest.fail))
    for _ in range(6):
        step(world)


def test_the_watch_sees_what_it_is_for():
    x = torch.ones(2)
    for wrong in (
        lambda: torch.zeros(3),
        lambda: torch.tensor([1.0]),
        lambda: torch.empty_like(x),
        lambda: x.new_empty(3),
        lambda: float(x[0]),
        lambda: x.to("meta"),
        lambda: bool(x.isfinite().all()),
    ):
        with pytest.raises(pytest.fail.Exception), OnTheDevice(pytest.fail):
            wrong()
    with OnTheDevice(pytest.fail):
        assert (x.double() + x.sum()).tolist is not None


def test_a_network_on_a_device_takes_nothing_from_the_host():
    """On the meta device as on a GPU: an operation that mixed it with the host's memory would fail."""
    x = torch.zeros(3, *wan().latent_shape, device="meta")
    meta = random_network(tiny_config()).to("meta")
    given = [x, x], torch.zeros(6, dtype=torch.float64, device="meta")
    cross = meta.cross_cache(torch.zeros(5, meta.config.text_dim, device="meta"))
    other = meta.cross_cache(torch.zeros(5, meta.config.text_dim, device="meta"))

    def attend(layer, qkv, norm_q, norm_k, eps):
        return qkv[:, : qkv.shape[1] // 3]

    for crosses in ([cross, cross], [cross, other]):
        meta(*given, crosses, attend)  # what is sent once is there now
        with OnTheDevice(pytest.fail):
            flow = meta(*given, crosses, attend)
        assert flow.device.type == "meta" and flow.shape == x.shape


def count(calls, op):
    return sum(each == op for each, *_ in calls)


def named(op, args, kwargs):
    """Address and shape of each tensor of a call, by the name of its argument."""
    names = [p for p in getattr(ops, op).__annotations__ if p not in ("return", "backend")]
    found = {}
    for name, value in {**dict(zip(names, args)), **kwargs}.items():
        for i, x in enumerate(tensors_in([pool[1:] for pool in pools(value)] or value)):
            found[f"{op}.{name}.{i}"] = x.data_ptr(), tuple(x.shape), x.stride()
    return found


def pools(value):
    if isinstance(value, KVPages):
        return [value]
    return [pool for pool in value if isinstance(pool, KVPages)] if isinstance(value, list) else []


def test_every_argument_of_a_kernel_stays_where_it_is(world):
    """Block by block and step by step, for each number of segments, once the window is full; but for what stands
    between a network's layers, which comes from torch's allocator and goes back to it."""
    for _ in range(4):
        step(world)
    seen, forwards = defaultdict(set), []

    def listen(op, function, args, kwargs):
        if op == "add_norm":
            return
        if op == "qkv_prologue" and (not forwards or count(forwards[-1], op) == world.model.layers):
            forwards.append([])
        forwards[-1].append((op, args, kwargs))

    with listening(listen):
        for _ in range(2):
            step(world)
    assert len(forwards) == 2 * len(world.model.adapter.times)
    for forward in forwards:
        segments = {len(args[2].q_indptr) - 1 for op, args, _ in forward if op == "paged_attention"}
        order = defaultdict(int)
        for op, args, kwargs in forward:
            order[op] += 1
            for name, place in named(op, args, kwargs).items():
                if not name.startswith("qkv_prologue.qkv"):
                    seen[tuple(segments), order[op], name].add(place)
    moved = {key: places for key, places in seen.items() if len(places) > 1}
    assert not moved
    assert {key[0] for key in seen} == {(1,), (2,)}
    starts = {name for *_, name in seen}
    assert {"paged_attention.plan.2", "qkv_prologue.rope.0", "qkv_prologue.k_mean.0", "kv_commit.target.0"} <= starts


def test_lists_begin_at_multiples_of_128_bytes(world):
    """Triton compiles a kernel anew where an address stops being a multiple of 16."""
    found = []
    with listening(lambda op, function, args, kwargs: found.append((op, args, kwargs))):
        for _ in range(4):
            step(world)
    for op, args, _ in found:
        if op == "paged_attention":
            plan = args[2]
            first = plan.page_ids.data_ptr()
            assert all((x.data_ptr() - first) % 128 == 0 for x in plan[:4])


def kinds_of(world, make):
    """Of all calls of kernels: op, shapes and dtypes but for the lengths of page lists, and segments."""
    kinds = set()

    def listen(op, function, args, kwargs):
        shapes = []
        for x in tensors_in(args, kwargs):
            lists = x.ndim == 1 and x.dtype == torch.int32
            shapes.append((x.dtype, "list" if lists else tuple(x.shape)))
        segments = len(args[2].q_indptr) - 1 if op == "paged_attention" else 0
        given = tuple(sorted(name for name, value in kwargs.items() if value is not None))
        kinds.add((op, tuple(shapes), segments, given))

    with listening(listen):
        make()
    return kinds


def test_a_world_that_was_warmed_up_meets_no_kernel_of_another_kind(world):
    state = world.decoder.generator.get_state()
    warmed = kinds_of(world, lambda: world.decoder.warm_up(conditioning(world)))
    assert torch.equal(state, world.decoder.generator.get_state()) and not world.table.held and not world.frames
    assert all(len(pool.free) == pool.frames for pool in world.store.pools.values())

    def play():
        for i in range(5):
            step(world)
            if i == 3:
                world.decoder.commit_pending()

    assert kinds_of(world, play) <= warmed


def test_a_world_that_was_warmed_up_makes_the_same_frames():
    gone = []
    cold, warm = (small_world(kv="int8", window=6, on_evict=lambda table, frame: gone.append(frame)) for _ in range(2))
    warm.decoder.warm_up(warm.model.conditioning("meadow night", ["left"] * 3))
    assert not gone
    for _ in range(4):
        assert (cold.step(action="up", prompt="desert day") == warm.step(action="up", prompt="desert day")).all()


def test_a_world_is_warmed_up_before_it_is_given_frames(monkeypatch):
    """While its pools are empty."""
    world, order = small_world(kv="int8", window=6), []
    observe = world.decoder.observe
    monkeypatch.setattr(world.decoder, "observe", lambda *given: order.append("given") or observe(*given))
    monkeypatch.setattr(world, "_warm_up", lambda conditioning: order.append(f"warm at {world.frames}"))
    world.observe(np.zeros((6, 96, 96, 3), np.uint8), actions=["none"] * 6, prompt="desert day")
    assert order == ["warm at 0", "given", "given"]


def test_a_timestep_is_sent_once():
    model = wan()
    times = Timesteps(model)
    known = [t for t in model.adapter.timesteps]
    assert [float(times(t)) for t in known] == known and times(known[0]) is times(known[0])
    assert times(12.5).dtype == torch.float64 and times(12.5) is times(12.5)
