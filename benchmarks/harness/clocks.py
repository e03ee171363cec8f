"""Clock, power and temperature of the GPU, with every row: a figure at half the clock says nothing about the kernel."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

QUERY = {"SM MHz": "clocks.sm", "power W": "power.draw", "temperature C": "temperature.gpu"}


class NotRead(Exception):
    """The driver's library is not there, or it refuses."""


@contextlib.contextmanager
def library() -> Iterator[tuple[Any, Any]]:
    """with library() as (pynvml, handle): the handle is of torch's current GPU. Raises NotRead, inside too."""
    try:
        import pynvml
    except ImportError as error:
        raise NotRead("pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(_uuid())
    except (pynvml.NVMLError, AttributeError) as error:  # refused, or older than what is asked of it
        raise NotRead(str(error)) from error


def now(device: str) -> dict[str, float]:
    """As metrics of a row: by pynvml, else by nvidia-smi; empty on a CPU and where neither answers."""
    if device != "cuda":
        return {}
    try:
        with library() as (pynvml, gpu):
            return {
                "SM MHz": float(pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
                "power W": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "temperature C": float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
            }
    except NotRead:
        return _from_nvidia_smi()


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _from_nvidia_smi() -> dict[str, float]:
    query = f"--query-gpu={','.join(QUERY.values())}"
    command = ["nvidia-smi", f"--id={_uuid()}", query, "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return {name: float(value) for name, value in zip(QUERY, said.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
