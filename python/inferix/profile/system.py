"""Processor, memory and GPU, sampled on a thread: by psutil and by NVIDIA's management library, where they are.

Neither is needed: without psutil, or a driver, their numbers are missing and nothing is said. GPUs are found by their
UUIDs, so that CUDA_VISIBLE_DEVICES is respected: what torch calls cuda:0 need not be the first one of the machine.
The GPU half has never run on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from inferix_kernels._recording import Thinned

PERIOD = 0.4  # seconds between samples: 2.5 a second
Read = Callable[[], dict[str, float]]


class Sampler:
    """Samples until it is stopped.

    Args:
        period: seconds between samples.

    Attributes:
        samples: (perf_counter, {name: value}), thinned out once there are many.
        paused: no sample is taken.
    """

    def __init__(self, period: float = PERIOD):
        self.period, self.paused = period, False
        self.samples: Thinned[tuple[float, dict[str, float]]] = Thinned()
        self._readers: list[Read] = [*_processor(), *_gpus()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="profiler")
        if self._readers:
            self._thread.start()

    def sample(self) -> None:
        """Take one now."""
        values: dict[str, float] = {}
        for read in tuple(self._readers):
            try:
                values |= read()
            except Exception:  # a driver that went away: its numbers end here
                self._readers.remove(read)
        self.samples.append((time.perf_counter(), values))

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stop.wait(self.period):
            if not self.paused:
                self.sample()


def _processor() -> list[Read]:
    try:
        import psutil
    except ImportError:
        return []
    process, before = psutil.Process(), (time.process_time(), time.perf_counter())

    def read() -> dict[str, float]:
        nonlocal before  # psutil's cpu_percent says the same, and opens three files for it
        (spent, then), before = before, (time.process_time(), time.perf_counter())
        return {
            "CPU %": 100 * (before[0] - spent) / (before[1] - then),
            "resident bytes": float(process.memory_info().rss),
        }

    return [read]


def _gpus() -> list[Read]:
    """One for each GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver to talk to
        return []
    return [reader(pynvml, f"GPU-{uuid}", number) for number, uuid in enumerate(_uuids(torch))]


def _uuids(torch: Any) -> list[str]:
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def reader(nvml: Any, uuid: str, number: int) -> Read:
    """What reads one GPU.

    Args:
        nvml: the module pynvml.
        uuid: of the GPU, "GPU-...".
        number: as torch counts it.
    """
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    name = f"GPU {number}"

    def read() -> dict[str, float]:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        busy = nvml.nvmlDeviceGetUtilizationRates(handle)
        return {
            f"{name} %": float(busy.gpu),
            f"{name} bytes": float(memory.used),
            f"{name} W": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            f"{name} C": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            f"{name} MHz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            f"{name} throttled": float(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }

    return read
