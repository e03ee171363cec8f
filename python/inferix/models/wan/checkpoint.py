"""From a checkpoint file, whoever wrote it, to a WanNetwork; and back into a file of our own.

Read: torch pickles that hold one state dict or several by name (generator, generator_ema), safetensors, shards with an
index, the prefixes that training wrappers leave, diffusers' names. Nothing is ignored: what is missing, what is too
much and what has another size is named. Pickles are read with weights_only, so a file can not run code.

Source of the key names: github.com/Wan-Video/Wan2.1, guandeh17/Self-Forcing and huggingface/diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from inferix_kernels.files import atomic_write
from inferix_kernels.quantize import Linear8

from ..linears import (
    CODES,
    SCALE,
    WEIGHT,
    checkpoint_tensors,
    eight_bit_names,
    quantized_layer,
    stored_layer,
    stored_layers,
)
from .containers import check_floating, count_layers, read_json, read_tensors, reading, shape_of, shown
from .lora import SUFFIXES, Lora, is_lora, merge
from .names import PACKED, canonical, thirds
from .network import WanConfig, WanNetwork
from .relatives import say_whose

FORMAT = "inferix-wan/1"
HEAD_DIM = 128  # of every published Wan: the one size that no tensor's shape shows
NOT_THE_NETWORK = ("vae", "models_t5", "models_clip")  # files that lie next to a network's
MOST_TEXT = 1 << 16  # tokens, padded to which a prompt is attended to
# What config files, Wan's and diffusers', call the fields of WanConfig.
HINTS = {
    "dim": ("dim",),
    "layers": ("num_layers",),
    "heads": ("num_heads", "num_attention_heads"),
    "ffn": ("ffn_dim",),
    "channels_in": ("in_dim", "in_channels"),
    "channels_out": ("out_dim", "out_channels"),
    "freq_dim": ("freq_dim",),
    "text_dim": ("text_dim",),
    "text_len": ("text_len",),
    "image_dim": ("image_dim",),
    "eps": ("eps",),
    "action_heads": ("action_config.heads_num",),
}


def find_checkpoint(weights: str | Path | None) -> Path:
    """The network's file: `weights` itself or, if that is a folder, the one network in it.

    Raises:
        ValueError: there is none, or several.
    """
    if weights is None:
        raise ValueError("weights must be a checkpoint file or the folder that holds it: this model ships none")
    path = Path(weights)
    if not path.is_dir():
        if not path.exists():
            raise ValueError(f"weights: there is no file or folder {path}")
        return path
    for folder in (path, path / "transformer"):
        found = sorted(folder.glob("*.index.json"))
        sharded = {suffix for suffix in SUFFIXES if any(f"{suffix}.index" in file.name for file in found)}
        for suffix in SUFFIXES:
            found += [] if suffix in sharded else sorted(folder.glob(f"*{suffix}"))
        found = [file for file in found if not any(word in file.name.lower() for word in NOT_THE_NETWORK)]
        found = [file for file in found if not is_lora(file)]
        if len(found) > 1:  # base Wan and a model made from it, say: taking either would be a guess
            names = ", ".join(file.name for file in found)
            raise ValueError(f"weights: {folder} holds several networks ({names}): name one")
        if found:
            return found[0]
    raise ValueError(
        f"weights: {path} holds no network: no .safetensors, .pt, .pth, .bin or .sft file, nor a folder transformer/"
    )


# (tensors by their published names, what a config file says, the file's name) -> the network, without its weights
Build = Callable[[Mapping[str, Tensor], Mapping[str, Any], str], WanNetwork]


def wan_network(tensors: Mapping[str, Tensor], hints: Mapping[str, Any], source: str) -> WanNetwork:
    return WanNetwork(config_of(tensors, hints, source))


def load_network(
    path: Path,
    parts: Sequence[str] = ("generator_ema", "generator"),
    *,
    build: Build = wan_network,
    row: str = "",
    lora: Lora = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    linear: str | None = None,
) -> WanNetwork:
    """A network from a checkpoint. Tensors that need no change stay mapped from the file.

    Args:
        path: from `find_checkpoint`.
        parts: names of the state dicts to take, if the file holds several; the first that is there.
        row: the name it is run under; what the file says against that is logged. "": nothing is.
        build: the network that the file's tensors are of; a relative of Wan may have layers of its own.
        lora: low-rank updates to merge into the weights; see lora.Lora.
        dtype: of the weights, and so of the network's products.
        linear: what the linear layers between the first and the last ones are kept in: "int8" or "fp8"; None: as the
            file has them. They are quantized as precise as they are in the file, whatever `dtype`. "bf16": in `dtype`.

    Raises:
        ValueError: the file is damaged or holds another architecture; says which tensor, and what differs. It is in 8
            bits, and in others than `linear`, or there are updates to merge.
    """
    raw, metadata = read_tensors(path, parts)
    _refuse_four_bits(raw, str(path))
    tensors = canonical(raw, str(path))
    with reading(path, "a Wan transformer"):
        with torch.device("meta"):
            network = build(tensors, _hints(path, metadata), str(path))
        if row:
            beside = path.parent / "config.json"
            say_whose(row, path, metadata, read_json(beside) if beside.exists() else {}, parts, network.config)
        layers = eight_bit_names(network)
        stored = stored_layers(tensors, layers, str(path))
        wanted = {name: tuple(parameter.shape) for name, parameter in network.state_dict().items()}
        if stored:
            wanted |= {name + SCALE: wanted[name + WEIGHT][:1] for name in layers}
        _check(tensors, wanted, [name + WEIGHT for name in layers] if stored else [], str(path))
    _check_stored(stored, linear, lora, str(path))
    quantized = linear if linear in CODES else None
    # What is quantized is rounded once, from the sums.
    merge(tensors, lora, torch.promote_types(dtype, torch.float32) if quantized else dtype, parts)
    eight_bit = set(layers) if stored or quantized else set()
    state = {
        name: _assemble(tensors, name).to(device, dtype)
        for name in network.state_dict()
        if name.rpartition(".")[0] not in eight_bit
    }
    for name in layers if eight_bit else ():
        network.set_submodule(name, _eight_bit_layer(tensors, name, stored, quantized, device, dtype))
    network.load_state_dict(state, assign=True, strict=False)  # what there must be has been checked above
    return network.eval().requires_grad_(False)


def _refuse_four_bits(tensors: Mapping[str, Tensor], source: str) -> None:
    """Layers in NVFP4, whoever wrote them: no kernel here multiplies in 4 bits.

    Source: fouroversix/model/modules/linear.py and utils/nvfp4_checkpoint.py of github.com/NVlabs/LongLive (7860ad9);
    codes in a uint8 weight with e4m3 scales of its blocks beside them are NVIDIA's ModelOpt and LightX2V.
    """
    for name, x in tensors.items():
        scale = tensors.get(f"{name}_scale", tensors.get(f"{name.removesuffix('_packed')}_scale"))
        blocks = scale is not None and scale.dtype == torch.float8_e4m3fn and scale.ndim == 2
        if name.endswith("quantized_weight_values"):
            writer = "FourOverSix"
        elif name.endswith("._extra_state"):
            writer = "TransformerEngine"
        elif x.dtype == torch.float4_e2m1fn_x2 or (x.dtype == torch.uint8 and blocks):
            writer = "packed codes"
        else:
            continue
        raise ValueError(
            f"weights: {source} holds layers in NVFP4 ({writer}: {name}), in which nothing here multiplies: take the "
            "model's bfloat16 checkpoint (of LongLive 2 model_bf16.pt), with linear fp8 or int8 for 8 bits"
        )


def _check_stored(stored: str | None, linear: str | None, lora: Lora, source: str) -> None:
    """What is in 8 bits can't be made into anything else."""
    if stored and linear not in (None, stored):
        raise ValueError(f"linear must be {stored}, as {source} holds its layers, got {linear}")
    if stored and lora:
        raise ValueError(f"lora must not be given: {source} holds its layers in {stored}; merge it before converting")


