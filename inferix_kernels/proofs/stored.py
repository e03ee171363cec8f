"""What was proved on a GPU: which kernels gave the reference's results there, and so what `auto` takes.

`python -m inferix_kernels prove` (see prove.py) runs small cases of every kernel and stores the outcomes in the user's
cache, one file per GPU model, driver and build of the kernels: another driver or build has to be proved anew. This file
only reads and writes them; it is on the way of every call on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import files

FOLDER = Path("~/.cache/inferix/proofs")
RIGHT = "right"
# Outcomes that say nothing against a kernel: it refuses such arguments, or the proof did not come to it.
NEUTRAL = ("unsupported", "not reached")
_ROOT = Path(__file__).parent.parent
read = object()  # another one each time that proofs are to be read again


class Identity(NamedTuple):
    """What a proof holds for: outcomes of another GPU model, driver or build are not used."""

    gpu: str
    capability: str  # "9.0"
    driver: str
    build: str  # of the kernels: a hash of the extension and of the Triton sources, and Triton's version


class Proof(NamedTuple):
    """Outcomes by backend and kernel: RIGHT, or "wrong: why", "unsupported: why", "not reached: why".

    A kernel is called as `kernel` below has it, "paged_attention int8".
    """

    identity: Identity
    outcomes: Mapping[str, Mapping[str, str]]

    def outcome(self, backend: str, kernels: Iterable[str]) -> str:
        """The worst over several kernels; "" if one of them was not tried and none was wrong."""
        found = [self.outcomes.get(backend, {}).get(kernel, "") for kernel in kernels]
        wrong = [outcome for outcome in found if outcome.startswith("wrong")]
        if wrong:
            return wrong[0]
        return RIGHT if found and all(outcome == RIGHT for outcome in found) else ""


def kernel(op: str, format: str, eight_bit: bool = False) -> str:
    return f"{op} {format}{' in 8 bits' if eight_bit else ''}"


@functools.cache
def identity(device: torch.device) -> Identity:
    """Of a GPU that is here.

    Raises:
        RuntimeError: torch's, if there is no such GPU or its driver is too old.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return Identity(torch.cuda.get_device_name(device), f"{major}.{minor}", driver_version(), build())


def driver_version() -> str:
    """ "580.159.04" by NVML, or the CUDA version that the driver knows."""
    try:
        nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@functools.cache
def build() -> str:
    """A hash of everything that GPU kernels are made from: the extension's bytes, Triton's sources and version."""
    digest = hashlib.sha256()
    extension = importlib.util.find_spec(".._C", __package__)
    sources = sorted((_ROOT / "triton_kernels").rglob("*.py")) + sorted((_ROOT / "triton_kernels").rglob("*.json"))
    for path in [*([Path(extension.origin)] if extension and extension.origin else []), *sources]:
        digest.update(path.read_bytes())
    if importlib.util.find_spec("triton") is not None:
        digest.update(triton_version().encode())
    return digest.hexdigest()[:16]


def triton_version() -> str:
    """Of the package, however it was distributed: nightly builds of torch come with one of another name."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module("triton").__version__)


def path(of: Identity) -> Path:
    name = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    return FOLDER.expanduser() / f"{name}.json"


def save(proof: Proof) -> Path:
    """Store it for this user, and use it from now on.

    Raises:
        ValueError: the cache can not be written.
    """
    try:
        file = path(proof.identity)
    except RuntimeError as error:
        raise ValueError(f"proof: cannot write it to {FOLDER}: {error}") from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.unwritable(file, error, "proof") from None
    text = json.dumps({"identity": proof.identity._asdict(), "outcomes": proof.outcomes}, indent=1)
    with files.atomic_write(file, "proof") as part:
        part.write_text(text + "\n")
    forget()
    return file


def load(of: Identity) -> Proof | None:
    """The stored proof of exactly this; None if there is none, or if it can not be read."""
    try:
        stored = json.loads(path(of).read_text())
        proof = Proof(Identity(**stored["identity"]), stored["outcomes"])
        whole = all(isinstance(o, str) for kernels in proof.outcomes.values() for o in kernels.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):  # RuntimeError: no home folder
        return None
    return proof if whole and proof.identity == of else None


@functools.cache
def of_device(device: torch.device) -> Proof | None:
    """Of a GPU that is here; read once."""
    return load(identity(device))


def notice(device: torch.device) -> str:
    """One line for who opens a world on a GPU whose kernels are not proved; "" if they are, and elsewhere."""
    if device.type != "cuda" or of_device(device) is not None:
        return ""
    here = identity(device)
    why = "are not proved on this GPU"
    for other in _files():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            before = Identity(**json.loads(other.read_text())["identity"])
            if before.gpu == here.gpu:
                changed = [f"{name} {was}" for name, was, now in zip(here._fields, before, here) if was != now]
                why = f"were proved on this GPU with another {' and '.join(changed)}"
    return (
        f"inferix: the CUDA kernels {why} ({here.gpu}, driver {here.driver}), so Triton's run first: "
        "`inferix doctor --prove` tries them in a minute"
    )


def _files() -> list[Path]:
    """Of all proofs; none where there is no home folder, or it can't be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return sorted(FOLDER.expanduser().glob("*.json"))
    return []


def forget() -> None:
    """Read proofs again at the next call."""
    global read
    read = object()
    of_device.cache_clear()
    _ranked.cache_clear()


def candidates(
    op: str, device: torch.device, formats: Sequence[str], eight_bit: bool, given: Sequence[str], proved: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Backends for a call on a GPU that is here, in order, each with "" or why it must not run.

    Args:
        formats: of the pages that the call reads or writes.
        eight_bit: it allows products of 8 bits, which are kernels of their own.
        given: backends in the order for what is unproved; proved: for what was proved right.
    """
    return _ranked(op, device, tuple(formats), eight_bit, tuple(given), tuple(proved))


@functools.lru_cache(4096)
def _ranked(
    op: str,
    device: torch.device,
    formats: tuple[str, ...],
    eight_bit: bool,
    given: tuple[str, ...],
    proved: tuple[str, ...],
) -> tuple[tuple[str, str], ...]:
    return rank(of_device(device), op, formats, eight_bit, given, proved)


def rank(
    proof: Proof | None,
    op: str,
    formats: Sequence[str],
    eight_bit: bool,
    given: Sequence[str],
    proved: Sequence[str],
) -> tuple[tuple[str, str], ...]:
    """Those proved right first, in the order `proved`; then the unproved, in the order `given`; then those that are
    wrong here, with the reason."""
    said = {name: "" for name in given}
    if proof is not None:
        for name in given:
            said[name] = proof.outcome(name, [kernel(op, f, eight_bit) for f in formats])
    right = [(name, "") for name in proved if said[name] == RIGHT]
    unproved = [(name, "") for name in given if not said[name]]
    wrong = [(name, f"{said[name]} (proved on this GPU)") for name in given if said[name].startswith("wrong")]
    return (*right, *unproved, *wrong)
