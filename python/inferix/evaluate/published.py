"""The five metrics of VBench whose drift LV-Bench (InterVBench) reports, on networks whose weights the user has.

What they compute is vbench 0.1.5's and LV-Bench/metrics.py's, whose scores these are comparable with; which file each
needs is in weights.py. Two things differ, and change no score: frames are treated in batches, and CLIP computes in
float32 where the published tool on a GPU computes in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .backbones import amt, clip, dino, musiq
from .backbones.pixels import for_clip, for_dino, for_musiq, planes
from .metric import metric
from .weights import WeightsDir

BATCH = 4  # frames that are in a network at a time

_NETWORKS: dict[str, Callable[[Path], nn.Module]] = {
    "musiq_spaq_ckpt-358bb6af.pth": musiq.load,
    "amt-s.pth": amt.load,
    "ViT-L-14.pt": clip.vit_l_14,
    "sa_0_4_vit_l_14_linear.pth": clip.aesthetic_head,
    "ViT-B-32.pt": clip.vit_b_32,
    "dino_vitbase16_pretrain.pth": dino.load,
}


def network(weights: WeightsDir, name: str) -> Callable[..., torch.Tensor]:
    """The network of a weight file, on the weights' device: tensors on the CPU to tensors on the CPU, no gradients.

    Raises:
        ValueError: one line: the file is missing, is not the published one, or holds another network.
    """
    device = weights.device
    module = weights.loaded(name, lambda path: _NETWORKS[name](path).to(device))

    @torch.inference_mode()
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return module(*(value.to(device) for value in inputs)).cpu()

    return run


def batches(frames: np.ndarray) -> Iterator[np.ndarray]:
    """frames [T, H, W, 3] in parts of at most BATCH."""
    for start in range(0, len(frames), BATCH):
        yield frames[start : start + BATCH]


@metric("clarity", needs=["musiq_spaq_ckpt-358bb6af.pth"])
def clarity(frames: np.ndarray, weights: WeightsDir) -> float:
    """Technical quality of single frames by MUSIQ trained on SPAQ, 0 to 100: mean over frames.

    VBench calls it imaging quality and divides it by 100. A frame whose longer side is over 512 is scaled down to it.
    """
    run = network(weights, "musiq_spaq_ckpt-358bb6af.pth")
    return float(torch.cat([run(for_musiq(part)) for part in batches(frames)]).mean())


@metric("aesthetic", needs=["ViT-L-14.pt", "sa_0_4_vit_l_14_linear.pth"])
def aesthetic(frames: np.ndarray, weights: WeightsDir) -> float:
    """Aesthetic quality of single frames by LAION's head on CLIP ViT-L/14, over 10: mean over frames."""
    image, head = network(weights, "ViT-L-14.pt"), network(weights, "sa_0_4_vit_l_14_linear.pth")
    scores = [head(F.normalize(image(for_clip(part)), dim=-1)) for part in batches(frames)]
    return float(torch.cat(scores).mean()) / 10


@metric("background", needs=["ViT-B-32.pt"], embeds=True, least=2)
def background(frames: np.ndarray, weights: WeightsDir) -> np.ndarray:
    """How alike the frames are to CLIP ViT-B/32: its embeddings [T, 512], of the middle square of each frame."""
    run = network(weights, "ViT-B-32.pt")
    return torch.cat([run(for_clip(part)) for part in batches(frames)]).numpy()


@metric("subject", needs=["dino_vitbase16_pretrain.pth"], embeds=True, least=2)
def subject(frames: np.ndarray, weights: WeightsDir) -> np.ndarray:
    """How alike the frames are to DINO ViT-B/16: its embeddings [T, 768], of whole frames, the shorter side at 224."""
    run = network(weights, "dino_vitbase16_pretrain.pth")
    return torch.cat([run(for_dino(part)) for part in batches(frames)]).numpy()


@metric("motion", needs=["amt-s.pth"], least=3)
def motion(frames: np.ndarray, weights: WeightsDir) -> float:
    """Smoothness of motion: how well AMT-S guesses odd frames from their even neighbours, 0 to 1.

    (255 - mean |frame - guess|) / 255 over all pixels and the odd frames that have two neighbours; the guess is rounded
    down to uint8. Frames are padded to multiples of 16 by repeating their edges.

    Raises:
        ValueError: a side is under 113 pixels: AMT-S correlates frames at 1/64 of their size, and needs two places.
    """
    height, width = frames.shape[1:3]
    below, beside = (-side % 16 for side in (height, width))
    if min(height + below, width + beside) < amt.LEAST:
        raise ValueError(
            f"frames must be at least {amt.LEAST - 15} pixels high and wide for motion, got {height} x {width}"
        )
    run = network(weights, "amt-s.pth")
    pads = (beside // 2, beside - beside // 2, below // 2, below - below // 2)
    off = []
    for at in range(0, len(frames) - 2, 2):
        first, second = (F.pad(planes(frames[i : i + 1]) / 255, pads, mode="replicate") for i in (at, at + 2))
        guess = run(first, second)[0, :, pads[2] : pads[2] + height, pads[0] : pads[0] + width]
        shown = (guess * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        off.append(np.abs(frames[at + 1].astype(np.int16) - shown).mean())
    return (255 - float(np.mean(off))) / 255
