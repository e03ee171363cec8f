"""The published metrics: their formulas on networks that are known, and what is said of a file that is not right."""

from pathlib import Path

import numpy as np
import pytest
import torch

from inferix.evaluate import published
from inferix.evaluate.metric import METRICS
from inferix.evaluate.weights import FILES, WeightsDir, table

from .known_weights import hashed


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (11, 120, 160, 3), dtype=np.uint8)


@pytest.fixture
def networks(monkeypatch):
    """A stand-in for each network, by its file: set by a test."""
    found = {}
    monkeypatch.setattr(published, "network", lambda weights, name: found[name])
    return found


def test_what_they_need_is_in_the_table_and_has_a_network():
    names = {"clarity", "aesthetic", "background", "subject", "motion"}
    needs = {name for metric in names for name in METRICS[metric].needs}
    assert needs == set(FILES) == set(published._NETWORKS)


def test_clarity_is_the_mean_over_frames_in_batches_of_any_size(frames, networks):
    networks["musiq_spaq_ckpt-358bb6af.pth"] = lambda images: 100 * images.mean((1, 2, 3))
    expected = np.mean([100 * frame.mean() / 255 for frame in frames])
    assert published.clarity(frames, None) == pytest.approx(expected, rel=1e-5)


def test_aesthetic_is_the_head_on_normalized_embeddings_over_ten(frames, networks):
    table = hashed("embedding", (3, 768))
    networks["ViT-L-14.pt"] = lambda pixels: pixels.mean((2, 3)) @ table
    networks["sa_0_4_vit_l_14_linear.pth"] = lambda x: x.sum(1, keepdim=True)
    one_by_one = []
    for frame in frames:
        x = published.for_clip(frame[None]).mean((2, 3)) @ table
        one_by_one.append(float((x / x.norm()).sum()) / 10)
    assert published.aesthetic(frames, None) == pytest.approx(np.mean(one_by_one), rel=1e-4)


@pytest.mark.parametrize("name, file", [("background", "ViT-B-32.pt"), ("subject", "dino_vitbase16_pretrain.pth")])
def test_background_and_subject_are_embeddings_of_every_frame(frames, networks, name, file):
    networks[file] = lambda pixels: pixels.mean((2, 3))
    found = METRICS[name].score(frames, None)
    assert METRICS[name].embeds and found.shape == (11, 3)
    assert not np.allclose(found[0], found[1])


def test_motion_compares_odd_frames_with_what_their_neighbours_give(frames, networks):
    """The published formula by hand: the guess cut down to uint8, and the last odd frame of an even count left out."""
    asked = []

    def average(first, second):
        asked.append(first.shape)
        return (first + second) / 2

    networks["amt-s.pth"] = average
    even = frames[:10]
    off = [np.abs(even[i + 1].astype(int) - (even[i].astype(int) + even[i + 2]) // 2).mean() for i in range(0, 8, 2)]
    assert published.motion(even, None) == pytest.approx((255 - np.mean(off)) / 255, abs=1e-3)
    assert asked == [(1, 3, 128, 160)] * 4
    still = np.repeat(frames[:1], 5, 0)
    assert published.motion(still, None) > 1 - 1.01 / 255  # a value may be cut down by one


def test_motion_refuses_frames_that_amt_cannot_correlate(frames):
    with pytest.raises(ValueError, match="must be at least 113 pixels high and wide for motion, got 112 x 160"):
        published.motion(frames[:, :112], None)


def test_a_missing_file_is_one_line_with_all_that_is_known_of_it(tmp_path, frames):
    for name, file in FILES.items():
        with pytest.raises(ValueError) as error:
            WeightsDir(tmp_path).path(name)
        message = str(error.value)
        assert "\n" not in message
        for part in (name, str(tmp_path), file.source, file.sha256 or "sha256 not published", file.holds):
            assert part in message
    with pytest.raises(ValueError, match=r"ViT-B-32.pt must lie in the folder of weights, which is not given"):
        published.background(frames, WeightsDir(None))


def test_another_file_under_a_published_name_is_refused_or_recorded(tmp_path):
    name = "sa_0_4_vit_l_14_linear.pth"
    torch.save({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"must be sa_0_4_vit_l_14_linear.pth as published, got [\d,]+ bytes") as error:
        WeightsDir(tmp_path).path(name)
    assert "\n" not in str(error.value) and FILES[name].sha256 in str(error.value)
    weights = WeightsDir(tmp_path, verify=False)
    head = published.network(weights, name)
    assert head(torch.ones(2, 768)).flatten().tolist() == [768.0, 768.0]
    assert list(weights.read) == [name] and weights.read[name] != FILES[name].sha256
    assert weights.loaded(name, lambda path: None) is not None, "it is there"
    weights.release()
    assert weights.loaded(name, lambda path: path.name) == name, "it is not"


def test_a_file_of_another_network_is_one_line(tmp_path):
    torch.save({"weight": torch.ones(1, 512), "bias": torch.zeros(1)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    torch.save({"cls_token": torch.ones(1, 1, 384)}, tmp_path / "dino_vitbase16_pretrain.pth")
    weights = WeightsDir(tmp_path, verify=False)
    with pytest.raises(
        ValueError, match=r"aesthetic head for CLIP ViT-L/14: weight of shape \[1, 768\], got \[1, 512\]"
    ):
        published.network(weights, "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(
        ValueError, match=r"must hold DINO ViT-B/16: cls_token of shape \[1, 1, 768\], got \[1, 1, 384\]"
    ):
        published.network(weights, "dino_vitbase16_pretrain.pth")


def test_a_folder_that_is_none_and_a_name_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--weights-dir must be a folder, got .*nowhere"):
        WeightsDir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="name must be one of musiq_spaq"):
        WeightsDir(tmp_path).path("other.pth")


def test_the_document_has_every_file():
    document = (Path(__file__).parents[2] / "docs" / "quality.md").read_text()
    for name, _, size, digest, source in table():
        assert f"| `{name}` | {size} | {f'`{digest}`' if digest else ''} | <{source}> |" in document
