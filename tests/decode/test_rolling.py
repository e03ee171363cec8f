"""Blocks in flight that see each other: what each sees, short videos, forks, runs that are taken up."""

import dataclasses

import numpy as np
import pytest
import torch

from inferix.decode.contract import Adapter, Segment
from inferix.decode.rolling import RollingSchedule
from inferix.models import blocks_for, whole_start
from inferix.world import World
from tests.models.test_wan_world import play, wan

ROW = Adapter("rolling", block_frames=3, times=(1.0, 0.8, 0.5), timesteps=(1000, 800, 500), stages=3, window=15, sink=3)


def test_the_blocks_in_flight_share_a_window_and_a_clean_one_has_its_own():
    (forward,) = RollingSchedule(ROW).forwards([(7, 2), (8, 1), (9, 0)], clean=6)
    clean, *noisy = forward.segments
    assert forward.commit and clean == Segment(6, 3, 0.0, lookback=5, weight=0.0, sink=False)
    # 12 frames back from the end of block 9, at 30: from frame 18 on, where block 6 begins.
    firsts = [each.block + 1 - each.lookback for each in noisy]
    assert firsts == [6, 6, 6] and [each.block + each.lookahead for each in noisy] == [9, 9, 9]
    assert [each.t for each in noisy] == [500, 800, 1000] and all(each.sink for each in noisy)


def test_a_step_ends_at_the_next_level_and_the_last_one_at_the_clean_block():
    x, flow, fresh = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    schedule = RollingSchedule(dataclasses.replace(ROW, prediction="flow"))
    torch.testing.assert_close(
        schedule.advance(1, x, flow, lambda frames: fresh[:frames]), 0.5 * (x - 0.8 * flow) + 0.5 * fresh
    )
    assert torch.equal(schedule.advance(2, x, flow, None), x - 0.5 * flow)
    assert torch.equal(RollingSchedule(ROW).advance(2, x, flow, None), flow)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stages": 2}, "stages must divide the 3 steps of rolling, got 2"),
        ({"window": 9}, "window must be whole blocks, the sink and 3 blocks in flight at least, 12 frames, got 9"),
        ({"window": None}, "window must be whole blocks, .* got None"),
        ({"guidance": 3.0}, "without guidance, for blocks in flight, got 'renoise' and guidance 3"),
        ({"sampler": "unipc"}, "sampler must be renoise or euler, .* got 'unipc'"),
    ],
)
def test_a_row_that_can_not_be_one_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        RollingSchedule(dataclasses.replace(ROW, **changes))


def rolling(kv="fp32", **options):
    """Two steps, two blocks in flight."""
    steps = {"times": (1.0, 0.7), "timesteps": (1000.0, 700.0), "stages": 2}
    return World(wan("rolling-forcing", **steps, window=12, sink=3), kv=kv, backend="compiled", **options)


def test_a_video_may_be_shorter_than_the_window():
    """The repository's own loop draws its last block anew in every step, where there are fewer blocks than steps."""
    short, longer = rolling(blocks=1), rolling()
    made = [short.step(prompt="fog") for _ in range(2)]
    assert [len(each) for each in made] == [0, 3] and short.ahead == 0
    with pytest.raises(RuntimeError, match="was to have 1 blocks, and has them"):
        short.step()
    longer.step(prompt="fog")
    assert not np.array_equal(longer.step(), made[1])  # there the next block was seen


def test_a_run_is_taken_up_and_a_fork_goes_on_alike():
    prompts = ["fog"] * 4 + ["rain"] * 4
    whole = play(one := rolling("int8", worlds=2), prompts)
    again = play(other := rolling("int8"), prompts, replayed=whole[:5])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert (
        list(one.table.held) == list(other.table.held) == [0, 1, 2, *range(9, 18)]
    )  # as far back as the next clean pass sees
    twin = one.fork()
    assert np.array_equal(one.step(), twin.step())


def test_given_frames_are_whole_blocks():
    world = rolling()
    given = np.full((6, 48, 80, 3), 90, np.uint8)
    assert len(world.observe(given, prompt="fog")) == 6 and world.frames == 6
    world.step()
    with pytest.raises(ValueError, match="frames must make whole blocks of 3 latents, got 1"):
        rolling().observe(given[:1], prompt="fog")


def test_a_clip_is_cut_to_whole_blocks_and_a_video_has_as_many_as_it_needs():
    """Three latents are nine pictures at the beginning, and twelve after it."""
    model = wan("rolling-forcing")
    assert [whole_start(model, pictures) for pictures in (1, 8, 9, 20, 21)] == [0, 0, 9, 9, 21]
    assert [blocks_for(model, pictures) for pictures in (1, 9, 10, 21, 22)] == [1, 1, 2, 2, 3]
