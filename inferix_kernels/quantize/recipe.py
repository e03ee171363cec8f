"""A quantized model on disk: its state dict in one safetensors file, and as metadata its recipe, the QConfig of each
quantized layer. Loading makes those layers of the file's codes; nothing is quantized again.

Metadata "inferix_quantize" is JSON: {"version": 1, "layers": {name: {"dtype": "int8", "activation":
"per_token_symmetric", "is_dynamic": true, "weight": "per_channel_symmetric"}}}. Tensors have the names of the model's
state dict; a quantized layer has `qweight`, `weight_scale` and, if they are there, `bias`, `input_scale`, `smoothing`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._check import FLOATS
from .._install import require
from ..files import atomic_write
from ..layout import Quantized
from .choice import take_hooks
from .convert import share_inputs
from .layer import Linear8
from .qconfig import QConfig

VERSION = 1
KEY = "inferix_quantize"
PARTS = ("qweight", "weight_scale", "bias", "input_scale", "smoothing")


def recipe_of(model: nn.Module) -> dict[str, QConfig]:
    """The config of each quantized layer of a model, by its name.

    Example:
        >>> from inferix_kernels.quantize import quantize_linears, recipe_of
        >>> recipe_of(quantize_linears(torch.nn.Sequential(torch.nn.Linear(64, 32))))
        {'0': QConfig(int8, dynamic per_token_symmetric x per_channel_symmetric)}
    """
    modules = model.named_modules(remove_duplicate=False)  # a layer may be in several places
    return {name: module.config for name, module in modules if isinstance(module, Linear8)}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model with quantized layers to a safetensors file. A crash in the middle leaves what was there before.

    Raises:
        ValueError: a tensor has no numbers, on the meta device, or the file can not be written; names it.
        ImportError: safetensors is not installed.

    Example:
        >>> from inferix_kernels.quantize import load, quantize_linears, save
        >>> model = quantize_linears(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> save(model, "model.safetensors")
        >>> again = load(torch.nn.Sequential(torch.nn.Linear(64, 32, device="meta")), "model.safetensors")
        >>> x = torch.randn(5, 64)
        >>> torch.equal(again(x), model(x))
        True
    """
    save_file = require("safetensors.torch", "driver", "path: a quantized model").save_file
    if isinstance(model, Linear8):
        raise ValueError(
            "model must have its linear layers within it, got one: no layer takes another's place by itself"
        )
    layers = {name: config.to_json() for name, config in recipe_of(model).items()}
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"model: {name} must be a tensor to be saved, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"model: {name} must have numbers to be saved, got a tensor on the meta device")
        place = tensor.untyped_storage().data_ptr()  # a file has no two names for one memory
        tensors[name] = tensor.detach().contiguous() if place not in places else tensor.detach().clone()
        places.add(place)
    header = json.dumps({"version": VERSION, "layers": layers})
    with atomic_write(path) as part:
        save_file(tensors, part, {KEY: header})


