"""Peers with a folder of their own, build/peers/NAME: installed there, without what they depend on, beside our torch.

`third_party/peers/NAME.txt` holds the requirements, the library first: all that is installed, so that no other torch or
numpy comes along. A folder joins sys.path, at its end, when an adapter asks for its library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from .ledger import ROOT

PINS = ROOT / "third_party" / "peers"
FOLDERS = ROOT / "build" / "peers"


def names() -> list[str]:
    return sorted(path.stem for path in PINS.glob("*.txt"))


def requirements(name: str) -> list[str]:
    """What is installed for a peer, its own line first."""
    lines = (line.split("#")[0].strip() for line in (PINS / f"{name}.txt").read_text().splitlines())
    return [line for line in lines if line]


def installed(name: str) -> str:
    """The version in the peer's folder; empty if there is none."""
    found = importlib.metadata.distributions(name=name, path=[str(FOLDERS / name)])
    return next((distribution.version for distribution in found), "")


def install(name: str) -> None:
    """From the package index, whole or not at all; what was there before is replaced.

    Raises:
        ValueError: no such peer, or pip's reason.
    """
    if name not in names():
        raise ValueError(f"peers install: names must be of {', '.join(names())}, got {name}")
    FOLDERS.mkdir(parents=True, exist_ok=True)
    target, part = FOLDERS / name, FOLDERS / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
    said = subprocess.run([*command, *requirements(name)], capture_output=True, text=True)
    if said.returncode:
        reason = (said.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ValueError(f"peers install {name}: pip failed: {reason}")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def load(name: str, module: str = "") -> ModuleType:
    """Import a peer's library from its folder, or from wherever else it is."""
    add_to_path(name)
    return importlib.import_module(module or name)


def add_to_path(name: str) -> None:
    folder = str(FOLDERS / name)
    if installed(name) and folder not in sys.path:
        sys.path.append(folder)  # at the end: what our environment has comes first
        importlib.invalidate_caches()


def place(module: str, name: str) -> Path:
    """The folder of a package that is not to be imported as a whole."""
    add_to_path(name)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not here")
    return Path(spec.origin).parent
