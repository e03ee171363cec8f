"""What else could do our kernels' work: adapters, one function each.

An adapter is a function (inputs, format) -> Prepared under @peer, in the module of its family, or in <family>_cpu.py if
its library works on processors alone. It lays the operands out as its library wants them, off the clock. third_party
pins the versions that were read when it was written: in peers.txt, and in peers/ those with a folder of their own.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from ..harness import folders
from ..harness.case import LIMITS, Contender, Limit, Prepared

PINS = Path(__file__).parent.parent.parent / "third_party" / "peers.txt"
Adapter = Callable[..., Prepared]  # (inputs, format)


@dataclasses.dataclass(frozen=True)
class Peer:
    """An adapter and what it needs.

    Attributes:
        op: the case's op, where a family has several; "" is any.
        formats: of K and V, or of the weights, that it takes.
        modules: one of which must be importable, best first.
        package: what pip calls it.
    """

    family: str
    op: str
    name: str
    prepare: Adapter
    formats: tuple[str, ...]
    devices: tuple[str, ...]
    modules: tuple[str, ...]
    package: str

    def absent(self) -> str:
        """Why it can't be tried here; empty if it can."""
        if any(map(is_here, self.modules)) or folders.installed(self.package):
            return ""
        if self.package in folders.names():
            return f"python -m benchmarks peers install {self.package}"
        return f"pip install {pins().get(self.package, self.package)}"


PEERS: list[Peer] = []


def is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a submodule of what is not there
        return False


def peer(
    family: str,
    name: str,
    formats: Sequence[str],
    devices: Sequence[str] = ("cuda",),
    module: str | tuple[str, ...] = "torch",
    package: str | None = None,
    op: str = "",
) -> Callable[[Adapter], Adapter]:
    """Register an adapter; arguments as the fields of Peer. `package` is given where it differs from `module`."""
    modules = (module,) if isinstance(module, str) else module

    def register(prepare: Adapter) -> Adapter:
        PEERS.append(Peer(family, op, name, prepare, tuple(formats), tuple(devices), modules, package or modules[0]))
        return prepare

    return register


def contenders(
    family: str,
    device: str,
    flops: float,
    nbytes: Callable[[str], int],
    limits: Callable[[str], Limit] = LIMITS.__getitem__,
    op: str = "",
) -> list[Contender]:
    """The family's peers for this device, as contenders.

    Args:
        flops, nbytes: of the work; nbytes by format.
        limits: of the error, by format.
        op: peers of this op alone.
    """
    register(family)
    return [
        Contender(
            peer.name,
            format,
            partial(peer.prepare, format=format),
            flops,
            nbytes(format),
            limits(format),
            absent=peer.absent(),
        )
        for peer in PEERS
        if peer.family == family and peer.op in ("", op) and device in peer.devices
        for format in peer.formats
    ]


def overview() -> list[list[str]]:
    """Of every registered peer: name, package and version, devices, families with formats, and how to get it."""
    lines = []
    for name in dict.fromkeys(peer.name for peer in PEERS):
        mine = [peer for peer in PEERS if peer.name == name]
        formats = {
            family: dict.fromkeys(f for p in mine if p.family == family for f in p.formats)
            for family in families_of(mine)
        }
        work = "; ".join(f"{family}: {', '.join(found)}" for family, found in formats.items())
        devices = ", ".join(dict.fromkeys(device for peer in mine for device in peer.devices))
        package = pins().get(mine[0].package, mine[0].package)
        lines.append([name, package, devices, work, mine[0].absent() or "here"])
    return lines


def families_of(peers: Sequence[Peer]) -> list[str]:
    return list(dict.fromkeys(peer.family for peer in peers))


def register(family: str) -> None:
    """Import the family's adapters."""
    for module in (f".{family}", f".{family}_cpu"):
        if importlib.util.find_spec(module, __package__):
            importlib.import_module(module, __package__)


@cache
def pins() -> dict[str, str]:
    """Package -> requirement line, of all peers."""
    lines = [line.split("#")[0].strip() for line in PINS.read_text().splitlines()]
    lines += [folders.requirements(name)[0] for name in folders.names()]
    return {line.split("==")[0]: line for line in lines if line}
