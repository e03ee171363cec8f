"""The worlds in their process, on a small network: fork, rewind, save and load."""

import dataclasses
import functools
import gc
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix import saved
from inferix.decode.contract import PictureStream
from inferix.finite import NotFinite, to_bytes
from inferix.models.tiny.simulator import PLACES, TIMES
from inferix.stream.worker import Order, Stage
from inferix.world import World
from tests.decode.test_loop import small_world
from tests.models.test_wan_world import wan
from tests.soak.soak_world import open_weighed, through_stage
from tests.stream.stream_client import asynchronous


def stage(**options):
    return Stage(lambda: small_world(window=6, worlds=2, **options))


def run(stage, actions="uldr", prompt=None):
    """Pictures of some blocks, by world."""
    names = {"u": "up", "d": "down", "l": "left", "r": "right", "n": "none"}
    made = [stage.step(dict.fromkeys(stage.worlds, Order(names[action], prompt)))["pictures"] for action in actions]
    return {name: np.concatenate([pictures[name] for pictures in made]) for name in stage.worlds}


def test_a_fork_goes_its_own_way_and_closing_keeps_the_other():
    one, two = stage(), stage()
    run(one, prompt="desert day"), run(two, prompt="desert day")
    one.fork()
    both = one.step({"a": Order("up"), "b": Order("left", "glacier night")})["pictures"]
    assert np.array_equal(both["a"], run(two, "u")["a"]) and not np.array_equal(both["a"], both["b"])
    with pytest.raises(ValueError, match="two worlds already"):
        one.fork()
    b = one.worlds["b"].world
    assert one.close("a")["made"] == {"a": 15} and one.worlds["a"].world is b
    one.fork()  # there is room again
    with pytest.raises(ValueError, match="must be one of two"):
        two.close("a")


def spoil(world):
    """From now on this world alone makes what is no number; its network, which its fork shares, is left as it is."""
    world.pictures.stream = PictureStream(lambda latents: to_bytes(latents + float("nan")))


@pytest.mark.parametrize("name, other", ["ab", "ba"])
def test_of_two_worlds_one_that_is_not_finite_ends_alone(name, other):
    one, two = stage(), stage()
    for each in (one, two):
        run(each, prompt="desert day")
        each.fork()
    gone = one.worlds[name].world
    spoil(gone)
    orders = {"a": Order("up", "glacier night"), "b": Order("left", "meadow day")}
    made, wanted = one.step(orders), two.step(orders)
    assert made["ended"].keys() == {name} and wanted["ended"] == {}
    assert made["ended"][name].endswith("are not finite, first in what the decoder of pictures gives")
    assert gone.released and list(one.worlds) == list(made["pictures"]) == ["a"] and made["made"] == {"a": 15}
    two.close(name)
    assert np.array_equal(made["pictures"]["a"], wanted["pictures"][other])
    assert np.array_equal(run(one, "udlr")["a"], run(two, "udlr")["a"])
    one.fork()  # there is room again
    one.reset(3), two.reset(3)
    assert np.array_equal(run(one, prompt="desert day")["a"], run(two, prompt="desert day")["a"])


@pytest.mark.parametrize("count", [1, 2])
def test_when_no_world_is_finite_a_reset_begins_anew(count, tmp_path):
    one, two = stage(), stage(seed=3)
    run(one, prompt="desert day")
    one.save("a", tmp_path / "saved")
    wanted = one.step({"a": Order("up")})["pictures"]["a"]
    if count == 2:
        one.fork()
    for again in ("load", "reset"):
        for running in one.worlds.values():
            spoil(running.world)
        with pytest.raises(NotFinite, match=r"the decoder of pictures gives$"):
            one.step(dict.fromkeys(one.worlds, Order("up")))
        one.commit_pending()  # as the process does after each step
        assert list(one.worlds) == ["a"]
        if again == "load":
            one.load(tmp_path / "saved")
            assert np.array_equal(one.step({"a": Order("up")})["pictures"]["a"], wanted)
        else:
            one.reset(3)
    assert np.array_equal(run(one, prompt="desert day")["a"], run(two, prompt="desert day")["a"])
    stores = [each.worlds["a"].world.store.pools for each in (one, two)]
    free = [{format: len(pool.free) for format, pool in pools.items()} for pools in stores]
    assert free[0] == free[1]


@pytest.mark.parametrize("settled", [False, True])
def test_rewinding_makes_the_same_again_as_far_as_it_reaches(settled):
    world = stage(undo=6)
    if settled:
        step = world.step
        world.step = lambda orders: (step(orders), world.commit_pending())[0]
    first = run(world, "uldrud", prompt="desert day")["a"]
    assert world._extent()["undo"] == {"a": 9}  # six frames, and the block made last
    reply = world.rewind(["a"], 10)
    assert reply["made"] == {"a": 9} and np.array_equal(reply["pictures"]["a"], first[8])
    with pytest.raises(ValueError, match="frame must be 9 or later"):
        world.rewind(["a"], 8)
    again = run(world, "rud")["a"]
    assert again.shape == first[9:].shape and world.worlds["a"].pictures == 18


