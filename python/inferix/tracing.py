"""NaN and infinity: found in a block that was made, and traced to the layer that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from inferix_kernels import profile

from .facts import Facts
from .finite import NotFinite
from .history import Coming
from .trees import branches_of


def shown(world: Facts, before: int, conditioning: Any) -> Coming:
    """Begin to decode the pictures of the block that a world has just made, under `conditioning`.

    Args:
        before: frames that the world had before it.

    Raises:
        NotFinite: the block is not finite. It has been run again, watched, to say where that begins. Or the pictures of
            the block before are not.
    """
    decoder, latents = world.decoder, world.latents
    world.pictures.check()
    finite = torch.isfinite(latents).all()
    end = world.frames + world.ahead
    frames = f"latent frames {max(0, end - len(latents))} to {end - 1} of {world.model.adapter.name}"
    coming = world.pictures.begin(latents[: decoder.finished], before, frames)
    with profile.timed("finite check"):  # a GPU is waited for once: until the block is made, not until it is decoded
        whole = bool(finite)
    if not whole:
        coming.wait()
        raise NotFinite(f"{frames} are not finite, first in {_traced(world, conditioning)}")
    return coming


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
    for _, each in branches_of(value) or ():
        yield from _tensors(each)


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x.float()).all())
