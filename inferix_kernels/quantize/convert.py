"""Models with 8-bit linear layers: DAX's functions, and one for layers by name."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .._check import CODES
from . import observer
from .choice import LINEAR, Chosen, Mapped, check_layers, choose, layers_of, replace, resolve, warn
from .layer import Linear8
from .qconfig import QConfig, get_dynamic_int8_per_token_act_per_channel_weight_qconfig
from .shared_input import SharedInput

QConfigs = Mapping[Any, QConfig | None]  # by the names and the types of modules


def quantize_dynamic(
    model: nn.Module,
    qconfig_dict: QConfigs | None = None,
    mapping: Mapped | None = None,
    inplace: bool = True,
    remove_qconfig: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    """Put a `Linear8` in the place of linear layers, with scales of their inputs found in each input.

    Args:
        qconfig_dict: name or type of a module -> its QConfig, or None for no quantization. "" is the model. A module
            that has no key has what its parent has. A static config is taken as if it were dynamic. Keys that match
            nothing are warned of, in one line.
        mapping: type of a layer -> the class whose `from_float` makes the new one, from a layer that has its `qconfig`.
            None is {nn.Linear: Linear8}.
        inplace: False quantizes a copy, and leaves the model as it is.
        remove_qconfig: False leaves each module's `qconfig` with it.
        backend: of the new layers.

    Returns:
        The model, or its copy.

    Raises:
        TypeError, ValueError: a layer can not be quantized: its weight is NaN, infinite, on the meta device, also
            another layer's or of another dtype than float32, bfloat16 and float16. One line names it; nothing has
            changed.

    Source: quantize_dynamic in dax/quant/quantization/quantize.py of github.com/RiseAI-Sys/DAX.

    Example:
        >>> from inferix_kernels.quantize import (
        ...     get_dynamic_int8_per_token_act_per_channel_weight_qconfig as per_token, quantize_dynamic)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        >>> quantize_dynamic(model, {"": per_token(), "2": None})
        Sequential(
          (0): Linear8(in_features=64, out_features=128, bias=True, QConfig(int8, dynamic per_token_symmetric x ...))
          (1): GELU(approximate='none')
          (2): Linear(in_features=128, out_features=64, bias=True)
        )
    """
    qconfig_dict, mapping = qconfig_dict or {}, LINEAR if mapping is None else mapping
    configs = {name: config and config.dynamic() for name, config in resolve(model, qconfig_dict).items()}
    chosen = choose(model, configs, mapping)
    warn(model, qconfig_dict, configs, chosen, mapping)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = choose(model, configs, mapping)
    _convert(model, chosen, mapping, backend)
    if not remove_qconfig:
        _set_qconfigs(model, configs)
    else:
        _remove_qconfigs(model)
    return model


def prepare(
    model: nn.Module,
    qconfig_dict: QConfigs | None = None,
    inplace: bool = True,
    observer_non_leaf_module_list: Iterable[type] | None = None,
) -> nn.Module:
    """Begin a calibration: from now on each layer with a static config notes the largest of its inputs' numbers.

    Run the model on inputs like those to come, then call `convert`.

    Args:
        qconfig_dict, inplace: as for quantize_dynamic.
        observer_non_leaf_module_list: types of other modules whose first inputs are noted too, for you to look at:
            `module.activation_post_process.amax`. `convert` takes no account of them.

    Raises:
        TypeError, ValueError: as for quantize_dynamic.

    Source: prepare in dax/quant/quantization/quantize.py of github.com/RiseAI-Sys/DAX.

    Example: that of `convert`.
    """
    qconfig_dict = qconfig_dict or {}
    configs = resolve(model, qconfig_dict)
    chosen = choose(model, configs, LINEAR)
    warn(model, qconfig_dict, configs, chosen, LINEAR)
    if not inplace:
        model = copy.deepcopy(model)
        chosen = choose(model, configs, LINEAR)
    _set_qconfigs(model, configs)
    others = tuple(observer_non_leaf_module_list or ())
    for name, module in list(model.named_modules()):
        if (config := configs[name]) is not None and type(module) in others:
            device = next((x.device for x in module.parameters()), torch.device("cpu"))
            observer.attach(module, config.activation.dtype, device, None)
    for _, layer, config in chosen:
        if config.static:
            observer.attach(layer, config.activation.dtype, layer.weight.device, config.profile)  # type: ignore[arg-type]
    return model


def convert(
    model: nn.Module,
    mapping: Mapped | None = None,
    inplace: bool = True,
    remove_qconfig: bool = True,
    *,
    backend: str = "auto",
) -> nn.Module:
    """End a calibration: put a `Linear8` in the place of each layer that `prepare` gave a config.

    Args:
        model: prepared, and run.
        mapping, inplace, remove_qconfig, backend: as for quantize_dynamic. A class of the mapping finds what was seen
            in `layer.activation_post_process.scale()`.

    Raises:
        ValueError: the model was not prepared, or the calibration of a layer was never run, or saw NaN or infinity.
            One line names it; nothing has changed.

    Source: convert in dax/quant/quantization/quantize.py of github.com/RiseAI-Sys/DAX.

    Example:
        >>> from inferix_kernels.quantize import convert, get_fp8_per_channel_weight_qconfig, prepare
        >>> model = prepare(torch.nn.Sequential(torch.nn.Linear(64, 32)), {"": get_fp8_per_channel_weight_qconfig()})
        >>> for _ in range(4):
        ...     y = model(torch.randn(8, 64))
        >>> convert(model)[0].input_scale.shape
        torch.Size([1])
    """
    mapping = LINEAR if mapping is None else mapping
    if not any("qconfig" in vars(module) for module in model.modules()):
        raise ValueError("model must be a prepared one, got one in which no module has a qconfig: call prepare first")
    configs = resolve(model, {})
    chosen = choose(model, configs, mapping)
    for names, layer, config in chosen:
        if config.static:
            seen = getattr(layer, "activation_post_process", None)
            why = seen.missing() if isinstance(seen, observer.Observer) else "it was not prepared: call prepare"
            if why:
                raise ValueError(f"model: layer {names[0]!r} can not be converted: {why}")
    observer.write_profiles({names[0]: layer for names, layer, _ in chosen})
    if not inplace:
        model = copy.deepcopy(model)
        chosen = choose(model, configs, mapping)
    _convert(model, chosen, mapping, backend)
    for module in model.modules():
        observer.detach(module)
    if remove_qconfig:
        _remove_qconfigs(model)
    return model


def quantize_linears(
    model: nn.Module,
    dtype: torch.dtype = torch.int8,
    *,
    names: Iterable[str] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Put a `Linear8` in the place of linear layers of `model`, in place; returns `model`.

    A state dict of the result loads into another model that was treated the same way.

    Args:
        dtype: of the codes, int8 or float8_e4m3fn; a scale for each output channel and each row of an input.
        names: of the layers, as `named_modules` gives them; None is every layer whose class is `nn.Linear`. The first
            and the last layers of a network are often left out: they are small, and errors there weigh most. A layer
            that has several names is replaced under those that are given, by one `Linear8`.

    Raises:
        TypeError, ValueError: a name is of no linear layer of the model, the model is itself one, which has no place in
            another (see Linear8.from_linear), or a layer can not be quantized (see quantize_dynamic). Nothing is
            replaced.

    Example:
        >>> from inferix_kernels.quantize import quantize_linears
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
        >>> quantize_linears(model, names=["0"])[0].qweight.dtype
        torch.int8
    """
    if type(model) is nn.Linear:
        raise ValueError("model must have its linear layers within it, got one: use Linear8.from_linear")
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names, got {names!r}")
    if dtype not in CODES:
        raise TypeError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype!r}")
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if type(module) is nn.Linear}
    wanted = list(layers if names is None else names)
    if unknown := [name for name in wanted if name not in layers]:
        raise ValueError(f"names must be linear layers of the model, got {unknown[0]!r}")
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for name in wanted:
        places[layers[name]].append(name)
    config = get_dynamic_int8_per_token_act_per_channel_weight_qconfig(dtype, dtype)
    chosen = [Chosen(named, layer, config) for layer, named in places.items()]
    check_layers(model, chosen)
    del layers, places  # each layer's weight is to go when it has been quantized
    _convert(model, chosen, LINEAR, backend)
    return model


