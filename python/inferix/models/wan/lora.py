"""Low-rank updates of a network's weights: which tensors they are for, and how strong they are.

    W + strength * scale * B A        scale = alpha / rank, or alpha / sqrt(rank) of rank-stabilised ones

Read: the names of PEFT (lora_A, lora_B), of kohya's trainers (lora_down, lora_up; in musubi-tuner's own files a
module's dots are underscores) and of diffusers; whole differences as well (diff of a weight, diff_b of a bias). The
alpha is a module's own tensor or, for all modules, in the header (PEFT's settings as diffusers writes them, lora_alpha,
ss_network_alpha) or in PEFT's adapter_config.json. Where nothing says it, it is the rank.

Source: arXiv:2106.09685 and arXiv:2312.03732; key names of github.com/huggingface/peft, of huggingface/diffusers
(loaders/lora_conversion_utils.py, utils/peft_utils.py) and of kohya-ss/musubi-tuner.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .containers import read_json, read_tensors, shown
from .names import PACKED, published, thirds

SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin")
ADAPTER = "adapter_model"  # PEFT's name for the file of updates; its settings lie next to it
CONFIG, HEADER = "adapter_config.json", "lora_adapter_metadata"
UPDATE = re.compile(
    r"^(?P<module>.+?)\.(lora_(?P<side>A|B|down|up)(\.(?!weight$|bias$)\w+)?(\.(?P<leaf>weight|bias))?"
    r"|(?P<other>alpha|diff|diff_b))$"
)
ROLES = {"A": "A", "down": "A", "B": "B", "up": "B"}
WRAPPER = re.compile(r"^(base_model\.model|transformer|diffusion_model)\.")
FLAT = "lora_unet_"
# Other ways to begin a LoRA, such as PiSSA's, change the weights it belongs to as well.
KNOWN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

Lora = str | Path | Sequence[str | Path] | None  # files or folders of PEFT's; "FILE=0.8" gives the strength


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a file says about all its updates.

    Attributes:
        source: where it says so.
        fields: PEFT's: lora_alpha, r, use_rslora, alpha_pattern, rank_pattern.
    """

    source: str
    fields: Mapping[str, Any]

    def scale(self, module: str, rank: int, own: float | None = None) -> float:
        """Of the module with this name, as the file has it; `own` is the alpha that lies next to its matrices."""
        wanted = self._of("rank_pattern", "r", module)
        if wanted is not None and wanted != rank:
            raise ValueError(f"lora: {self.source} says that {module} has rank {wanted:g}, got {rank}")
        alpha = self._of("alpha_pattern", "lora_alpha", module) if own is None else own
        stable = self.fields.get("use_rslora") in (True, "True", "true", "1")
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if stable else rank)

    def _of(self, pattern: str, default: str, module: str) -> float | None:
        patterns = self.fields.get(pattern) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"lora: {self.source}: {pattern} must be an object, got {reprlib.repr(patterns)}")
        value = self.fields.get(default)
        for name, special in patterns.items():
            try:
                if re.match(rf"(.*\.)?({name})$", WRAPPER.sub("", module)):
                    value = special
                    break
            except re.error as error:
                raise ValueError(
                    f"lora: {self.source}: {pattern} has no pattern in {reprlib.repr(name)} ({error})"
                ) from None
        return None if value is None else number(value, f"{self.source}: {default}")


@dataclasses.dataclass(frozen=True)
class Update:
    """What is added to one tensor, or to a third of it, factor * b @ a; without a, factor * b."""

    tensor: str
    third: int | None
    factor: float
    b: Tensor
    a: Tensor | None = None

    def add_to(self, weight: Tensor) -> None:
        target = weight if self.third is None else weight.chunk(3)[self.third]
        delta = self.b.float() if self.a is None else self.b.float().flatten(1) @ self.a.float().flatten(1)
        delta = self.factor * delta.view_as(target)
        if not torch.isfinite(delta).all():
            raise ValueError(f"lora: what is added to {self.tensor} must be finite, got NaN or infinity")
        target += delta


def find_lora(folder: str | Path) -> Path | None:
    """The file with low-rank updates that lies in a folder, if one does.

    Raises:
        ValueError: several do.
    """
    found = sorted(file for file in Path(folder).glob("*") if file.suffix in SUFFIXES and is_lora(file))
    if len(found) > 1:
        raise ValueError(f"lora: {folder} holds several ({', '.join(file.name for file in found)}): name one")
    return found[0] if found else None


