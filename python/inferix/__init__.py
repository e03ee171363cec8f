"""Inferix: block-diffusion video world models, fast, long and interactive."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferix_kernels import __version__

    from .commands.configs import (
        ConvertConfig,
        DoctorConfig,
        EvaluateConfig,
        EvaluateDatasetConfig,
        EvaluatePairConfig,
        GenerateConfig,
        InspectKvConfig,
        PlayConfig,
    )
    from .commands.convert import convert
    from .commands.doctor import doctor
    from .commands.generate import generate
    from .commands.inspect_kv import inspect_kv
    from .commands.play import play
    from .world import World

__all__ = [
    "ConvertConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "EvaluateDatasetConfig",
    "EvaluatePairConfig",
    "GenerateConfig",
    "InspectKvConfig",
    "PlayConfig",
    "World",
    "__version__",
    "convert",
    "doctor",
    "generate",
    "inspect_kv",
    "play",
]

_CONFIGS = tuple(name for name in __all__ if name.endswith("Config"))
_COMMANDS = tuple(name for name in __all__ if name.islower() and name != "__version__")
_MODULE_OF = {"World": ".world", "__version__": "inferix_kernels"} | dict.fromkeys(_CONFIGS, ".commands.configs")
_MODULE_OF |= {name: f".commands.{name}" for name in _COMMANDS}


def __getattr__(name: str) -> object:
    # torch takes seconds to import; `inferix --help` should not.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module 'inferix' has no attribute {name!r}")