def _convert(model: nn.Module, chosen: list[Chosen], mapping: Mapped, backend: str) -> None:
    def make(layer: nn.Module, config: QConfig) -> nn.Module:
        target = mapping[nn.utils.parametrize.type_before_parametrizations(layer)]
        observed = getattr(layer, "activation_post_process", None)
        if target is Linear8:
            scale = observed.scale() if config.static and isinstance(observed, observer.Observer) else None
            made: nn.Module = Linear8.from_qconfig(layer, config, input_scale=scale, backend=backend)  # type: ignore[arg-type]
        else:
            layer.qconfig = config  # type: ignore[assignment]
            made = target.from_float(layer)
        observer.detach(layer)
        return made

    replace(model, chosen, make)
    share_inputs(model)


def share_inputs(model: nn.Module) -> None:
    """Let layers beside each other, with inputs of one width and config, take an input's codes from one another."""
    siblings: dict[tuple[Any, ...], list[Linear8]] = defaultdict(list)
    for name, layer in layers_of(model):
        layer.shared = layer.siblings = None
        if layer.smoothing is None and layer.input_scale is None:
            key = name.rpartition(".")[0], layer.in_features, layer.config.activation, layer.backend
            siblings[key].append(layer)
    shared = SharedInput()
    for key, layers in siblings.items():
        if len(layers) > 1:
            for layer in layers:
                layer.shared, layer.siblings = shared, key


def _set_qconfigs(model: nn.Module, configs: Mapping[str, QConfig | None]) -> None:
    for name, module in model.named_modules():
        if name in configs:
            module.qconfig = configs[name]


def _remove_qconfigs(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("qconfig", None)