def is_lora(file: Path) -> bool:
    return "lora" in file.name.lower() or file.stem == ADAPTER


def named(lora: Lora) -> list[tuple[Path, float]]:
    """(file, strength) of each that was asked for.

    Raises:
        ValueError: there is no such file, or a strength is no finite number.
    """
    found = []
    for given in [] if lora is None else [lora] if isinstance(lora, str | Path) else lora:
        path, strength = Path(given), 1.0
        if not path.exists():
            file, equals, text = str(given).rpartition("=")
            if equals:
                path, strength = Path(file), number(text, f"the strength of {file}")
        if path.is_dir():
            file_there = find_lora(path)
            if file_there is None:
                raise ValueError(f"lora: {path} holds no file of updates, {ADAPTER}.safetensors or *lora*")
            path = file_there
        elif not path.exists():
            raise ValueError(f"lora: there is no file {path}")
        found.append((path, strength))
    return found


def number(value: object, what: str) -> float:
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result) or isinstance(value, bool):
        raise ValueError(f"lora: {what} must be a finite number, got {reprlib.repr(value)}")
    return result


def merge(tensors: dict[str, Tensor], lora: Lora, dtype: torch.dtype, parts: Sequence[str] = ()) -> None:
    """Add low-rank updates to the weights they are for, in float32, and round once.

    Args:
        tensors: under published names, q, k and v apart or packed; changed in place.
        lora: see `Lora`.
        dtype: that the sums are rounded to, whatever that of the file: 8 bits would lose what is added.
        parts: names of state dicts that a pickle may hold them under.

    Raises:
        ValueError: an update has no weight to go to, half of it is missing, or what the file says of its strength is
            nonsense; nothing has been merged. What is added is not finite; others may have been.
    """
    found: dict[str, list[Update]] = {}
    for path, strength in named(lora):
        updates, header = read_tensors(path, ("generator_lora", *parts), "lora")
        settings = list(settings_of(path, header, updates))
        for update in read_updates(tensors, updates, settings, str(path), strength):
            found.setdefault(update.tensor, []).append(update)
    for name, wanted in found.items():
        weight = tensors[name].float().clone()
        for update in wanted:
            update.add_to(weight)
        tensors[name] = weight.to(dtype)


def settings_of(path: Path, header: Mapping[str, str], updates: Mapping[str, Tensor]) -> Iterator[Settings]:
    """What the header of a file, and a file next to it, say about all its updates."""
    if HEADER in header:
        try:
            packed = json.loads(header[HEADER])
            fields = {name.removeprefix("transformer."): value for name, value in packed.items()}
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"lora: {path}: {HEADER} in its header is not a JSON object") from None
        yield _checked(f"{path}: {HEADER}", fields)
    if "lora_alpha" in header:
        fields = {name: header[name] for name in ("lora_alpha", "use_rslora") if name in header}
        yield _checked(f"{path}: its header", fields)
    elif "ss_network_alpha" in header:
        yield _checked(f"{path}: its header", {"lora_alpha": header["ss_network_alpha"]})
    settings = path.parent / CONFIG
    if settings.exists() and (path.stem == ADAPTER or any(name.startswith("base_model.model.") for name in updates)):
        yield _checked(str(settings), read_json(settings, "lora"))


def _checked(source: str, fields: Mapping[str, Any]) -> Settings:
    kind, start = fields.get("peft_type", "LORA"), fields.get("init_lora_weights")
    if kind != "LORA" or fields.get("use_dora"):
        raise ValueError(f"lora: {source}: must be of a LoRA, got {'DoRA' if kind == 'LORA' else reprlib.repr(kind)}")
    if start not in KNOWN_STARTS:
        raise ValueError(
            f"lora: {source}: init_lora_weights={reprlib.repr(start)} belongs to weights that were changed with it"
        )
    return Settings(source, fields)


