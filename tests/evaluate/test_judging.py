"""A video through its metrics; what one of them can not do is said, and the others go on."""

import dataclasses
import doctest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inferix.evaluate import judging, metric
from inferix.evaluate.drift import drift
from inferix.evaluate.judging import chosen, judge, rounds
from inferix.evaluate.metric import METRICS, Metric, registered
from inferix.evaluate.weights import WeightsDir
from tests.evaluate.clips import counted, write

NONE = WeightsDir(None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames whose brightness rises by 4."""
    return write(tmp_path_factory.mktemp("videos") / "clip.mp4", counted(40))


@pytest.fixture
def registry() -> Iterator[dict[str, Metric]]:
    """The metrics there are; those that a test adds go with it."""
    before = dict(registered())
    yield METRICS
    METRICS.clear()
    METRICS.update(before)


def test_scores_of_chunks_and_their_drift(clip: Path) -> None:
    found = judge(clip, chosen(["proxy:exposure"], NONE)[0], NONE, 4)
    scores = found.scores["proxy:exposure"]
    assert scores == pytest.approx([18, 58, 98, 138], abs=1), "the mean of 4 x (0 ... 9), of 4 x (10 ... 19), ..."
    assert found.drift["proxy:exposure"] == drift(scores) and found.whole["proxy:exposure"] == np.mean(scores)
    assert (found.chunk_frames, found.looked_at, found.failed) == (10, 10, {})


def test_of_chunks_the_middle_is_looked_at_unless_all_is(clip: Path) -> None:
    metrics = chosen(["proxy:exposure"], NONE)[0]
    middle, whole = (judge(clip, metrics, NONE, 2, most) for most in (2, None))
    assert (middle.chunk_frames, middle.looked_at, whole.looked_at) == (20, 2, 20)
    assert middle.scores["proxy:exposure"] == pytest.approx([4 * 9.5, 4 * 29.5], abs=1)
    assert whole.scores["proxy:exposure"] == pytest.approx([4 * 9.5, 4 * 29.5], abs=1)


def test_embeddings_give_consistency_within_chunks_and_likeness_to_the_first(clip: Path, registry: object) -> None:
    @metric.metric("side", kind="proxy", embeds=True)
    def side(frames: np.ndarray, weights: object) -> np.ndarray:
        dark = frames.mean((1, 2, 3)) < 80
        return np.stack([dark, ~dark], 1)

    found = judge(clip, chosen(["proxy:side"], NONE)[0], NONE, 4)
    assert found.scores["proxy:side"] == [1.0] * 4
    assert found.scores["proxy:side:anchored"] == [1.0, 1.0, 0.0, 0.0]
    assert found.drift["proxy:side:anchored"].linear == 2 + 1
    assert found.whole["proxy:side"] == pytest.approx((19 + (0 + 0) + 19 / 2) / 39), "over all 40 frames"


def test_a_metric_of_the_whole_video_sees_every_frame_of_all_chunks(clip: Path, registry: object) -> None:
    @metric.metric("frames", kind="proxy", sees="video", size=(4, 6))
    def frames(frames: np.ndarray, weights: object) -> float:
        assert frames.shape[1:] == (4, 6, 3)
        return len(frames)

    found = judge(clip, chosen(["proxy:frames"], NONE)[0], NONE, 3, 2)
    assert found.whole == {"proxy:frames": 39} and not found.scores


def test_networks_are_in_memory_for_their_own_metric_alone(
    clip: Path, registry: dict[str, Metric], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name in ("first", "second"):
        registry[name] = Metric(name, lambda frames, weights, name=name: said.append(name) or 0.5, needs=(name,))
    monkeypatch.setattr(NONE, "release", lambda: said.append("release"))
    light, proxies = ["proxy:exposure", "proxy:contrast"], registered()
    metrics = [proxies[name] for name in ("first", light[0], "second", light[1])]
    assert [[each.name for each in together] for together in rounds(metrics)] == [light, ["first"], ["second"]]
    counted: list[None] = []
    found = judge(clip, metrics, NONE, 2, on_chunk=lambda: counted.append(None))
    assert said == ["release", "first", "first", "release", "second", "second", "release"]
    assert len(counted) == 2 * 3 and set(found.scores) == {each.name for each in metrics}


def test_one_frame_in_a_chunk_is_too_few_for_some(clip: Path) -> None:
    found = judge(clip, chosen(["proxy:motion", "proxy:subject", "proxy:exposure"], NONE)[0], NONE, 40)
    assert found.failed == {
        "proxy:motion": "needs at least 3 frames in a chunk, got 1",
        "proxy:subject": "needs at least 2 frames in a chunk, got 1",
    }
    assert len(found.scores["proxy:exposure"]) == 40


@pytest.mark.parametrize(
    "what, said",
    [
        (np.nan, "it must give finite numbers, got [nan]"),
        (ValueError("too dark\nby far"), "too dark by far"),
        (RuntimeError("kernel size can't be greater"), "kernel size"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_metric_that_fails_is_left_and_the_others_go_on(
    clip: Path, registry: object, what: object, said: str
) -> None:
    @metric.metric("bad", kind="proxy")
    def bad(frames: np.ndarray, weights: object) -> object:
        if isinstance(what, Exception):
            raise what
        return what

    found = judge(clip, chosen(["proxy:bad", "proxy:exposure"], NONE)[0], NONE, 4)
    assert list(found.scores) == ["proxy:exposure"] and list(found.drift) == ["proxy:exposure"]
    assert found.failed["proxy:bad"].startswith(said) and "\n" not in found.failed["proxy:bad"]


def test_pictures_of_a_few_pixels(tmp_path: Path) -> None:
    """Scored, or said to be too small."""
    path = write(tmp_path / "dot.mp4", counted(40, 2, 2))
    metrics = [each for each in registered().values() if each.kind == "proxy"]
    found = judge(path, metrics, NONE, 4)
    assert {each.removesuffix(":anchored") for each in found.scores} | found.failed.keys() >= {
        each.name for each in metrics
    } - {"proxy:cuts"}
    assert found.scores["proxy:exposure"] and "proxy:clarity" in found.failed


def test_what_is_chosen_unless_metrics_are_named() -> None:
    found, left_out = chosen(None, NONE)
    assert {each.name for each in found} >= {"proxy:clarity", "proxy:cuts"} and not {each.name for each in found} & {
        "clarity",
        "proxy:subject",
    }
    assert left_out["proxy:subject"] == "off unless it is named"
    assert "musiq_spaq_ckpt-358bb6af.pth" in left_out["clarity"] and "\n" not in left_out["clarity"]
    assert {each.name for each in found} | left_out.keys() == registered().keys()


def test_what_is_named_is_there_or_refused(registry: dict[str, Metric]) -> None:
    assert [each.name for each in chosen(["proxy:subject", "proxy:subject"], NONE)[0]] == ["proxy:subject"]
    with pytest.raises(ValueError, match=r"metrics must be of .*proxy:clarity.*, got 'sharpness'"):
        chosen(["sharpness"], NONE)
    with pytest.raises(ValueError, match="musiq_spaq_ckpt"):
        chosen(["clarity"], NONE)
    registry["far"] = dataclasses.replace(registry["proxy:cuts"], name="far", packages=("no_such_package",))
    with pytest.raises(
        ImportError, match=r"far needs no_such_package, which is not installed: pip install '.*evaluate"
    ):
        chosen(["far"], NONE)
    assert "needs no_such_package" in chosen(None, NONE)[1]["far"]


def test_a_registration_that_does_not_hold_is_refused(registry: object) -> None:
    with pytest.raises(ValueError, match="name must be of no other metric, got 'proxy:clarity'"):
        metric.metric("clarity", kind="proxy")(lambda frames, weights: 0.0)
    with pytest.raises(ValueError, match="name must be without 'proxy:'"):
        metric.metric("proxy:other")
    with pytest.raises(ValueError, match="kind must be one of real, proxy, got 'guess'"):
        metric.metric("other", kind="guess")
    with pytest.raises(ValueError, match="size must be given with sees='video', and only then"):
        metric.metric("other", sees="video")


def test_real_metrics_and_proxies_are_told_apart_by_their_names() -> None:
    for name, each in registered().items():
        assert name == each.name and name.startswith("proxy:") == (each.kind == "proxy") and each.about
        assert each.kind == "real" or not each.needs


def test_examples(clip: Path, monkeypatch: pytest.MonkeyPatch, registry: object) -> None:
    monkeypatch.chdir(clip.parent)
    names = {"weights": NONE}
    assert doctest.testmod(judging, extraglobs=names).failed == 0
    assert doctest.testmod(metric, extraglobs={"METRICS": METRICS}).failed == 0
