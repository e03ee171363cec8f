"""Worlds on disk: `save` a running world into a folder, `load` it, and it goes on bit for bit.

The folder holds past0.safetensors, what attention remembers (inferix_kernels.store; a guided world remembers two
pasts), and world.pt, what else the next block depends on: the state of the noise, the last latents, the words, and what
the decoder of pictures carries along; of world.pt, which torch reads without a look at its own checksums, there is a
checksum next to it, as `sha256sum` writes it. Folders of earlier versions have none and are read as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from inferix_kernels import PageTable
from inferix_kernels.files import atomic_write, locked_folder, unwritable
from inferix_kernels.store import snapshot
from inferix_kernels.store.snapshot import Snapshot

from .decode.contract import Model
from .history import Pictures
from .turns import one_at_a_time
from .world import World

VERSION = 2
PAST, STATE, CHECKSUM = "past{}.safetensors", "world.pt", "world.pt.sha256"


@one_at_a_time
@torch.inference_mode()
def save(world: World, folder: str | Path, most: int | None = None) -> None:
    """Write a world into `folder`, which must not exist yet; it appears whole or not at all. Of several ranks rank 0
    writes it, whatever each of them holds, and any number of them loads it.

    The pending clean pass is done first, so the world goes on as the loaded one will. Frames kept for `rewind` alone
    are left out.

    Args:
        most: bytes that the folder may take; None: no bound.

    Raises:
        ValueError: the world is of a kind that can not be saved, or the folder exists, is being saved by someone else,
            would take more than `most`, or can not be written. There is no such folder then, and the world goes on.
        NotFinite: pictures under way are not finite, which ends the world.
        RuntimeError: another thread is at work on the world, or it was released.
    """
    decoder, ranks, folder = world.decoder, world.ranks, Path(folder)
    _check_shared(world)
    first = _run if ranks is None else ranks.on_first
    first(lambda: _check_new(folder))
    world.pictures.check()
    if decoder.released:
        raise RuntimeError("save: this world was released, or lost as it was recached, and nothing of it is left")
    state = {
        **_identity(world),
        "prompt": world.prompt,
        **decoder.state(),
        "pictures": world.pictures.stream.state(),
    }
    pasts: Iterable[Snapshot | None] = (_past(world, table) for table in decoder.tables)
    if ranks is not None:
        pasts = list(pasts)  # all ranks have a part in it; rank 0 alone writes
    first(lambda: _write_folder(folder, pasts, state, most))


def _run(function: Callable[[], None]) -> None:
    function()


def _check_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"folder must be new, got {str(folder)!r}, which exists")


def _check_shared(world: World) -> None:
    """Raises ValueError if the ranks have other parts of this world than `snapshot` puts together."""
    if world.ranks is None:
        return
    of_tokens = type(world.model).carried is not Model.carried
    if of_tokens or world.model.branch is not None:
        why = "keys and values of each rank's tokens" if of_tokens else "each prediction on ranks of its own"
        name = world.model.adapter.name
        raise ValueError(f"save, load: a world of several ranks can't be saved or loaded with {why}, got {name}")


def _write_folder(folder: Path, pasts: Iterable[Snapshot | None], state: dict[str, Any], most: int | None) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder.with_name(f".{folder.name}.part"), "folder", folder) as part:
            for i, past in enumerate(pasts):
                assert past is not None
                past.write(part / PAST.format(i))
            with atomic_write(part / STATE, "folder") as written:
                _write(state, written)
            with atomic_write(part / CHECKSUM, "folder") as written:
                written.write_text(f"{_sha256(part / STATE)}  {STATE}\n")
            taken = sum(file.stat().st_size for file in part.iterdir())
            if most is not None and taken > most:
                raise ValueError(f"folder: {str(folder)!r} takes {taken:,} bytes, at most {most:,} are left for it")
            part.rename(folder)
    except OSError as error:
        raise unwritable(folder, error, "folder") from None


def _write(state: dict[str, Any], path: Path) -> None:
    """Through Python's file: torch's own says of a full disk no more than that writing failed."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # of an archive that could not be closed, over what the file system said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _past(world: World, table: PageTable) -> Snapshot | None:
    """Of a copy of the table, so that what only `rewind` wants can go: opening a block turns the page."""
    past = table.fork()
    try:
        past.policy = dataclasses.replace(past.policy, undo=0)
        past.open_block(world.model.adapter.block_frames)
        past.abandon()
        return snapshot.taken(past, None if world.ranks is None else world.ranks.collect)
    finally:
        past.release()