def read_updates(
    tensors: Mapping[str, Tensor],
    updates: Mapping[str, Tensor],
    settings: Sequence[Settings],
    source: str,
    strength: float = 1.0,
) -> list[Update]:
    """The updates that a file's tensors are, each fitting its weight.

    Raises:
        ValueError: as for `merge`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for name, tensor in updates.items():
        match = UPDATE.match(name)
        role = _role(match) if match else "A_bias"
        if match is None or role == "A_bias" or role in found.get(match["module"], {}):
            strangers.append(name)
        else:
            found.setdefault(match["module"], {})[role] = tensor
    places, made = _Places(tensors), []
    taken: dict[tuple[str, int | None], str] = {}
    for module, parts in found.items():
        weight, bias = places.find(module, "weight"), places.find(module, "bias")
        if weight is None or (bias is None and {"B_bias", "diff_b"} & parts.keys()):
            strangers.append(next(name for name in updates if name.startswith(module + ".")))
            continue
        target = places.name(weight)
        if taken.setdefault(weight, module) != module:
            raise ValueError(f"lora: {source} holds updates of {target} twice, as {taken[weight]} and as {module}")
        scale = _scale(module, parts, settings, f"{source}: {target}")
        if ("A" in parts) != ("B" in parts) or not parts.keys() - {"alpha", "B_bias"}:
            held = ", ".join(sorted(parts))
            raise ValueError(f"lora: {source} must hold lora_A and lora_B for {target}, got {held}")
        if "A" in parts:
            made.append(Update(*weight, strength * scale, parts["B"], parts["A"]))
        for role, place, factor in (("diff", weight, 1.0), ("diff_b", bias, 1.0), ("B_bias", bias, scale)):
            if role in parts and place is not None:
                made.append(Update(*place, strength * factor, parts[role]))
    if strangers or not found:
        raise ValueError(f"lora: {source} must hold updates of this network's weights, got {shown(strangers)}")
    for update in made:
        _check(update, places, source)
    return made


def _role(match: re.Match[str]) -> str:
    return match["other"] or ROLES[match["side"]] + ("_bias" if match["leaf"] == "bias" else "")


def _scale(module: str, parts: Mapping[str, Tensor], settings: Sequence[Settings], source: str) -> float:
    rank = len(parts["A"]) if "A" in parts and parts["A"].ndim else 0
    if not rank:
        return 1.0
    own = None
    if "alpha" in parts:
        own = number(parts["alpha"].item() if parts["alpha"].numel() == 1 else None, f"{source}: alpha")
    scales = {found.scale(module, rank, own): found.source for found in settings or [Settings(source, {})]}
    if len(scales) > 1:
        said = " and ".join(f"{scale:g} by {where}" for scale, where in scales.items())
        raise ValueError(f"lora: {source} must have one scale, got {said}")
    return next(iter(scales))


class _Places:
    """Where the tensors lie that files know by several names."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.places: dict[str, tuple[str, int | None]] = {}
        for name in tensors:
            apart = thirds(name) if PACKED in name else [name]
            self.places |= {part: (name, i if PACKED in name else None) for i, part in enumerate(apart)}
        self.flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in self.places}

    def find(self, module: str, leaf: str) -> tuple[str, int | None] | None:
        """(tensor, third of it) of a module's weight or bias."""
        if module.startswith(FLAT):
            module = self.flat.get(module.removeprefix(FLAT), module)
        for diffusers, end in itertools.product((False, True), (f".{leaf}", "" if leaf == "weight" else ".bias")):
            if place := self.places.get(published(module + end, diffusers)):
                return place
        return None

    def name(self, place: tuple[str, int | None]) -> str:
        return place[0] if place[1] is None else thirds(place[0])[place[1]]

    def shape(self, place: tuple[str, int | None]) -> list[int]:
        rows, *rest = self.tensors[place[0]].shape
        return [rows if place[1] is None else rows // 3, *rest]


def _check(update: Update, places: _Places, source: str) -> None:
    place = (update.tensor, update.third)
    shape, b, a = places.shape(place), update.b, update.a
    if not all(x is None or x.is_floating_point() for x in (a, b)):
        raise ValueError(
            f"lora: {source}: {places.name(place)} must be updated by floating-point numbers, got {b.dtype}"
        )
    if a is None:
        fits, got = list(b.shape) == shape, f"{list(b.shape)}"
    else:
        flat = [[len(x), math.prod(x.shape[1:])] for x in (b, a) if x.ndim > 1]
        rank = len(a) if a.ndim else 0
        fits = rank > 0 and flat == [[shape[0], rank], [rank, math.prod(shape[1:])]]
        got = f"B {list(b.shape)} A {list(a.shape)}"
    if not fits:
        raise ValueError(f"lora: {source}: {places.name(place)} is {shape}, got {got}")