@pytest.mark.parametrize("settled", [False, True])
def test_nothing_is_offered_from_before_a_rollout(settled):
    """CausVid begins again every few blocks, with the last frames as its past, and there is no way back to before."""
    world = Stage(lambda: World(wan("causvid", rollout=9), kv="fp32", undo=9))
    reach = []
    for _ in range(6):
        reach.append(world.step({"a": Order(None, "fog")})["undo"]["a"])
        if settled:
            world.commit_pending()
    assert reach == [3, 6, 9, 3, 6, 3]
    world.rewind(["a"], 15)
    assert world.step({"a": Order()})["made"] == {"a": 18}
    with pytest.raises(ValueError, match="frame must be 15 or later"):
        world.rewind(["a"], 12)


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_saved_world_goes_on_bit_for_bit(kv, tmp_path):
    world = stage(kv=kv, undo=9)
    run(world, "uldrnd", prompt="desert day")
    world.save("a", tmp_path / "saved")
    on = run(world, "lrud")["a"]
    other = stage(kv=kv, undo=9, seed=5)
    run(other, "n", prompt="meadow night")
    reply = other.load(tmp_path / "saved")
    assert reply["prompt"] == "desert day" and reply["picture"].shape == (96, 96, 3)
    assert np.array_equal(run(other, "lrud")["a"], on)
    other.rewind(["a"], other.worlds["a"].pictures - 3)
    run(other, "u")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "past0.safetensors",
        "world.pt",
        "world.pt.sha256",
    ]


def test_a_saved_world_is_taken_up_in_the_place_of_one_that_was_released(tmp_path):
    world = stage()
    run(world, "ud", prompt="desert day")
    world.save("a", tmp_path / "saved")
    inner = world.worlds["a"].world
    inner.release()
    again = saved.load(inner, tmp_path / "saved")
    assert np.array_equal(again.step(action="up"), saved.load(inner, tmp_path / "saved").step(action="up"))


def test_what_is_saved_does_not_grow_with_what_can_be_rewound(tmp_path):
    sizes = []
    for undo in (0, 9):
        world = stage(undo=undo)
        run(world, "uldrnduu", prompt="desert day")
        world.save("a", tmp_path / str(undo))
        sizes.append((tmp_path / str(undo) / saved.PAST.format(0)).stat().st_size)
        assert len(world.worlds["a"].world.table.held) >= 6, "the world itself forgets nothing by being saved"
    assert sizes[0] == sizes[1]


