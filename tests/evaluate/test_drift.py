"""Video Drift Error is the published one, and its relatives are what their docstrings say."""

import doctest
import math

import numpy as np
import pytest

from inferix.evaluate import drift as module
from inferix.evaluate.drift import anchored, consistency, drift, late_drift, slope, vde

# (scores, VDE linear, VDE log): what the function `vde` of github.com/alibaba-damo-academy/Inferix, LV-Bench/vde.py at
# a8cb31d, gave for them on a CPU.
PUBLISHED = [
    (
        [0.95, 1.14369, 0.76908, 1.23402, 0.77563, 1.04741, 0.71732, 1.09691, 0.75124, 1.06774],
        9.051252365112305,
        2.574110507965088,
    ),
    (
        [55.0, 63.77611, 53.06547, 67.07049, 71.101, 42.31459, 55.55752, 70.11931, 62.89194, 53.15884],
        7.349103927612305,
        2.1620516777038574,
    ),
    (
        [4.2, 5.34164, 3.1545, 4.8566, 5.065, 3.33741, 3.76371, 3.7095, 4.30606, 3.86483],
        8.690918922424316,
        2.408463954925537,
    ),
    (
        [0.98, 1.22968, 0.87191, 1.21213, 0.72693, 0.74298, 1.0771, 1.15585, 1.16766, 1.26928],
        9.204917907714844,
        2.569244384765625,
    ),
    ([0.002, 0.00172], 0.14000007510185242, 0.0),
    ([0.95, 1.19205, 0.71835], 0.7534210681915283, 0.17660661041736603),
    ([55.0, 43.59116, 43.22231, 54.3252, 60.62258, 70.63399, 42.83452], 3.460761547088623, 1.0426641702651978),
    (
        [
            4.2,
            5.45336,
            4.86782,
            4.28088,
            3.55137,
            4.53004,
            3.59762,
            4.56268,
            4.57471,
            3.92599,
            4.94283,
            3.95691,
            4.12159,
            5.0357,
            3.57133,
            3.40747,
            4.38738,
            4.03514,
            5.1429,
            3.56732,
        ],
        23.997041702270508,
        4.804840087890625,
    ),
    (
        [0.98, 0.71996, 0.95111, 0.86979, 0.94985, 1.13523, 0.70803, 1.26768, 1.10433, 1.16306],
        6.8190202713012695,
        1.9683805704116821,
    ),
    (
        [0.002, 0.00209, 0.00189, 0.00188, 0.00166, 0.00176, 0.00175, 0.0018, 0.00249, 0.00236],
        4.355001449584961,
        1.2807000875473022,
    ),
    (
        [0.95, 0.6748, 0.81453, 0.97463, 1.0595, 0.90398, 1.02563, 1.18091, 0.81748, 0.88276],
        6.260631561279297,
        1.7420544624328613,
    ),
    (
        [55.0, 49.01303, 62.3039, 51.60561, 39.1401, 53.76533, 40.74772, 64.39565, 66.38623, 55.97524],
        6.297294616699219,
        1.878628134727478,
    ),
    ([4.2, 3.47688], 0.17217136919498444, 0.0),
    ([0.98, 0.78928, 0.71461], 0.660030722618103, 0.1348949372768402),
    ([0.002, 0.00146, 0.00252, 0.00207, 0.00224, 0.00146, 0.00249], 4.2049994468688965, 1.2697323560714722),
    (
        [
            0.95,
            0.72418,
            0.76922,
            0.74526,
            0.95232,
            0.70986,
            1.12014,
            0.94797,
            1.06633,
            0.81013,
            1.03782,
            0.92353,
            1.03456,
            0.89913,
            1.22916,
            1.14735,
            1.13965,
            0.85951,
            0.77392,
            0.75243,
        ],
        27.787166595458984,
        5.621380805969238,
    ),
    (
        [55.0, 70.42494, 47.81054, 67.22871, 46.16242, 58.95072, 46.72372, 48.63602, 63.17029, 58.57653],
        7.760624885559082,
        2.1628994941711426,
    ),
    ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 0.0, 0.0),
    ([1.0], 0.0, 0.0),
    ([0.0, 1.0, 2.0], math.inf, math.inf),
]
# It adds at most 19 positive numbers in float32, in the order of the CPU's vectors: between two orders there are
# at most 18 roundings of 2^-24, and 2 for the logarithms. On the CPU of these numbers ours have the same last bit.
ROUNDINGS = 20 * 2.0**-24


@pytest.mark.parametrize("scores, linear, log", PUBLISHED)
def test_vde_is_the_published_one(scores, linear, log):
    assert vde(scores) == pytest.approx(linear, rel=ROUNDINGS, abs=0)
    assert vde(scores, "log") == pytest.approx(log, rel=ROUNDINGS, abs=0)


def test_vde_by_hand():
    rising = [100.0 + 10 * i for i in range(10)]
    assert vde(rising) == pytest.approx(sum((10 - i) * 0.1 * i for i in range(10)), rel=1e-6)
    assert vde(rising, "log") == pytest.approx(sum(math.log(10 - i) * 0.1 * i for i in range(1, 10)), rel=1e-6)
    with pytest.raises(ValueError, match="weights must be one of linear, log, got 'late'"):
        vde(rising, "late")


def test_what_vde_cannot_tell_apart_its_relatives_do():
    early, late = [1.0, 0.5, *[1.0] * 8], [*[1.0] * 9, 0.5]
    assert (vde(early), vde(late)) == (4.5, 0.5) and vde(late, "log") == 0
    assert late_drift(late) == pytest.approx(9 * late_drift(early)) == pytest.approx(0.1)
    up, down = [1 + 0.1 * i for i in range(10)], [1 - 0.1 * i for i in range(10)]
    assert vde(up) == pytest.approx(vde(down), rel=1e-6)
    assert slope(up) == pytest.approx(0.9) and slope(down) == pytest.approx(-0.9)


def test_late_drift_and_slope_hardly_depend_on_how_many_chunks_there_are():
    few, many = ([1 + 0.2 * i / (n - 1) for i in range(n)] for n in (10, 40))
    assert late_drift(few) == pytest.approx(late_drift(many), rel=0.06) and slope(few) == pytest.approx(slope(many))
    assert vde(many) > 4 * vde(few)


def test_one_falling_negative_score_has_the_sign_of_its_change():
    assert slope([-1.0, -2.0]) == pytest.approx(-1.0)


def test_a_first_chunk_of_0_has_no_drift_relative_to_it():
    assert vars(drift([0.0, 1.0])) == dict.fromkeys(("linear", "log", "late", "slope"), math.inf)


@pytest.mark.parametrize("measure", [late_drift, slope])
def test_one_chunk_drifts_from_nothing(measure):
    with pytest.raises(ValueError, match="scores must be of at least 2 chunks, got 1"):
        measure([1.0])


def test_a_subject_swapped_between_chunks_is_seen_by_the_anchored_score_alone():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 32))
    chunks = [np.tile(who, (12, 1)) for who in [one] * 5 + [other] * 5]
    assert [consistency(chunk) for chunk in chunks] == pytest.approx([1.0] * 10)
    scores = anchored(chunks)
    assert scores[:5] == pytest.approx([1.0] * 5) and max(scores[5:]) < 0.5
    assert vde(scores) > 5


def test_consistency_takes_opposite_frames_for_unlike_ones_and_rows_of_zeros_for_nothing():
    assert consistency(np.array([[1.0, 0.0], [-1.0, 0.0]])) == 0
    assert consistency(np.zeros((3, 4))) == 0


def test_examples():
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0
