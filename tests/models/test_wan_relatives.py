"""Relatives of Self Forcing whose own code does more than its loop, against recorded runs of that code: LongLive's
re-caching, with and without time counted anew; Infinity-RoPE; Causal-Forcing's first block; CausVid's rollouts with an
overlap of two blocks; Krea's context, computed anew before each block.

Bounds as in test_wan.py: 1e-6 of float64 code, 2e-5 of float32 code.
"""

import pytest

from inferix.models.wan import ADAPTERS
from tests.models.relatives import RUNS, longlive
from tests.models.replayed import recorded
from tests.models.test_wan import EXACT, SINGLE, furthest


@pytest.mark.parametrize("way, bound", [("dense", EXACT), ("compiled", SINGLE)], ids=["dense", "pages"])
@pytest.mark.parametrize("name", RUNS)
def test_the_recorded_run(name, way, bound):
    run = RUNS[name](way=way)
    assert run.error < bound
    assert run.decoder.held == run.seen and next(run.decoder.draws, None) is None


def test_longlive_block_by_block_is_another_way():
    """What an unmerged pull request does. After the switch other frames come out, before it the same."""
    ours, theirs = longlive("longlive_switch15", 15, "dense", blocks=6, recache="block-causal").pairs["latents"]
    assert furthest(ours[:15], theirs[:15]) < EXACT and furthest(ours[15:], theirs[15:]) > 0.01


def test_time_as_frames_are_made_is_another_way():
    """The two are one as long as the cache of 12 frames is not full."""
    absolute, relative = recorded("longlive_switch15")["latents"], recorded("longlive_infinity")["latents"]
    assert furthest(absolute[:12], relative[:12]) < EXACT and furthest(absolute[12:], relative[12:]) > 0.1


def test_int8_pages_recache_at_little_cost():
    """PSNR of the latents against the recording. Measured 88.1 dB; the bound leaves 6 dB, a factor of two."""
    assert 82 < RUNS["longlive, a new prompt at frame 15"](way="compiled", kv="int8").psnr < 120


def test_a_first_block_is_told_its_own_timesteps():
    four = ADAPTERS["causal-forcing-framewise"].steps(first=False)
    for steps in (2, 1):
        adapter = ADAPTERS[f"causal-forcing-framewise-{steps}step"]
        assert adapter.steps(first=True) == four and four[0] == (1.0, 1000.0)
        assert len(adapter.steps(first=False)) == steps


def test_schedules_are_the_recorded_ones():
    files = {"causal-forcing-framewise-2step": "causal_forcing_2step", "longlive": "longlive_switch12"}
    files |= {"krea-realtime": "krea_realtime", "rolling-forcing": "rolling_forcing"}
    for name, file in files.items():
        assert ADAPTERS[name].timesteps == tuple(recorded(file)["times"].tolist())


def test_a_rollout_is_not_taken_back_to_before_its_overlap():
    assert RUNS["causvid, overlap of 6"](way="compiled").decoder.rewinds == [0, 3, 6]