SPOILED = {
    "nothing there": "folder must hold a saved world",
    "damaged": "folder must hold a saved world",
    "no past": r"must be a snapshot of a world, got .*past0.safetensors: ",
    "damaged past": r"must be a snapshot of a world, got .*past0.safetensors: ",
    "another format": r"got format 'int8' \(here 'fp32'\)$",
    "another window": r"got window 9 \(here 6\)$",
    "another sink": r"got sink 1 \(here 0\)$",
    "other weights": r"got weights '\w{16}' \(here '\w{16}'\)$",
    "another model": r"got model 'tiny' \(here 'x'\)$",
    "another guidance": r"got pasts 1 \(here 2\)$",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_save_that_does_not_fit_changes_nothing(spoil, tmp_path):
    options = {"another format": {"kv": "int8"}, "another window": {"window": 9}, "another sink": {"sink": 1}}
    source = Stage(lambda: small_world(**({"window": 6} | options.get(spoil, {}))))
    if spoil == "other weights":
        source.worlds["a"].world.model.network.state_dict()["layers.0.qkv.weight"][0] += 1e-3
    run(source, "ud", prompt="desert day")
    source.save("a", tmp_path / "saved")
    state, past = tmp_path / "saved" / saved.STATE, tmp_path / "saved" / saved.PAST.format(0)
    if spoil in ("nothing there", "no past"):
        (past if spoil == "no past" else state).unlink()
    if spoil in ("damaged", "damaged past"):
        (past if spoil == "damaged past" else state).write_bytes(b"no")
    world, twin = stage(), stage()
    for each in (world, twin):
        run(each, "uu", prompt="glacier day")
    model = world.worlds["a"].world.model
    adapter = model.adapter
    if spoil == "another model":
        model.adapter = dataclasses.replace(adapter, name="x")
    if spoil == "another guidance":
        model.adapter = dataclasses.replace(adapter, guidance=3)
    free = {format: len(pool.free) for format, pool in world.worlds["a"].world.store.pools.items()}
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        world.load(tmp_path / "saved")
    model.adapter = adapter
    assert free == {format: len(pool.free) for format, pool in world.worlds["a"].world.store.pools.items()}
    assert np.array_equal(run(world, "l")["a"], run(twin, "l")["a"])


def test_without_room_a_world_is_neither_forked_nor_left_for_a_saved_one(tmp_path):
    world = Stage(lambda: small_world(window=6))
    run(world, "ud", prompt="desert day")
    world.save("a", tmp_path / "saved")
    assert not world.describe()["can_fork"]
    for request in (world.fork, lambda: world.load(tmp_path / "saved")):
        with pytest.raises(ValueError, match="--worlds 2"):
            request()
    run(world, "lr")


def test_a_fork_does_not_end_for_a_save_that_can_not_be_read(tmp_path):
    world = stage()
    run(world, "ud", prompt="desert day")
    world.fork()
    with pytest.raises(ValueError, match="folder must hold"):
        world.load(tmp_path / "nothing")
    assert list(world.worlds) == ["a", "b"]
    world.save("b", tmp_path / "saved")
    world.load(tmp_path / "saved")
    assert list(world.worlds) == ["a"]


def test_a_save_for_which_there_is_no_room_ends_no_world(tmp_path):
    world = stage()
    run(world, "udlr", prompt="desert day")
    world.save("a", tmp_path / "saved")
    world.fork()
    run(world, "uuuu")
    world.commit_pending()  # two worlds that share nothing and remember all that they may
    for _ in range(3):  # what a failed load took is given back
        with pytest.raises(ValueError, match="close one first"):
            world.load(tmp_path / "saved")
    assert list(world.worlds) == ["a", "b"]
    run(world, "lrud")
    world.close("b")
    world.load(tmp_path / "saved")


def test_a_thousand_wordings_of_a_theme_are_kept_as_one():
    world = stage()
    for i in range(1000):
        world.prepare("the " * (i % 100) + "desert" + " at" * (i // 100) + " night")
    assert len(world.worlds["a"].world.model._themes) == 1
    run(world, "u", prompt="a desert by night")
    assert len(world.worlds["a"].world.model._themes) == 1


@asynchronous
async def test_whatever_happens_between_blocks_nothing_of_it_stays(tmp_path):
    """A slice of soak_world.py, by what can be counted: after a reset there are as many tensors and free pages as after
    the last one."""
    world = Stage(functools.partial(open_weighed, period=10**9, small=True))
    for theme in itertools.product(PLACES, TIMES):
        world.prepare(" ".join(theme))  # what is kept of each

    async def call(name, /, **given):
        return getattr(world, name)(**given)

    counts = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        await through_stage(call, 40, seed, folder, lambda block, nbytes: None)
        world.reset(0)
        pools = world.worlds["a"].world.store.pools.values()
        gc.collect()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        counts.append((tensors, [len(pool.free) for pool in pools]))
        assert len(list(folder.iterdir())) <= 3
    assert counts[0] == counts[1] == counts[2]


def test_saving_twice_under_one_name_is_refused(tmp_path):
    world = stage()
    run(world, "u", prompt="desert day")
    world.save("a", tmp_path / "saved")
    with pytest.raises(ValueError, match="folder must be new"):
        world.save("a", tmp_path / "saved")


def test_a_world_whose_decoder_looks_back_is_saved_with_what_it_sees(tmp_path):
    """A stand-in for a VAE: each picture depends on all latents before it."""

    class Looking(PictureStream):
        looks_back = True

        def __init__(self):
            self.sum = torch.zeros(())

        def __call__(self, latents):
            self.sum = self.sum + latents.sum()
            return np.full((len(latents), 2, 2, 3), int(self.sum * 1000) % 256, np.uint8)

        def fork(self):
            other = Looking()
            other.sum = self.sum
            return other

        def state(self):
            return {"sum": self.sum}

        def restore(self, state):
            self.sum = state["sum"]

    def looking():
        model = wan("self-forcing")
        model.open_video = Looking
        return World(model, kv="fp32", worlds=2)

    world = Stage(looking)
    prompts = {"a": Order(None, world.worlds["a"].world.model.presentation.example_prompts[0] or "rain")}
    for _ in range(3):
        world.step(prompts)
    assert world._extent()["undo"] == {"a": 0}
    with pytest.raises(ValueError, match="keep a fork"):
        world.rewind(["a"], 0)
    world.save("a", tmp_path / "saved")
    on = [world.step({"a": Order()})["pictures"]["a"] for _ in range(2)]
    other = Stage(looking)
    other.load(tmp_path / "saved")
    assert all(np.array_equal(a, other.step({"a": Order()})["pictures"]["a"]) for a in on)


def test_recaching_can_be_chosen():
    told = []
    for recache in (None, True):
        world = Stage(lambda: World(wan("self-forcing"), kv="fp32"))
        assert world.describe()["can_recache"]
        for _ in range(2):
            world.step({"a": Order(None, "fog")})
        inner = world.worlds["a"].world
        inner.decoder.recache = lambda condition, how: told.append(how)
        world.step({"a": Order(None, "rain", recache)})
    assert told == ["block-causal"]
    acting = stage()
    assert not acting.describe()["can_recache"]
    run(acting, "ud", prompt="desert day")
    before = acting._extent()
    with pytest.raises(ValueError, match="recache must not be asked for"):
        acting.step({"a": Order("up", "glacier night", True)})
    assert acting._extent() == before and acting.worlds["a"].world.prompt == "desert day"
