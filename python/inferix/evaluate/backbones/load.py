"""Weight files into networks: read safely, compared with the network before anything is kept."""

from __future__ import annotations

import _codecs
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .vit import Linear

State = dict[str, torch.Tensor]
# NumPy's numbers, which training leaves in an optimizer's state (AMT's learning rate), under NumPy 1's names and 2's.
_NUMBERS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    type(np.dtype(np.float64)),
    _codecs.encode,
]


def read(path: Path, torchscript: bool = False) -> State:
    """The tensors of a file, by name: a state dict, or one under "state_dict".

    "module.", which data-parallel training puts before every name, is left out.

    Pickles are read with `weights_only`: no code of the file runs.

    Args:
        torchscript: take a TorchScript archive as well. Loading one can run code of the file (its `__setstate__`): only
            for a file whose SHA-256 is known, as WeightsDir.path checks it.

    Raises:
        ValueError: it is none of these.
    """
    try:
        if _is_torchscript(path):
            if not torchscript:
                raise ValueError("a TorchScript archive, which may run code of its own")
            with warnings.catch_warnings():  # torch.jit is deprecated; the files are of 2021
                warnings.simplefilter("ignore")
                held = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        else:
            with torch.serialization.safe_globals(_NUMBERS):
                held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, BadZipFile, by how the file is broken
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} must be a file of weights that torch reads, got: {reason}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold tensors by name, got {type(held).__name__}")
    if isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    return {name.removeprefix("module."): value for name, value in held.items() if isinstance(value, torch.Tensor)}


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with a table of constants beside the data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def filled(build: Callable[[], nn.Module], state: State, path: Path, holds: str) -> nn.Module:
    """The network with these tensors in it, for evaluation: in float32, but for those of `vit.Linear`, which stay as
    the file holds them and are computed with in float32.

    Args:
        build: makes the network.
        state: its tensors, under its own names.
        path: of the file, for the error.
        holds: what the file must hold, in words, likewise.

    Raises:
        ValueError: names or shapes are another network's; one line that says which differs first.
    """
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    linears = [name for name, module in network.named_modules() if isinstance(module, Linear)]
    kept = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{path} must hold {holds}, got no {name}")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path} must hold {holds}: {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}"
            )
    if extra := sorted(set(state) - set(expected)):
        raise ValueError(f"{path} must hold {holds}, got {extra[0]} as well ({len(extra)} that it lacks)")
    held = {name: state[name] if name in kept else state[name].float() for name in expected}
    network.load_state_dict(held, assign=True)
    return network.eval().requires_grad_(False)
