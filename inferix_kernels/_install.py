"""How these packages are installed: what every message about something absent says."""

from __future__ import annotations

import importlib
from typing import Any

# On PyPI, `inferix` is somebody else's.
DISTRIBUTION = "inferix-kernels"
DRIVER = ("av", "PIL", "rich", "safetensors")  # modules that the extra `driver` brings


def install(extra: str) -> str:
    """The command that brings an extra of pyproject.toml."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def require(module: str, extra: str, what: str) -> Any:
    """The module of this name, imported.

    Args:
        extra: that brings it.
        what: needs it; the message begins with this.

    Raises:
        ImportError: it is not installed; one line with the command that changes this.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = _package(error) or module
        raise ImportError(f"{what} needs {absent}, which is not installed: {install(extra)}", name=absent) from None


def explained(error: ImportError) -> str:
    """The message of an error and, if the driver's own libraries are what is absent, the command that brings them."""
    return (
        f"{error}: {install('driver')}" if _package(error) in DRIVER and "pip install" not in str(error) else str(error)
    )


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]
