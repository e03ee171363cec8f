"""Faults that long videos have, put into clips, and which measures move for them.

`python -m tests.evaluate.faults [VIDEO START]` prints the tables of docs/quality.md: of 120 frames of a video from
START on, of the synthetic clip, and of the tiny world.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import av
import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from inferix.evaluate.drift import anchored, consistency, drift
from inferix.evaluate.metric import registered
from inferix.models.tiny.measures import true_video

CHUNKS = 10
Clip = np.ndarray  # uint8 [T, H, W, 3]
MEASURES = (
    *("proxy:clarity", "proxy:motion", "proxy:dynamic", "proxy:colourfulness", "proxy:contrast", "proxy:exposure"),
    *("proxy:background", "proxy:background:anchored", "proxy:subject", "proxy:subject:anchored"),
)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Three planes of noise with amplitudes of 1 / frequency, as pictures have them: uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    planes = np.stack([np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency) for _ in range(3)], -1)
    return (128 + 40 * planes / planes.std()).clip(0, 255).astype(np.uint8)


def synthetic(frames: int = 120, height: int = 72, width: int = 128) -> Clip:
    """A camera that pans evenly, and a ball before it that sways once in each chunk."""
    place = texture(np.random.default_rng(0), height, width + frames)
    made = np.stack([place[:, t : t + width] for t in range(frames)])
    for t, frame in enumerate(made):
        draw(frame, t / frames, ball)
    return made


def tiny(frames: int = 120) -> Clip:
    """The tiny world's simulator: a room of one theme."""
    return true_video(3, frames, change_every=10**6).frames


def draw(frame: np.ndarray, when: float, picture: Callable[[int], np.ndarray]) -> None:
    """Put a subject into a frame, where it is at a time of 0 to 1."""
    side = min(frame.shape[:2]) // 3
    drawn = picture(side)
    y, x = frame.shape[0] // 3, int((0.5 + 0.05 * np.sin(2 * np.pi * CHUNKS * when)) * (frame.shape[1] - side))
    inside = drawn.any(-1)
    frame[y : y + side, x : x + side][inside] = drawn[inside]


def disc(side: int, shade: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """A red disc whose brightness is `shade(y, x)`, y and x from -0.5 to 0.5."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    red = shade(y, x).astype(np.uint8)
    return np.where(np.hypot(y, x)[..., None] < 0.5, np.stack([red, red // 3, red // 4], -1), 0).astype(np.uint8)


def ball(side: int) -> np.ndarray:
    return disc(side, lambda y, x: 220 - 160 * np.hypot(y + 0.2, x + 0.2))


def striped(side: int) -> np.ndarray:
    return disc(side, lambda y, x: np.where(np.floor(8 * (x + y)) % 2, 220, 110))


def growing(clip: Clip, change: Callable[[np.ndarray, float], np.ndarray]) -> Clip:
    """`change(frame, how much)`, from nothing in the first chunk to 1 in the last frame."""
    first = len(clip) // CHUNKS
    much = np.clip((np.arange(len(clip)) - first) / (len(clip) - 1 - first), 0, 1)
    return np.stack([change(frame.astype(np.float32), a).clip(0, 255).astype(np.uint8) for frame, a in zip(clip, much)])


def blur(clip: Clip) -> Clip:
    def change(frame: np.ndarray, much: float) -> np.ndarray:
        planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
        soft = avg_pool2d(planes, 5, 1, 2, count_include_pad=False)[0].permute(1, 2, 0).numpy()
        return frame + much * (soft - frame)

    return growing(clip, change)


def noise(clip: Clip) -> Clip:
    rng = np.random.default_rng(1)
    return growing(clip, lambda frame, much: frame + rng.normal(0, 25 * much + 1e-9, frame.shape))


def oversaturation(clip: Clip) -> Clip:
    def change(frame: np.ndarray, much: float) -> np.ndarray:
        grey = frame.mean(-1, keepdims=True)
        return grey + (1 + much) * (frame - grey)

    return growing(clip, change)


def freeze(clip: Clip) -> Clip:
    """From the middle on."""
    half = len(clip) // 2
    return np.concatenate([clip[:half], np.repeat(clip[half - 1 : half], len(clip) - half, 0)])


def jitter(clip: Clip) -> Clip:
    """From the middle on the camera shakes by up to a thirtieth of its picture."""
    rng, half = np.random.default_rng(2), len(clip) // 2
    reach = max(2, clip.shape[1] // 30)
    shaken = [np.roll(frame, tuple(rng.integers(-reach, reach + 1, 2)), (0, 1)) for frame in clip[half:]]
    return np.concatenate([clip[:half], np.stack(shaken)])


def swap(clip: Clip) -> Clip:
    """From the middle on, where two chunks meet, there is another subject in place of the first one."""
    swapped = clip.copy()
    for t, frame in enumerate(swapped):
        draw(frame, t / len(clip), ball if t < len(clip) // 2 else striped)
    return swapped


def cut(clip: Clip) -> Clip:
    """Once, at a border of chunks, everything is elsewhere: the picture is turned about."""
    at = 7 * len(clip) // CHUNKS
    return np.concatenate([clip[:at], clip[at:, ::-1, ::-1]])


FAULTS: dict[str, Callable[[Clip], Clip]] = {
    each.__name__: each for each in (blur, noise, oversaturation, freeze, jitter, swap, cut)
}


def slopes(clip: Clip, names: Sequence[str] = MEASURES) -> dict[str, float]:
    """The slopes of measures over the clip's chunks."""
    length = len(clip) // CHUNKS
    parts = [clip[i * length : (i + 1) * length] for i in range(CHUNKS)]
    found = {}
    for name, metric in registered().items():
        if not {name, name + ":anchored"} & set(names):
            continue
        scored = [metric.score(part, None) for part in parts]
        if metric.embeds:
            found[name] = drift([consistency(each) for each in scored]).slope
            found[name + ":anchored"] = drift(anchored(scored)).slope
        else:
            found[name] = drift(scored).slope
    return {name: found[name] for name in names}


def cuts(clip: Clip) -> float:
    metric = registered()["proxy:cuts"]
    height, width = metric.size
    planes = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(planes, (height, width), mode="area").permute(0, 2, 3, 1)
    return metric.score(small.numpy().round().astype(np.uint8), None)


def read(path: str, start: int, frames: int = 120) -> Clip:
    with av.open(path) as container:
        decoded = itertools.islice(container.decode(video=0), start, start + frames)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def table(clip: Clip) -> list[tuple[str, ...]]:
    lines = []
    for name, change in {"none": lambda same: same, **FAULTS}.items():
        faulty = change(clip)
        lines.append((name, *(f"{slope:+.1%}" for slope in slopes(faulty).values()), f"{cuts(faulty):.0f}"))
    return lines


def main(words: Sequence[str]) -> None:
    real = [(path, read(path, int(start))) for path, start in zip(words[::2], words[1::2])]
    for name, clip in (*real, ("synthetic", synthetic()), ("tiny", tiny())):
        print(f"{name}, {len(clip)} frames of {clip.shape[2]}x{clip.shape[1]}")
        for line in (("fault", *(each.removeprefix("proxy:") for each in MEASURES), "cuts"), *table(clip)):
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
