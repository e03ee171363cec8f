"""What a figure was measured on: device, software, clocks, and the state of the sources. The header of every record."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import clocks, folders
from .ledger import ROOT, fingerprints
from .measure import Settings

# nvmlClocksEventReasons: the bits that mean slower than asked for.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


def header(settings: Settings, note: str = "") -> dict[str, Any]:
    commit, dirty = revision()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "note": note,
        "device": device_name(settings.device),
        "architecture": architecture(settings.device),
        "commit": commit,
        "dirty": dirty,
        "kernels": fingerprints(),
        "isa": our_isa() if settings.device == "cpu" else "",
        "settings": {"timer": settings.timer, "cold": settings.cold, "threads": torch.get_num_threads()},
        "load": [round(x, 2) for x in os.getloadavg()],
        "software": software(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpu": gpu() if settings.device == "cuda" else {},
    }


def brief(settings: Settings) -> dict[str, Any]:
    """The lines of a header that a reader of the tables needs."""
    head = header(settings)
    return {
        name: head[name] for name in ("device", "architecture", "isa", "commit", "dirty", "settings", "load", "gpu")
    }


def software() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    others = {name: version for name in folders.names() if (version := folders.installed(name))}
    return {**versions, **others, "system": f"{platform.system()} {platform.release()}"}


def our_isa() -> str:
    """The instructions of our CPU kernels; empty where the extension is not built."""
    try:
        from inferix_kernels import compiled
    except ImportError:
        return ""
    return str(compiled.ISA.name)


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """(commit, are there changes to it); ("unknown", True) outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Records are results, not sources: writing one does not make the tree that they speak of another.
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/records")
        return git("rev-parse", "--short=10", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def architecture(device: str) -> str:
    """What kernels are compiled for: sm_90, or x86_64 AVX512."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def slug(device_name: str) -> str:
    """A device as a folder is named."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def gpu() -> dict[str, Any]:
    """Memory, driver, clocks, power and what slows the GPU down now; what can't be read says so."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": properties.L2_cache_size,
    }
    try:
        with clocks.library() as (pynvml, handle):
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            return {
                **facts,
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "clocks": {
                    name: pynvml.nvmlDeviceGetClockInfo(handle, kind)
                    for name, kind in (("sm MHz", pynvml.NVML_CLOCK_SM), ("memory MHz", pynvml.NVML_CLOCK_MEM))
                },
                "max clock MHz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "power cap W": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
                "temperature C": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
                "throttled by": [words for bit, words in THROTTLES.items() if reasons & bit],
            }
    except clocks.NotRead as error:
        return {**facts, "clocks": f"not read: {error}"}


def lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """A header for people."""
    shown = []
    for name, value in facts.items():
        if isinstance(value, dict):
            shown += [f"{indent}{name}", *lines(value, indent + "  ")] if value else []
        elif value not in ("", []):
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            shown.append(f"{indent}{name:<14} {text}")
    return shown
