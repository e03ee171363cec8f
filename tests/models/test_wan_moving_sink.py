"""A sink into which is merged what leaves the window (Reward Forcing): keys and values, worlds, what is refused."""

import pytest
import torch

from inferix.models.wan.sink import MovingSink
from inferix.saved import load, save
from inferix.world import World
from inferix_kernels import Policy
from inferix_kernels.reference.qkv import rotate
from tests.models.test_wan_world import play, wan
from tests.models.wan_golden import table_for

PROMPTS = ["fog"] * 3 + ["rain"] * 3


def world(**options):
    model = wan("reward-forcing", times=(1.0, 0.7), timesteps=(1000.0, 700.0))
    return World(model, kv="int8", backend="compiled", **options)


@pytest.mark.parametrize("time", ["relative", "absolute"])
def test_what_leaves_is_merged_as_if_keys_were_not_rotated(time):
    """With time "absolute" a mean is taken off int8 worlds' keys, and is not turned with them."""
    model = wan("reward-forcing", times=(1.0,), timesteps=(1000.0,))
    policy = Policy(6, 3, format="int8", sink_format="fp32", time=time, on_evict=MovingSink(0.75))
    table = table_for(model, policy, backend="reference", pools={"fp32": 6, "int8": 6})

    def bare(layer, frame):
        """Keys without rotation or mean, and values."""
        k, v = table.gather(layer, [frame])
        mean = table.k_means[layer]
        back = model.turn_back(frame).expand(len(k), -1, -1)
        return rotate(k + mean, back, True).double(), v.double()

    qkv = torch.randn(8, model.layers, 3 * 15, 3 * 96, generator=torch.Generator().manual_seed(0))
    for block in range(4):
        if block == 3:  # frames 3 to 5 leave here
            before = [[bare(layer, frame) for frame in range(6)] for layer in range(model.layers)]
        opened = table.open_block(3)
        if block == 3:
            break
        clean = table.plan([opened], model.rope(opened.frames), commit=opened)
        for layer in range(model.layers):
            clean.attend(layer, qkv[block, layer] + 2, None, None)  # not around 0: there is a mean
        table.seal(opened)
    assert any(mean.any() for mean in table.k_means) == (time == "absolute")
    for layer, frames in enumerate(before):
        for frame in range(3):
            for now, old, leaving in zip(bare(layer, frame), frames[frame], frames[frame + 3]):
                torch.testing.assert_close(now, 0.75 * old + 0.25 * leaving, atol=2e-6, rtol=0)


def test_only_the_sink_is_held_in_working_precision():
    running = world()
    play(running, PROMPTS)
    assert {frame: extent.format for frame, extent in running.table.held.items()} == {
        **dict.fromkeys(range(3), "fp32"),
        **dict.fromkeys(range(12, 15), "int8"),  # the last block is pending
    }
    assert {format: pool.frames for format, pool in running.store.pools.items()} == {"fp32": 3 + 3, "int8": 6}


@pytest.mark.parametrize(("sink", "rooms"), [(1, 3), (2, 5)])
def test_a_sink_smaller_than_a_block_has_its_room(sink, rooms):
    """A frame of it takes up several of the three that leave."""
    running = world(sink=sink)
    play(running, PROMPTS[:4])
    assert running.store.pools["fp32"].frames == rooms and running.table.held[0].format == "fp32"


def test_forks_and_saved_worlds_merge_for_themselves(tmp_path):
    straight = world(worlds=3)
    play(straight, PROMPTS[:4])
    straight.commit_pending()
    save(straight, tmp_path / "world")
    twin, again = straight.fork(), load(straight, tmp_path / "world")
    wanted = play(straight, PROMPTS[4:] * 2)
    for other in (twin, again):
        assert all(torch.equal(a, b) for a, b in zip(wanted, play(other, PROMPTS[4:] * 2), strict=True))
    sinks = [each.table.gather(1, range(3)) for each in (straight, twin, again)]
    assert all(torch.equal(a, b) for sink in sinks[1:] for a, b in zip(sinks[0], sink))


def test_a_block_that_is_made_again_merges_once():
    straight, other = world(), world()
    wanted = play(straight, PROMPTS)
    play(other, PROMPTS[:5])
    state = other.decoder.generator.get_state()
    play(other, ["snow"])  # merges, and is taken back
    assert other.rewinds == [0, 3]
    other.rewind(3)
    other.decoder.generator.set_state(state)
    assert torch.equal(play(other, PROMPTS[5:])[0], wanted[5])


def test_what_can_not_be_is_said():
    with pytest.raises(
        ValueError, match="undo must be 0: reward-forcing merges what leaves its window into its sink, g"
    ):
        world(undo=3)
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1\.5"):
        MovingSink(1.5)
    none = world(sink=0)  # as any other world: there is nothing to merge into
    play(none, PROMPTS)
    assert list(none.table.held) == [12, 13, 14] and list(none.store.pools) == ["int8"]
