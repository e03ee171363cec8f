"""Which layers of a model are quantized, and how: `qconfig_dict`, read as DAX reads it, and what stands against it.

A key is the name of a module, or a type. A module has the config of its name, else of its type, else its parent's; ""
is the model itself. A `qconfig` that a module has already, by hand or from `prepare`, goes before all of them. None is
no quantization. Only modules of the types in `mapping` are replaced: nn.Linear itself, no class derived from it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .._check import FLOATS, check_is, check_tensor
from .._dispatch import AUTO
from .layer import Linear8
from .qconfig import QConfig

MAX_INT8_TERMS = 131071  # of one sum of 32 bits: csrc/linear.h
Mapped = Mapping[type, Any]  # type -> what has from_float
LINEAR: Mapped = {nn.Linear: Linear8}


class Chosen(NamedTuple):
    """A layer that is to be quantized, and where in the model it is: a layer may be in several places."""

    names: list[str]
    layer: nn.Module
    config: QConfig


def resolve(model: nn.Module, qconfig_dict: Mapping[Any, QConfig | None]) -> dict[str, QConfig | None]:
    """Each module's config, by its name.

    Raises:
        TypeError: the dict, a key or a value is of another type; names it.
    """
    check_is("model", model, nn.Module)
    check_is("qconfig_dict", qconfig_dict, Mapping)
    for key, config in qconfig_dict.items():
        if not isinstance(key, (str, type)):
            raise TypeError(f"qconfig_dict must have names and types of modules as keys, got {key!r}")
        _check_config(f"qconfig_dict[{key if isinstance(key, type) else repr(key)}]", config)
    found: dict[str, QConfig | None] = {}

    def visit(name: str, module: nn.Module, config: QConfig | None) -> None:
        config = qconfig_dict.get(type_before_parametrizations(module), config)
        config = qconfig_dict.get(name, config)
        if "qconfig" in vars(module):
            config = module.qconfig  # type: ignore[assignment]
            _check_config(f"{name or 'the model'}.qconfig", config)
        found[name] = config
        for child, part in module._modules.items():
            if part is not None:
                visit(f"{name}.{child}" if name else child, part, config)

    visit("", model, None)
    return found


def _check_config(name: str, config: object) -> None:
    if config is not None and not isinstance(config, QConfig):
        raise TypeError(f"{name} must be a QConfig or None, got {type(config).__name__}")


def choose(
    model: nn.Module, configs: Mapping[str, QConfig | None], mapping: Mapped, backend: str = "auto"
) -> list[Chosen]:
    """The layers that the configs name, each checked.

    Raises:
        TypeError, ValueError: one of them can not be quantized; one line that names it.
    """
    if type_before_parametrizations(model) in mapping and configs[""] is not None:
        raise ValueError("model must have its linear layers within it, got one: use Linear8.from_linear")
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type_before_parametrizations(module) in mapping:
            names[module].append(name)
    chosen = []
    for layer, places in names.items():
        config = configs[places[0]]
        if other := [name for name in places[1:] if configs[name] != config]:
            raise ValueError(f"model: layer {places[0]!r} is also {other[0]!r}, and their qconfigs differ")
        if config is not None:
            chosen.append(Chosen(places, layer, config))
    check_layers(model, [one for one in chosen if mapping[type_before_parametrizations(one.layer)] is Linear8])
    return chosen


def check_layers(model: nn.Module, chosen: Iterable[Chosen]) -> None:
    """Raise TypeError or ValueError, in one line with its name, unless each layer can be made a Linear8."""
    owners = _owners(model)
    for names, layer, config in chosen:
        name = f"model: layer {names[0]!r}"
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise ValueError(f"{name} must have its weight, got one on the meta device: load it first")
        if weight.device.type not in AUTO:
            raise ValueError(f"{name} must be on {' or '.join(AUTO)}, got {weight.device}")
        if "forward" in vars(layer):
            raise ValueError(
                f"{name} must have nn.Linear's forward, got one that was put in its place, by hooks perhaps"
            )
        own = {key for key, _ in layer.named_parameters(recurse=False)}
        if more := sorted(own - {"weight", "bias"}):
            raise ValueError(f"{name} must have a weight and a bias, got {more[0]} besides")
        for key, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            assert isinstance(tensor, Tensor)
            check_tensor(
                f"{name}: {key}", tensor.detach(), FLOATS, "N K" if key == "weight" else "N", {}, weight.device
            )
            if not tensor.isfinite().all():
                raise ValueError(f"{name} must have finite numbers, got NaN or infinity in its {key}")
        if not weight.numel():
            raise ValueError(f"{name} must have numbers in its weight, got {list(weight.shape)}")
        if config.weight.dtype == torch.int8 and weight.shape[1] > MAX_INT8_TERMS:
            raise ValueError(f"{name} must have at most {MAX_INT8_TERMS} inputs for int8, got {weight.shape[1]}")
        if not is_parametrized(layer):
            others = [key for module, key in owners[_place(weight)] if module is not layer]
            if others:
                raise ValueError(f"{name} must have a weight of its own, got one that is also {others[0]!r}")


def _owners(model: nn.Module) -> dict[tuple[int, ...], list[tuple[nn.Module, str]]]:
    """Who has a parameter that lies in the same place in memory: the module, and the parameter's name."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta and parameter.layout == torch.strided:
                owners[_place(parameter)].append((module, f"{name}.{key}" if name else key))
    return owners


