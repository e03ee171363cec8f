"""The dicts that a pipeline hands to its model, and what stands in them for the tensors."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._check import shown
from ..._dispatch import Unsupported
from .contract import Contract
from .world import DTYPES, Options, World

Cache = MutableMapping[str, Any]  # of one layer
ENDS = ("global_end_index", "local_end_index")
PINS = ("pinned_start", "pinned_len")


class CacheView:
    """k or v of one layer's dict: as much of a tensor [B, S, H, D] as a pipeline asks of it, without its memory.

    Reading (`view[:, :60]`) copies what the pages hold, for looking at.
    """

    def __init__(self, world: World, layer: int, side: int):
        self.world, self.layer, self.side = world, layer, side

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.world.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.world.dtype

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def nbytes(self) -> int:
        """Its share of the pages, which k and v of all layers, and all worlds, have together."""
        return self.world.nbytes // (2 * self.world.layers * self.world.options.worlds)

    def zero_(self) -> CacheView:
        """What was held is gone, in k and v of all layers: it must be written before it is read again."""
        self.world.erase()
        return self

    def __getitem__(self, index: Any) -> Tensor:
        return self.world.dense(self.layer)[self.side][index]


def adopt(caches: Sequence[Cache], contract: Contract, options: Options) -> None:
    """Put pages in the place of the tensors of these dicts, which are freed if nothing else refers to them.

    Raises:
        ValueError, Unsupported: they are not what the contract says; nothing was changed.
    """
    if not isinstance(caches, Sequence) or not caches or not all(isinstance(each, MutableMapping) for each in caches):
        raise ValueError(f"kv_cache must be a list of a dict for each layer, got {shown(caches):.80}")
    for cache in caches:
        _check_dict(cache, contract)
    sides = [(cache["k"], cache["v"]) for cache in caches]
    views = [view for pair in sides for view in pair if isinstance(view, CacheView)]
    if views:
        whole = [(views[0].world, layer, side) for layer in range(len(caches)) for side in (0, 1)]
        if [(view.world, view.layer, view.side) for view in views] != whole:
            raise ValueError("kv_cache must be dicts that were made together, in their order: make all of them anew")
        return
    first = sides[0][0]
    for layer, pair in enumerate(sides):
        for name, x in zip("kv", pair):
            if not isinstance(x, Tensor) or x.ndim != 4:
                raise ValueError(f"kv_cache[{layer}][{name!r}] must be a tensor [B, S, H, D], got {shown(x):.80}")
            if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"kv_cache[{layer}][{name!r}] must be as the first one, {list(first.shape)} {first.dtype} on "
                    f"{first.device}, got {list(x.shape)} {x.dtype} on {x.device}"
                )
    if first.dtype not in DTYPES:
        raise Unsupported(f"kv_cache must be float32, bfloat16 or float16, got {first.dtype}")
    world = World(len(caches), first.shape, first.dtype, first.device, options)
    for layer, cache in enumerate(caches):
        cache["k"], cache["v"] = (CacheView(world, layer, side) for side in (0, 1))


def _check_dict(cache: Mapping[str, Any], contract: Contract) -> None:
    wanted = {"k", "v", *(ENDS if contract.ends else ())}
    if missing := sorted(wanted - cache.keys()):
        raise ValueError(f"kv_cache must have {', '.join(missing)}, as {contract.repositories} has, got {list(cache)}")
    if contract.ends is None and (more := [name for name in ENDS if name in cache]):
        raise ValueError(f"kv_cache must not have {', '.join(more)}: this is not {contract.repositories}' attention")
    for name, value in contract.cache_only.items():
        if name in cache and int(cache[name]) != value:
            raise Unsupported(f"kv_cache[{name!r}] must be {value}, got {int(cache[name])}")


def ends_of(cache: Cache, contract: Contract, start: int) -> tuple[int, int]:
    """(made, held), in tokens."""
    return _numbers(cache, ENDS) if contract.ends else (start, start)


def pins_of(cache: Cache, contract: Contract) -> tuple[int, int]:
    """(first token, how many) of what is pinned; none are if that is (0, 0)."""
    first, count = _numbers(cache, PINS) if contract.pins and PINS[0] in cache else (0, 0)
    return (first, count) if first >= 0 and count > 0 else (0, 0)


def _numbers(cache: Cache, names: tuple[str, str]) -> tuple[int, int]:
    """They move to host memory, so that reading them waits for no device."""
    for name in names:
        if isinstance(cache[name], Tensor) and cache[name].device.type != "cpu":
            cache[name] = cache[name].cpu()
    first, second = (int(cache[name]) for name in names)
    return first, second


def set_ends(cache: Cache, contract: Contract, ends: tuple[int, int]) -> None:
    for name, end in zip(ENDS if contract.ends else (), ends):
        if contract.ends is Tensor:
            cache[name].fill_(end)
        else:
            cache[name] = end


def fork(kv_cache: Sequence[Cache]) -> list[dict[str, Any]]:
    """Another list of dicts with the same contents: it shares all pages, and pays for what becomes different.

    A pipeline goes on from it as from the original: a rollback is to go on from a fork made before.

    Args:
        kv_cache: that a patched model has been called with. Its `patch` must have been told of so many `worlds`.

    Raises:
        ValueError: kv_cache is another one.

    Example:
        >>> kv_cache = [{"k": torch.zeros(1, 60, 2, 16), "v": torch.zeros(1, 60, 2, 16)}]
        >>> try:
        ...     fork(kv_cache)
        ... except ValueError as error:
        ...     print(error)
        kv_cache must be one that a patched model has been called with, got dense tensors
    """
    views = [cache["k"] for cache in kv_cache]
    if not views or not all(isinstance(view, CacheView) for view in views):
        raise ValueError("kv_cache must be one that a patched model has been called with, got dense tensors")
    world = views[0].world.fork()
    copied = [{name: x.clone() if isinstance(x, Tensor) else x for name, x in cache.items()} for cache in kv_cache]
    for layer, cache in enumerate(copied):
        cache["k"], cache["v"] = (CacheView(world, layer, side) for side in (0, 1))
    return copied
