"""Worlds that several ranks run together are what one process makes; ranks are threads here."""

import dataclasses
import gc
import re

import numpy as np
import pytest
import torch

from inferix.models import load_model
from inferix.models.magi import Magi, MagiSchedule
from inferix.models.magi.adapters import adapter_for
from inferix.ranks import Ranks
from inferix.sharing import workload
from inferix.world import World
from inferix_kernels import Policy
from inferix_kernels.distributed import in_process_group, run_ranks
from tests.models import magi_folder
from tests.models.test_wan_world import wan


def together(ranks, play, open_world, schedule="gather"):
    """What `play(world)` returns on rank 0 of so many."""

    def run(transport):
        group = Ranks(transport, schedule)
        world = open_world(group)
        if not group.leads:
            return group.follow()
        made = play(world)
        group.end()
        return made

    return run_ranks(in_process_group(ranks, deadline=120), run)[0]


def same(made, expected, bound=2e-5):
    assert len(made) == len(expected) and all(x.shape == y.shape for x, y in zip(made, expected, strict=True))
    assert max(float((x - y).abs().max()) for x, y in zip(made, expected)) <= bound


def walking(ranks=None, **options):
    """A world whose window is soon full."""
    return World(wan(window=5, sink=1), kv="fp32", seed=3, worlds=2, undo=6, ranks=ranks, **options)


def steered(world):
    """Eviction, a prompt switch, a fork that goes another way and is let go, a rewind, a reset."""
    made = []

    def step(world, prompt=None):
        world.step(prompt=prompt)
        made.append(world.latents.clone())

    for i in range(3):
        step(world, "fog" if i == 0 else None)
    other = world.fork(seed=9)
    step(other, "rain")
    step(world, "snow")
    del other
    gc.collect()
    world.rewind(6)
    step(world)
    other = world.fork()
    step(other, "fog")
    other.release()
    world.commit_pending()
    step(world, "rain")
    world.reset(seed=4)
    step(world, "fog")
    return made


def tiny(ranks=None):
    """A first block of as few steps as any other."""
    model = load_model("tiny")
    model.adapter = dataclasses.replace(model.adapter, first_times=())
    return World(model, kv="fp32", seed=3, ranks=ranks)


@pytest.mark.parametrize(("schedule", "ranks"), [("gather", 2), ("ulysses", 3), ("ring", 3), ("pass-q", 2)])
def test_a_steered_world_is_the_same_on_several_ranks(schedule, ranks):
    same(together(ranks, steered, walking, schedule), steered(walking()))


def prompts(world):
    made = []
    for prompt in ("fog", "fog", "rain", "snow", "snow"):
        world.step(prompt=prompt)
        made.append(world.latents.clone())
    return made


WAN = {
    "self-forcing": {"window": 5, "sink": 1},
    "causvid": {"rollout": 6},  # begins anew, from pictures
    "longlive": {"window": 5, "sink": 3},  # computes its past again under a new prompt
}


@pytest.mark.parametrize("name", ["self-forcing", "causvid", "longlive"])
def test_wan_worlds_are_the_same_on_two_ranks(name):
    def opened(ranks=None):
        return World(wan(name, **WAN[name]), kv="fp32", ranks=ranks)

    same(together(2, prompts, opened), prompts(opened()))


@pytest.mark.parametrize(("parallel", "ranks"), [("gather", 2), ("branches", 2), ("branches", 4)])
def test_both_predictions_of_a_guided_world_on_each_rank_or_each_on_its_own(parallel, ranks):
    def opened(ranks=None):
        return World(wan("self-forcing", window=5, guidance=2.0), kv="fp32", ranks=ranks)

    same(together(ranks, prompts, opened, parallel), prompts(opened()))


def test_ranks_share_a_world_as_the_planner_has_it(caplog):
    """By what is measured here, whatever that is; rank 0 says so in a line."""
    with caplog.at_level("INFO", "inferix"):
        same(together(2, prompts, walking, "auto"), prompts(walking()))
    said = [record.message for record in caplog.records if "ranks make" in record.message]
    assert len(said) == 1 and re.match(r"2 ranks make self-forcing by [\w-]+\. Chosen: .*, the fastest", said[0])