def _place(x: Tensor) -> tuple[int, ...]:
    return (x.untyped_storage().data_ptr(), int(x.storage_offset())) if x.layout == torch.strided else (0, 0)


def warn(
    model: nn.Module,
    qconfig_dict: Mapping[Any, QConfig | None],
    configs: Mapping[str, QConfig | None],
    chosen: Iterable[Chosen],
    mapping: Mapped,
) -> None:
    """One line for keys that match nothing. A config for a module with no layer in it is an error.

    Raises:
        ValueError: as said.
    """
    types = {type_before_parametrizations(module) for module in model.modules()}
    absent = [key for key in qconfig_dict if key not in (configs if isinstance(key, str) else types)]
    for key, config in qconfig_dict.items():
        if not isinstance(key, str) or key in absent or config is None or not key:
            continue
        if not any(_is_layer(module, mapping) for module in model.get_submodule(key).modules()):
            kind = type(model.get_submodule(key)).__name__
            raise ValueError(
                f"qconfig_dict: layer {key!r} must be, or have within it, an nn.Linear to be quantized, got a {kind}"
            )
    if absent:
        listed = ", ".join(repr(key) if isinstance(key, str) else key.__name__ for key in absent)
        warnings.warn(f"qconfig_dict: no module of the model is {listed}", stacklevel=3)
    if not any(True for _ in chosen):
        warnings.warn("qconfig_dict: no layer of the model is quantized by it", stacklevel=3)


def _is_layer(module: nn.Module, mapping: Mapped) -> bool:
    return type_before_parametrizations(module) in mapping or isinstance(module, Linear8)


HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


def replace(model: nn.Module, chosen: list[Chosen], make: Callable[[nn.Module, QConfig], nn.Module]) -> None:
    """Put what `make` makes of each layer in all of its places, with the layer's hooks. `chosen` is emptied on the way,
    so that a layer's weight is gone before the next is quantized."""
    while chosen:
        names, layer, config = chosen.pop(0)
        made = make(layer, config)
        take_hooks(made, layer)
        for name in names:
            model.set_submodule(name, made)


def take_hooks(made: nn.Module, layer: nn.Module) -> None:
    for hooks in HOOKS:
        getattr(made, hooks).update(getattr(layer, hooks))


def layers_of(model: nn.Module) -> Iterator[tuple[str, Linear8]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear8):
            yield name, module
