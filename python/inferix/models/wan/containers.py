"""The files that hold a network's tensors: safetensors, shards with an index, torch pickles.

What a file is, its first bytes say, whatever its name. Everything in it may be damaged or made to do harm: what does
not hold is a ValueError of one line, no index leads out of its folder, and nothing is expanded without a bound.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import re
import reprlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from inferix_kernels._install import require
from inferix_kernels.files import unwritable

ZSTD = ".zst"
SHOWN = 5  # names listed in an error
WRAPPERS = ("state_dict", "model", "module")  # names under which a trainer may file its one state dict
MARKS = {"zstd": (b"\x28\xb5\x2f\xfd",), "pickle": (b"PK\x03\x04", b"\x80")}  # a pickle may lie in a zip
POINTER = b"version https://git-lfs"
MOST_HEADER = 100_000_000  # bytes, safetensors' own limit
CHUNK = 1 << 20
MOST_SIZE, MOST_LAYERS = 1 << 20, 1 << 10  # in the config of a text encoder, a VAE or an image encoder


def read_tensors(
    path: Path, parts: Sequence[str] = (), argument: str = "weights"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, mapped rather than read where the format allows it, and its string metadata; of a pickle
    that holds several things the strings among them, and under "holds" the names of the others.

    Args:
        path: safetensors or the JSON index of shards (both may be compressed by zstd), or a torch pickle.
        parts: names of the state dicts to take, if a pickle holds several; the first that is there.
        argument: that errors name.

    Raises:
        ValueError: the file is missing or damaged, holds code, or holds none of `parts`.
        ImportError: a file is compressed and zstandard is not installed; names the extra.
    """
    header: dict[str, str] = {}
    with reading(path, "a checkpoint", argument):
        kind = _kind(path, argument)
        if kind == "pickle":
            content = _read_pickle(path, argument)
            tensors, header = _state_dict(content, parts, path, argument), _said(content)
        elif kind == "index":
            tensors = _read_shards(path, argument)
        else:
            tensors, header = _read_safetensors(path, kind, argument)
        for name, tensor in tensors.items():
            _check_plain(name, tensor)
    return tensors, header


@contextlib.contextmanager
def reading(path: Path, what: str, argument: str = "weights") -> Iterator[None]:
    """Makes one line of whatever goes wrong while the contents of a file are taken apart: it is the file's fault.

    Errors that name the argument, and memory that runs out, pass as they are.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{argument}: there is no file {error.filename or path}") from None
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, ValueError) and message.startswith(f"{argument}:"):
            raise
        reason = message[:200] or type(error).__name__
        raise ValueError(f"{argument}: {path} is damaged or not {what} ({reason})") from None


def read_json(path: Path, argument: str = "weights") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it can't be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def shown(names: Sequence[str]) -> str:
    """The first few of these names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "none"


def shape_of(
    tensors: Mapping[str, Tensor],
    name: str,
    dims: Sequence[int],
    source: str,
    what: str,
    argument: str = "weights",
) -> torch.Size:
    """The shape of a tensor that shows sizes of a network.

    Raises:
        ValueError: there is none of this name, it has not one of `dims` dimensions, or one of them is 0.
    """
    if name not in tensors:
        raise ValueError(f"{argument}: {source} is no {what}: it has no {name}")
    shape = tensors[name].shape
    if len(shape) not in dims or 0 in shape:
        count = " or ".join(map(str, dims))
        raise ValueError(
            f"{argument}: {source}: {name} must have {count} dimensions, none of them 0, got {list(shape)}"
        )
    return shape


def count_layers(names: Iterable[str], prefix: str, source: str) -> int:
    """Layers of a network whose tensors are called prefix0.*, prefix1.* and so on.

    Raises:
        ValueError: one is missing: whatever number a name holds, no network of so many layers is built for it.
    """
    numbers = {match[1] for name in names if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    if absent := [i for i in range(len(numbers)) if str(i) not in numbers]:
        raise ValueError(f"weights: {source} does not fit: {len(numbers)} layers, but no {prefix}{absent[0]}")
    return len(numbers)


def check_floating(tensors: Mapping[str, Tensor], names: Iterable[str], source: str, argument: str = "weights") -> None:
    """Weights must be numbers with a fraction, of whatever width."""
    for name in names:
        if not tensors[name].is_floating_point():
            kind = tensors[name].dtype
            raise ValueError(f"{argument}: {source}: {name} must be floating-point numbers, got {kind}")


def pretrained(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """A model of transformers or diffusers from its folder, and from nowhere else.

    Raises:
        ValueError: it can't be read, its tensors are not those of its config, or an index in it names a file elsewhere.
    """
    library = kind.__module__.partition(".")[0]
    with reading(folder, f"{what} that {library} can read"), _quiet(library):
        for index in folder.glob("*.index.json"):
            _shards(index, "weights")
        _check_sizes(read_json(folder / "config.json"), str(folder / "config.json"))
        found, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
        # What is missing they would fill with random numbers, and what is too much leave out: of a whole model that is
        # its other half, but of a model like this one its last layers.
        missing = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
        alike = {re.sub(r"\d+", "#", name) for name in found.state_dict()}
        more = [name for name in sorted(map(str, info["unexpected_keys"])) if re.sub(r"\d+", "#", name) in alike]
        if missing or more:
            raise ValueError(
                f"weights: {folder} is not {what} that {library} can read: missing {shown(missing)}, unexpected "
                f"{shown(more)}, if its config is right"
            )
    return found


def _check_sizes(config: dict[str, Any], source: str) -> None:
    """Libraries build a network of whatever size a config names, before they look at its tensors."""
    for name, value in config.items():
        most = MOST_LAYERS if re.search("layer|block", name) else MOST_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"weights: {source}: {name} must be at most {most}, got {reprlib.repr(number)}")


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Without the tables that a library prints of what it makes up: that is an error here."""
    logging = importlib.import_module(f"{library}.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _kind(path: Path, argument: str) -> str:
    """What a file is: safetensors, zstd, pickle or index."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{argument}: {path} must be a file")
    with path.open("rb") as file:
        start = file.read(64)
    if int.from_bytes(start[:8], "little") <= MOST_HEADER and start[8:9] == b"{":
        return "safetensors"
    for kind, marks in MARKS.items():
        if start.startswith(marks):
            return kind
    if start.lstrip().startswith(b"{"):
        return "index"
    if start.startswith(POINTER):
        raise ValueError(f"{argument}: {path} is a Git LFS pointer, not the file itself: `git lfs pull` brings that")
    raise ValueError(
        f"{argument}: {path} is damaged or no checkpoint: neither safetensors (or compressed by zstd), nor a torch "
        f"pickle, nor an index of shards: " + (f"it begins with {start[:16]!r}" if start else "it is empty")
    )