def _eight_bit_layer(
    tensors: Mapping[str, Tensor],
    name: str,
    stored: str | None,
    linear: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Linear8:
    if stored:
        return stored_layer(tensors, name, device, dtype)
    assert linear is not None
    bias = _assemble(tensors, f"{name}.bias").to(device, dtype)
    return quantized_layer(name, _assemble(tensors, name + WEIGHT).to(device), bias, linear)


def save_network(network: WanNetwork, path: Path, source: str = "") -> None:
    """Write our safetensors: parameters as they lie in memory, sizes in the metadata, loaded by mapping the file.

    Args:
        source: name of the file that it was made from, which may say whose weights they are.

    Raises:
        ValueError: the file can't be written; what was at `path` is as it was.
    """
    config = json.dumps(dataclasses.asdict(network.config))
    state = checkpoint_tensors(network)
    with atomic_write(path, "out") as part:
        save_file(state, part, metadata={"format": FORMAT, "config": config, "source": source})


def config_of(tensors: Mapping[str, Tensor], hints: Mapping[str, Any], source: str) -> WanConfig:
    """Sizes read off the tensors; `hints`, from a config file, give what shapes do not show and must not disagree.

    Raises:
        ValueError: a tensor that shows a size is missing, or a size is not what the config file says.
    """

    def shape(name: str, dims: int = 2) -> torch.Size:
        return shape_of(tensors, name, (dims,), source, "Wan transformer")

    patch = shape("patch_embedding.weight", 5)
    if patch[2] != 1:
        raise ValueError(
            f"weights: {source}: patch_embedding.weight must be [dim, channels, 1, rows, columns], got {list(patch)}"
        )
    found = {
        "dim": patch[0],
        "layers": count_layers(tensors, "blocks.", source),
        "ffn": shape("blocks.0.ffn.0.weight")[0],
        "channels_in": patch[1],
        "channels_out": shape("head.head.weight")[0] // (patch[3] * patch[4]),
        "freq_dim": shape("time_embedding.0.weight")[1],
        "text_dim": 0 if _wordless(tensors) else shape("text_embedding.0.weight")[1],
        "image_dim": shape("img_emb.proj.0.weight", 1)[0] if "img_emb.proj.0.weight" in tensors else 0,
    }
    for name, size in found.items():
        if (hints.get(name) or size) != size:
            raise ValueError(f"weights: {source}: {name} must be {hints[name]}, as its config says, got {size}")
    heads = hints.get("heads") or found["dim"] / HEAD_DIM
    if heads != int(heads) or found["dim"] % int(heads):
        raise ValueError(
            f"weights: {source}: heads must divide dim={found['dim']}, got {heads:g}; a config.json next to "
            f"it with num_heads says how many there are where a head has not {HEAD_DIM} channels"
        )
    given = {name: hints[name] for name in ("text_len", "eps") if name in hints}
    return WanConfig(heads=int(heads), patch=(patch[3], patch[4]), **found, **given)


def _wordless(tensors: Mapping[str, Tensor]) -> bool:
    """A network that looks at a picture and takes no words."""
    return "img_emb.proj.0.weight" in tensors and not any(name.startswith("text_embedding.") for name in tensors)


def _hints(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own metadata, or a config.json next to the file, says about sizes: whole numbers, and eps."""
    config_file, ours = path.parent / "config.json", metadata.get("format") == FORMAT
    if ours:
        source, config = f"{path}: its header", json.loads(metadata["config"])
    elif config_file.exists():
        source, config = str(config_file), read_json(config_file)
        actions = config.get("action_config")
        config |= {f"action_config.{key}": x for key, x in (actions if isinstance(actions, dict) else {}).items()}
    else:
        return {}

    def said(key: str, most: int = 1 << 31) -> Any:
        value = config.get(key)
        if key == "eps":
            good, wanted = type(value) is float and 0 < value < 1, "a number between 0 and 1"
        else:
            good, wanted = type(value) is int and 0 <= value < most, f"a whole number below {most}"
        if value is not None and not good:
            raise ValueError(f"weights: {source}: {key} must be {wanted}, got {reprlib.repr(value)}")
        return value

    keys = {name: (name,) for name in HINTS} if ours else HINTS
    hints = {name: value for name, found in keys.items() for key in found if (value := said(key)) is not None}
    if "heads" in hints and (width := said("attention_head_dim")):  # diffusers gives the width of a head, not dim
        hints["dim"] = hints["heads"] * width
    if not 1 <= hints.get("text_len", 1) <= MOST_TEXT:
        raise ValueError(f"weights: {source}: text_len must be from 1 to {MOST_TEXT}, got {hints['text_len']}")
    return hints


def _check(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], codes: Sequence[str], source: str
) -> None:
    """Every tensor that must be there is, with its shape, and no other; `codes` may be whole numbers."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted.items():
        if PACKED in name and name not in tensors:
            expected |= dict.fromkeys(thirds(name), (shape[0] // 3, *shape[1:]))
        else:
            expected[name] = shape
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"weights: {source} does not fit: {len(missing)} tensors are missing ({shown(missing)}), "
            f"{len(unexpected)} are unexpected ({shown(unexpected)})"
        )
    for name, shape in expected.items():
        got = tuple(tensors[name].shape)
        if got != shape:
            axes = [i for i, (a, b) in enumerate(zip(shape, got)) if a != b]
            where = f"dimension {axes[0]} differs" if len(got) == len(shape) else "the number of dimensions differs"
            raise ValueError(f"weights: {source}: {name} must be {list(shape)}, got {list(got)}: {where}")
    check_floating(tensors, expected.keys() - set(codes), source)


def _assemble(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors or PACKED not in name:
        return tensors[name]
    return torch.cat([tensors[part] for part in thirds(name)])