def load(model: nn.Module, path: str | os.PathLike[str], *, backend: str = "auto") -> nn.Module:
    """Make a model what `save` wrote, in place: layers of the file's recipe become `Linear8`, and all tensors are the
    file's.

    Args:
        model: as it is before it is quantized, or quantized by the same recipe. On the meta device it takes the file's
            tensors as they are, on the CPU; elsewhere its own tensors keep their dtypes and devices.
        backend: of the new layers.

    Returns:
        The model.

    Raises:
        ValueError: the file can't be read, has no recipe, or one of another model: the layer is named. Nothing has
            changed.
        ImportError: safetensors is not installed.

    Example: that of `save`.
    """
    configs, tensors = _read(path)
    layers: dict[str, Linear8] = {}
    made: dict[nn.Module, Linear8] = {}  # one of a layer that is in several places
    for name, config in configs.items():
        layer = _find(model, name, config, path)
        if layer not in made:
            made[layer] = _layer(layer, name, config, tensors, path, backend)
        layers[name] = made[layer]
    taken = {f"{name}.{part}" for name in layers for part in PARTS}
    rest = {name: tensor for name, tensor in tensors.items() if name not in taken}
    mine = {name: x for name, x in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    _check_rest(model, mine, rest, path)
    for old, new in made.items():
        take_hooks(new, old)
    for name, new in layers.items():
        model.set_submodule(name, new)
    placed = {name: x if mine[name].is_meta else x.to(mine[name]) for name, x in rest.items()}
    model.load_state_dict(placed, strict=False, assign=any(x.is_meta for x in mine.values()))
    share_inputs(model)
    return model


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, QConfig], dict[str, Tensor]]:
    safetensors = require("safetensors", "driver", "path: a quantized model")
    if Path(path).exists() and not Path(path).is_file():
        raise _not_one(path, "it is no file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise _not_one(path, " ".join(str(error).split())[:200]) from None
    if KEY not in metadata:
        raise _not_one(path, "it has no recipe")
    try:
        header = json.loads(metadata[KEY])
        version, layers = header["version"], header["layers"]
        if version == VERSION:
            return {str(name): QConfig.from_json(saved) for name, saved in layers.items()}, tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_one(path, f"its recipe is damaged: {' '.join(repr(error).split())[:120]}") from None
    raise _not_one(path, f"its version is {str(version)[:20]}, this library reads {VERSION}")


def _not_one(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(f"path must be a quantized model, got {os.fspath(path)}: {why}")


def _find(model: nn.Module, name: str, config: QConfig, path: str | os.PathLike[str]) -> nn.Linear | Linear8:
    """The model's layer of this name."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model must have the layers of {os.fspath(path)}, got none called {name!r}") from None
    if not isinstance(layer, (nn.Linear, Linear8)):
        raise ValueError(f"model: layer {name!r} must be an nn.Linear, got a {type(layer).__name__}")
    if isinstance(layer, Linear8) and layer.config != config:
        raise ValueError(f"model: layer {name!r} must have the file's recipe, {config}, got {layer.config}")
    return layer


def _layer(
    layer: nn.Linear | Linear8,
    name: str,
    config: QConfig,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    backend: str,
) -> Linear8:
    """What takes a layer's place: of the file's tensors."""
    given = {part: tensors.get(f"{name}.{part}") for part in PARTS}
    codes, scale = given["qweight"], given["weight_scale"]
    if codes is None or scale is None:
        raise _not_one(path, f"layer {name!r} has no {'qweight' if codes is None else 'weight_scale'}")
    if list(codes.shape) != [layer.out_features, layer.in_features]:
        sizes = [layer.out_features, layer.in_features]
        raise ValueError(f"model: layer {name!r} must be {list(codes.shape)}, as in the file, got {sizes}")
    if (given["bias"] is None) != (layer.bias is None):
        raise ValueError(
            f"model: layer {name!r} must have {'no ' if layer.bias is not None else 'a '}bias, as in the file"
        )
    smoothing = given["smoothing"]
    if smoothing is not None and list(smoothing.shape) != [1, layer.in_features]:
        raise _not_one(path, f"layer {name!r}: smoothing must be [1, {layer.in_features}], got {list(smoothing.shape)}")
    if smoothing is not None:
        _check_dtype(f"{name}.smoothing", smoothing, smoothing.new_empty(0, dtype=torch.float32))
    if given["bias"] is not None:
        _check_dtype(f"{name}.bias", given["bias"], layer.bias)  # type: ignore[arg-type]
    old = layer.qweight if isinstance(layer, Linear8) else layer.weight
    device = torch.device("cpu") if old.is_meta else old.device
    moved = {part: None if x is None else x.to(device) for part, x in given.items()}
    try:
        made = Linear8(
            Quantized(moved["qweight"], moved["weight_scale"].view(() if scale.ndim == 1 else -1)),  # type: ignore[arg-type, union-attr]
            bias=moved["bias"] if layer.bias is None or old.is_meta else moved["bias"].to(layer.bias.dtype),  # type: ignore[union-attr]
            smooth=None if moved["smoothing"] is None else 1 / (1 + moved["smoothing"][0]),
            input_scale=moved["input_scale"],
            per_tensor=config.activation.qscheme == "per_tensor_symmetric",
            backend=backend,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise _not_one(path, f"layer {name!r}: {error}") from None
    if made.config != config:
        raise _not_one(path, f"layer {name!r} is {made.config}, and its recipe says {config}")
    made.register_buffer("smoothing", moved["smoothing"])  # as it was, bit for bit
    return made.train(layer.training)


def _check_dtype(name: str, tensor: Tensor, mine: Tensor) -> None:
    """Floats may be of another width; codes and whole numbers are not to be taken for floats, nor these for them."""
    if tensor.dtype != mine.dtype and not {tensor.dtype, mine.dtype} <= {*FLOATS, torch.float64}:
        want, got = (str(x.dtype).removeprefix("torch.") for x in (tensor, mine))
        raise ValueError(f"model: {name} must be {want}, as in the file, got {got}")


def _check_rest(
    model: nn.Module, mine: Mapping[str, Tensor], rest: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raise ValueError unless these are the tensors of the model's other modules, and no more is on the meta device."""
    for name in mine:
        if name not in rest:
            owner = name.rpartition(".")[0]
            if name.endswith(".qweight"):
                raise ValueError(f"model: layer {owner!r} is quantized, and is not in the recipe of {os.fspath(path)}")
            raise ValueError(f"path: {os.fspath(path)} must have all of the model's tensors, got no {name}")
    for name, tensor in rest.items():
        if name not in mine:
            raise ValueError(f"path: {os.fspath(path)} must have the model's tensors alone, got {name} besides")
        if tensor.shape != mine[name].shape:
            raise ValueError(
                f"model: {name} must be {list(tensor.shape)}, as in the file, got {list(mine[name].shape)}"
            )
        _check_dtype(name, tensor, mine[name])
    held: dict[str, Any] = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in held:
            raise ValueError(
                f"model: buffer {name} must have numbers, since no file has it, got one on the meta device"
            )