def _check_plain(name: object, tensor: Tensor) -> None:
    if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ValueError(f"{reprlib.repr(name)} is not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{reprlib.repr(name)} is larger than what the file holds of it")


def _read_safetensors(path: Path, kind: str, argument: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if kind == "zstd":
        # Into a file without a name: its pages are mapped as those of any other, and go when the tensors do.
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as plain:
            _expand(path, plain, argument)
            return _mapped(Path(plain.name))
    return _mapped(path)


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118, not a dict


def _expand(path: Path, plain: IO[bytes], argument: str) -> None:
    """Write what a compressed file holds: as many bytes as its own header says, or nothing."""
    zstandard = require("zstandard", "magi", f"{argument}: {path}, being compressed,")
    with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as file:
        length = int.from_bytes(head := file.read(8), "little")
        if len(head) < 8 or length > MOST_HEADER:
            raise ValueError(f"{argument}: {path} is damaged: compressed in it is no safetensors file")
        header = file.read(length)
        described = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in described.items() if name != "__metadata__"]
        left = max((end for end in ends if type(end) is int), default=0)
        free = shutil.disk_usage(os.path.dirname(plain.name)).free
        if left > free:
            where = os.path.dirname(plain.name)
            raise ValueError(f"{argument}: no space left: {path} expands to {left} bytes, of which {where} has {free}")
        try:
            plain.write(head + header)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                plain.write(chunk)
                left -= len(chunk)
            plain.flush()
        except OSError as error:
            raise unwritable(plain.name, error, argument) from None
        if left > 0 or file.read(1):
            raise ValueError(
                f"{argument}: {path} is damaged: it holds {'less' if left > 0 else 'more'} than its header says"
            )


def _read_shards(path: Path, argument: str) -> dict[str, Tensor]:
    where = _shards(path, argument)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(where.values())):
        found = [file for file in (path.parent / shard, path.parent / (shard + ZSTD)) if file.exists()]
        if not found:
            raise ValueError(f"{argument}: {path} names the shard {shard}, which is not next to it")
        with reading(found[0], "a safetensors file", argument):
            kind = _kind(found[0], argument)
            if kind not in ("safetensors", "zstd"):
                raise ValueError(
                    f"{argument}: {found[0]} must be a safetensors file, as a shard: it is of the kind {kind}"
                )
            held, _ = _read_safetensors(found[0], kind, argument)
        if twice := sorted(tensors.keys() & held.keys()):
            raise ValueError(f"{argument}: {path} names shards that hold the same tensors: {shown(twice)}")
        tensors |= held
    if absent := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{argument}: {path} names tensors that its shards do not hold: {shown(absent)}")
    return tensors


def _shards(path: Path, argument: str) -> dict[str, str]:
    """Tensor -> the file that holds it, of an index. Only files next to it are named; links there may lead anywhere, as
    they do in the cache of the Hugging Face hub."""
    where = read_json(path, argument).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{argument}: {path} is not an index of shards: it has no 'weight_map'")
    for shard in where.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or shard in (".", ".."):
            raise ValueError(f"{argument}: {path} must name files next to it, got {reprlib.repr(shard)}")
    return where


def _read_pickle(path: Path, argument: str) -> Any:
    try:
        if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:  # the format from before torch 1.6; or a name that torch takes for another's
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{argument}: {path} holds more than tensors, or is no checkpoint; it was not run") from None


def _said(content: Any) -> dict[str, str]:
    if all(isinstance(value, Tensor) for value in content.values()):
        return {}
    strings = {str(key): value for key, value in content.items() if isinstance(value, str)}
    return strings | {"holds": ", ".join(str(key) for key in content if str(key) not in strings)}


def _state_dict(content: Any, parts: Sequence[str], path: Path, argument: str) -> dict[str, Tensor]:
    """The state dict in what a pickle held: the content itself, or one of its parts."""
    for _ in range(3):  # e.g. {"generator": {"model": {...}}}
        if not isinstance(content, dict):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = [part for part in (*parts, *WRAPPERS) if isinstance(content.get(part), dict)]
        if not inner:
            wanted = f"tensors, or one of {', '.join(parts)}" if parts else "tensors"
            raise ValueError(f"{argument}: {path} must hold {wanted}, got {shown(sorted(map(str, content)))}")
        content = content[inner[0]]
    raise ValueError(f"{argument}: {path} must hold a dictionary of tensors, got {type(content).__name__}")
