"""What a static layer's inputs are like, seen while a prepared model runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import atomic_write, unwritable
from ..reference.codecs import AMAX_FLOOR, LARGEST
from .qconfig import Profile


class Observer(nn.Module):
    """The largest |number| of all inputs of a layer; with a profile, also a sample of their numbers.

    Attributes:
        amax: [] float32; below 0 while nothing has been seen.
    """

    amax: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device, profile: Profile | None = None):
        super().__init__()
        self.dtype, self.profile = dtype, profile
        self.register_buffer("amax", torch.full((), -1.0, device=device))
        self.sample = Sample(profile) if profile is not None else None

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        if x.numel():
            largest = x.detach().abs().amax().float()
            self.amax.copy_(torch.maximum(self.amax, largest.to(self.amax.device)))
            if self.sample is not None:
                self.sample.add(x)

    def missing(self) -> str:
        """Why there is no scale: "" if there is one."""
        amax = float(self.amax)
        if amax < 0:
            return "its calibration was never run: call the prepared model"
        return "" if amax < float("inf") else "its calibration saw NaN or infinity"

    def scale(self) -> Tensor:
        """[1] float32, of codes."""
        return (self.amax.float().clamp(min=AMAX_FLOOR) / LARGEST[self.dtype]).view(1)


class Sample:
    """At most `max_sample_num` of the numbers seen, each as likely as any other."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self.numbers, self.keys = torch.empty(0), torch.empty(0)
        self.random = torch.Generator().manual_seed(20250806)
        self.shape: list[int] = []

    def add(self, x: Tensor) -> None:
        """Every number draws a key, and those with the largest keys stay."""
        new = x.detach().float().cpu().flatten()
        self.shape = list(x.shape)
        self.numbers = torch.cat([self.numbers, new])
        self.keys = torch.cat([self.keys, torch.rand(len(new), generator=self.random)])
        if len(self.keys) > self.profile.max_sample_num:
            self.keys, kept = self.keys.topk(self.profile.max_sample_num)
            self.numbers = self.numbers[kept]

    def summary(self) -> dict[str, Any]:
        x = self.numbers
        low, high = float(x.min()), float(x.max())
        counts = torch.histc(x, self.profile.bins, low, high).long().tolist()
        moments = {"mean": float(x.mean()), "std": float(x.std(correction=0))}
        return {"shape": self.shape, "numbers": len(x), **moments, "min": low, "max": high, "counts": counts}


def write_profiles(layers: Mapping[str, nn.Module]) -> None:
    """Of layers by their names: those with a profile in distribution.json of its folder, inputs and weight of each.

    Raises:
        ValueError: a file can not be written.
    """
    folders: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, layer in layers.items():
        observer = getattr(layer, "activation_post_process", None)
        if not isinstance(observer, Observer) or observer.profile is None or observer.sample is None:
            continue
        weight = Sample(observer.profile)
        weight.add(layer.weight)  # type: ignore[arg-type]
        found = {"activation": observer.sample.summary(), "weight": weight.summary()}
        folders[observer.profile.output_dir][name] = found
    for folder, found in folders.items():
        path = Path(folder) / "distribution.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error, "output_dir") from None
        with atomic_write(path, "output_dir") as part:
            part.write_text(json.dumps(found, indent=1) + "\n")


def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook that `prepare` puts before a layer's forward."""
    layer.activation_post_process(args[0] if args else next(iter(kwargs.values())))  # type: ignore[operator]


def attach(layer: nn.Module, dtype: torch.dtype, device: torch.device, profile: Profile | None) -> None:
    """Once: a layer that is prepared again keeps what it has seen."""
    if not isinstance(getattr(layer, "activation_post_process", None), Observer):
        layer.activation_post_process = Observer(dtype, device, profile)
        layer.register_forward_pre_hook(observe, prepend=True, with_kwargs=True)


def detach(layer: nn.Module) -> None:
    if isinstance(getattr(layer, "activation_post_process", None), Observer):
        del layer.activation_post_process
    for number in [number for number, hook in layer._forward_pre_hooks.items() if hook is observe]:
        del layer._forward_pre_hooks[number]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)
