"""The registry of metrics: what scores a chunk of a video, what it needs, and how to read what it says."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from inferix_kernels._install import install

from .weights import WeightsDir

KINDS = ("real", "proxy")
PROXY = "proxy:"  # begins the name of every metric that stands in for one that needs weights
PROVIDERS = ("published", "perceptual", "proxies")  # modules of this package that register metrics

Score = Callable[[np.ndarray, WeightsDir], "float | np.ndarray"]


@dataclass(frozen=True)
class Metric:
    """A metric and what is known of it.

    Attributes:
        name: as it is shown; a proxy's begins with "proxy:".
        score: (frames uint8 [T, H, W, 3] RGB, weights) -> a number; with `embeds`, float [T, D], a row for each frame.
        needs: names of the weight files that it loads.
        kind: "real", or "proxy" for what stands in where no weights can be had.
        better: "higher" or "lower" if more or less of it is better; "same" if it is to stay as it is.
        sees: what `frames` holds: "chunk", consecutive frames of one chunk, and VDE is taken over the chunks; or
            "video", every frame of the video, at `size`, and there is one number for the video.
        embeds: `score` gives embeddings. A chunk's number is then their consistency, as VBench defines it (see
            `drift.consistency`), and a second one, NAME:anchored, how like the first chunk it is (`drift.anchored`).
        least: frames that it must be given.
        size: (height, width) that frames are scaled to, of a metric that sees the whole video.
        default: computed unless metrics are named.
        packages: modules that it imports and that the base install lacks.
        about: what it measures: the first line of the function's docstring.
    """

    name: str
    score: Score
    needs: tuple[str, ...] = ()
    kind: Literal["real", "proxy"] = "real"
    better: Literal["higher", "lower", "same"] = "higher"
    sees: Literal["chunk", "video"] = "chunk"
    embeds: bool = False
    least: int = 1
    size: tuple[int, int] | None = None
    default: bool = True
    packages: tuple[str, ...] = ()
    about: str = ""


METRICS: dict[str, Metric] = {}  # by name; `registered` fills it


def metric(
    name: str,
    *,
    needs: Sequence[str] = (),
    kind: Literal["real", "proxy"] = "real",
    better: Literal["higher", "lower", "same"] = "higher",
    sees: Literal["chunk", "video"] = "chunk",
    embeds: bool = False,
    least: int = 1,
    size: tuple[int, int] | None = None,
    default: bool = True,
    packages: Sequence[str] = (),
) -> Callable[[Score], Score]:
    """Register a function as a metric; the arguments are the fields of `Metric`.

    Raises:
        ValueError: there is a metric of this name, the name already says what `kind` adds, or `size` does not go with
            what the metric sees.

    Example:
        >>> @metric("brightness", kind="proxy", better="same")
        ... def brightness(frames, weights):
        ...     "Mean brightness of all pixels, 0 to 255."
        ...     return float(frames.mean())
        >>> METRICS["proxy:brightness"].about
        'Mean brightness of all pixels, 0 to 255.'
        >>> del METRICS["proxy:brightness"]
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if name.startswith(PROXY):
        raise ValueError(f"name must be without {PROXY!r}, which kind='proxy' adds, got {name!r}")
    if (sees == "video") != (size is not None):
        raise ValueError(f"size must be given with sees='video', and only then, got {size} with sees={sees!r}")
    shown = PROXY + name if kind == "proxy" else name

    def register(score: Score) -> Score:
        if shown in METRICS:
            raise ValueError(f"name must be of no other metric, got {shown!r}")
        about = (score.__doc__ or "").strip().partition("\n")[0]
        METRICS[shown] = Metric(
            shown, score, tuple(needs), kind, better, sees, embeds, least, size, default, tuple(packages), about
        )
        return score

    return register


def lacking(packages: Sequence[str]) -> str:
    """Why what imports these modules can not be computed here, and what to install; "" if it can.

    Example:
        >>> lacking(["numpy"]), lacking(["no_such_module"])[:37]
        ('', 'needs no_such_module, which is not in')
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"needs {package}, which is not installed: {install('evaluate')}"
    return ""


def registered() -> dict[str, Metric]:
    """Every metric by its name, those of all modules of this package."""
    for module in PROVIDERS:
        importlib.import_module(f".{module}", __package__)
    return METRICS
