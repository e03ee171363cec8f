"""Numbers that are no numbers: found with the pictures of a block, and traced to the layer that they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inferix_kernels import profile

if TYPE_CHECKING:
    from .facts import Facts


class NotFinite(ValueError):
    """A block that holds NaN or infinity; says where they first appear. Its world has ended."""


def to_bytes(pictures: Tensor) -> np.ndarray:
    """Pictures in [-1, 1], what lies outside being cut off, as uint8 on the host.

    Raises:
        NotFinite: a number is NaN or infinite, which would look like black or white. It is known with the pictures:
            a GPU is waited for once.
    """
    finite = torch.isfinite(pictures).all()
    made: np.ndarray = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    if not finite:
        raise NotFinite("pictures are not finite: the decoder of pictures made NaN or infinity of latents")
    return made


def shown(world: Facts, conditioning: Any) -> np.ndarray:
    """The pictures of the block that a world has just made, under `conditioning`.

    Raises:
        NotFinite: the block or its pictures are not finite. It has been run again, watched, to say where that begins,
            and the world is released.
    """
    decoder, latents = world.decoder, world.latents
    finite = torch.isfinite(latents).all()  # read once the pictures are there: no wait of its own
    where = ""
    try:
        with profile.timed("pictures"):
            pictures = world.pictures(latents[: decoder.finished])
    except NotFinite:
        where = "what the decoder of pictures gives"
    if not finite:
        where = _traced(world, conditioning)
    if not where:
        return pictures
    end = world.frames + world.ahead
    world.decoder.release()
    raise NotFinite(
        f"latent frames {max(0, end - len(latents))} to {end - 1} of {world.model.adapter.name} are not "
        f"finite, first in {where}"
    )


def _traced(world: Facts, conditioning: Any) -> str:
    where = "what guidance and sampler make of what the network gives"
    with Probe(world.model.network) as probe:
        try:
            world.decoder.repeat(conditioning)
        except Exception as error:  # it is to be said what went wrong before, in any case
            where = f"the block, which could not be run again ({error})"
    where, damaged = probe.first or where, probe.damaged
    if damaged:
        where += f" (weights that are not: {', '.join(damaged[:3])}{', ...' if damaged[3:] else ''})"
    return where


class Probe:
    """While it is entered, every layer of a network is watched.

    Attributes:
        first: the first layer that gave, or was given, a number that is not finite; None: there was none.
    """

    def __init__(self, network: torch.nn.Module | None):
        self.first: str | None = None
        self._network = torch.nn.Module() if network is None else network
        self._hooks: list[Any] = []

    def __enter__(self) -> Probe:
        for name, module in self._network.named_modules():
            name = name or "the network"
            self._hooks.append(module.register_forward_pre_hook(self._watch(f"what {name} is given"), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._watch(f"what {name} gives")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def damaged(self) -> list[str]:
        """Names of the weights that are not finite themselves."""
        return [name for name, x in self._network.state_dict().items() if not _finite(x)]

    def _watch(self, what: str) -> Any:
        def watch(module: torch.nn.Module, *passed: Any) -> None:
            # Of a forward hook's (inputs, outputs) the outputs, of a pre-hook's (args, kwargs) both.
            seen = passed[-1:] if what.endswith("gives") else passed
            if self.first is None and not all(map(_finite, _tensors(seen))):
                self.first = what

        return watch


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x.float()).all())