@pytest.mark.parametrize(
    ("options", "parallel", "said"),
    [
        ({}, "branches", "parallel must not be branches: it needs a guided model and an even number of ranks"),
        ({"graphs": True}, "gather", "graphs must be False in a world of several ranks"),
        ({"past_bias": 1.0}, "gather", "past_bias and time must be 0 and absolute in a world of several ranks"),
    ],
)
def test_what_several_ranks_can_not_share(options, parallel, said):
    with pytest.raises(ValueError, match=said):
        together(2, prompts, lambda ranks: walking(ranks, **options), parallel)


def magi(ranks=None):
    network = magi_folder.random_network(magi_folder.tiny_config()).requires_grad_(False)
    schedule = MagiSchedule(steps=8)
    rows = torch.randn(5, magi_folder.CAPTION_DIM, generator=torch.Generator().manual_seed(2))
    model = Magi(network, adapter_for("magi-4.5b", schedule, (32, 48)), schedule, lambda prompt: rows)
    return World(model, kv="fp32", ranks=ranks)


@pytest.mark.parametrize("schedule", ["gather", "ulysses"])
def test_several_blocks_in_flight_on_two_ranks(schedule):
    def play(world):
        return [(world.step(prompt="fog"), world.latents.clone())[1] for _ in range(4)]

    same(together(2, play, magi, schedule), play(magi()))


def test_int8_pages_differ_by_rounding_alone():
    """Of the codes, those that float32 rounding moves: by one, and hardly any."""

    def play(world):
        latents = [(world.step(prompt="fog"), world.latents.clone())[1] for _ in range(1)]
        world.commit_pending()
        store, slots = world.store, world.table.state.slots.values()
        held = torch.cat([torch.arange(slot.pool_page, slot.pool_page + store.pages_per_frame) for slot in slots])
        return latents, torch.stack([x[held] for layer in store.layers for x in (layer[0].k, layer[0].v)])

    def opened(ranks=None):
        return World(wan(), kv="int8", precision="exact", ranks=ranks)

    (made, codes), (expected, theirs) = together(2, play, opened), play(opened())
    same(made, expected, 2e-3)
    apart = (codes.short() - theirs.short()).abs()
    assert apart.max() <= 1 and (apart == 0).float().mean() >= 0.999


def test_what_is_refused_on_rank_0_is_refused_everywhere_and_the_world_goes_on():
    def play(world):
        world.step(prompt="fog")
        with pytest.raises(ValueError, match="action"):
            world.step(action="fly")
        with pytest.raises(ValueError, match="frames must be one of"):
            world.rewind(4)
        world.step(prompt="rain")
        return [world.latents]

    same(together(2, play, walking), play(walking()))


def test_a_call_that_fails_on_one_rank_alone_ends_all():
    def play(world):
        world.step(prompt="fog")
        world.rewind(3)
        return world.step(prompt="fog")

    def opened(ranks):
        world = walking(ranks)
        if not ranks.leads:
            world.decoder.rewind = None
        return world

    with pytest.raises(RuntimeError, match="rewind failed on rank 1, and not on rank 0: 'NoneType' object"):
        together(2, play, opened)


def test_a_schedule_that_is_none():
    with pytest.raises(ValueError, match=r"parallel must be .* got 'rings'"):
        Ranks(in_process_group(1)[0], "rings")


def test_the_tiny_worlds_pictures_on_two_ranks():
    def play(world):
        return world.step(action="up", prompt="desert night")

    made, expected = together(2, play, tiny, "ulysses"), play(tiny())
    assert int(np.abs(made.astype(int) - expected).max()) <= 1


def test_the_planner_counts_the_heads_of_queries_too():
    asked = workload(magi().model, Policy(window=30, format="int8"), ranks=2)
    assert (asked.heads, asked.kv_heads, asked.head_dim) == (
        magi_folder.HEADS,
        magi_folder.KV_HEADS,
        magi_folder.HEAD_DIM,
    )