@one_at_a_time
def load(world: World, folder: str | Path) -> World:
    """The world saved in `folder`, as another one over this one's model and store, as `World.fork` makes them.

    Raises:
        ValueError: the folder holds no such world, or one of another model or format; says which. Nothing has changed.
        OutOfPages: the store has no room for one more world.
        RuntimeError: another thread is at work on this world.
    """
    _check_shared(world)
    state = read(world, folder)
    other, decoder = copy.copy(world), world.decoder.fork()
    other.decoder = decoder
    tables: list[PageTable] = []
    try:
        decoder.release()
        for i in range(len(decoder.tables)):
            tables.append(snapshot.load(world.store, Path(folder) / PAST.format(i), world.table.policy))
        ends = {table.next_frame for table in tables} | {end for _, end, _ in state["recent"][-1:]}
        if len(ends) > 1:
            raise ValueError(
                f"folder must hold one world, got {str(folder)!r}, whose parts end at frames {sorted(ends)}"
            )
        decoder.restore(tables, state)
        stream = world.model.stream()
        try:
            stream.restore(state["pictures"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"folder must hold a saved world, got {str(folder)!r} (pictures: {error!r})") from None
    except BaseException:
        for table in tables:
            table.release()
        raise
    other.pictures = Pictures(stream, world.table.policy.undo, world.model.device)
    decoder.restart = other.pictures.restart
    other.prompt = state["prompt"]
    if other.ranks is not None:
        other.ranks.add(other)
    return other


def read(world: World, folder: str | Path) -> dict[str, Any]:
    """What `folder` says of itself, if a world saved there can go on over this one's model and store: of the same
    weights, format, window, sink, precision and 8-bit layers.

    Raises:
        ValueError: as for `load`.
    """
    state = _read(Path(folder))
    # Compared as text: a tensor in a number's place is neither equal nor not.
    said = {name: (repr(state.get(name)), repr(mine)) for name, mine in _identity(world).items()}
    if wrong := [f"{name} {theirs} (here {mine})" for name, (theirs, mine) in said.items() if theirs != mine]:
        raise ValueError(f"folder must hold a world that goes on here, got {', '.join(wrong)}")
    if strange := [name for name, right in _right(world, state).items() if not right]:
        raise ValueError(f"folder must hold a saved world, got {str(folder)!r} ({STATE} has no proper {strange[0]!r})")
    return state


def _right(world: World, state: dict[str, Any]) -> dict[str, bool]:
    """What else `state` holds, by name: is it of the kind that `save` writes? A checksum can be right all the same."""
    prompt, frames, recent = state.get("prompt", 0), state.get("frames"), state.get("recent")
    opening, shots = state.get("opening"), state.get("shots") or []
    blocks = recent if isinstance(recent, list) else [None]
    return {
        "prompt": isinstance(prompt, str | None),
        "frames": type(frames) is int and frames >= 0,
        "generator": _is_generator_state(world, state.get("generator")),
        "recent": all(_is_block(world, block) for block in blocks),
        "opening": opening is None or _is_block(world, (0, 1, opening)),
        "shots": isinstance(shots, list)
        and all(type(shot) is int and shot > 0 for shot in shots)
        and shots == sorted(set(shots)),
        "carried": _is_carried(world, state.get("carried"), len(blocks)),
        "pictures": isinstance(state.get("pictures", 0), dict if world.pictures.stream.looks_back else type(None)),
    }


def _is_generator_state(world: World, state: Any) -> bool:
    try:
        torch.Generator(world.decoder.generator.device).set_state(state)
    except (TypeError, RuntimeError):
        return False
    return True


def _is_block(world: World, block: Any) -> bool:
    if not isinstance(block, tuple) or [type(part) for part in block] != [int, int, torch.Tensor]:
        return False
    first, end, latents = block
    shape = (end - first, *world.model.latent_shape)
    return 0 <= first < end and tuple(latents.shape) == shape and latents.is_floating_point()


def _is_carried(world: World, carried: Any, blocks: int) -> bool:
    """None, as in folders of earlier versions, is nothing for each block."""
    try:
        each = [None] * blocks if carried is None else carried
        return isinstance(each, list) and len([world.model.resumed(one) for one in each]) == blocks
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _identity(world: World) -> dict[str, Any]:
    """What must agree for a world to go on as another one over this one's model and store."""
    adapter, policy = world.model.adapter, world.table.policy
    return {
        "version": VERSION,
        "model": adapter.name,
        "weights": fingerprint(world.model),
        "picture": world.model.begun_with,
        "latent_shape": list(world.model.latent_shape),
        "format": policy.format,
        "window": policy.window,
        "sink": policy.sink,
        # As folders of before they were there have it, where they change nothing.
        "past_bias": policy.past_bias or None,
        "time": None if policy.time == "absolute" else policy.time,
        "precision": world.store.precision,
        "linear": world.model.linear,
        "pasts": 1 if adapter.guidance == 1 else 2,
    }


def fingerprint(model: Model) -> str:
    """Of a few numbers of every tensor of the network: cheap, and no two trainings agree in all of them."""
    digest = hashlib.sha256()
    for name, x in () if model.network is None else model.network.state_dict().items():
        some = x.detach().flatten()[:: max(1, x.numel() // 16)]
        bits = some.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode() + bits)
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    try:
        checksum = folder / CHECKSUM
        if checksum.exists() and checksum.read_text().split() != [_sha256(folder / STATE), STATE]:
            raise ValueError(f"{STATE} is not what was saved")
        state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)  # tensors and plain values, no code
        return {"version": state["version"], "precision": "auto", "linear": None, **state}  # earlier ones name none
    except Exception as error:  # what a damaged pickle raises is anyone's guess
        raise ValueError(f"folder must hold a saved world, got {str(folder)!r} ({error})") from None
