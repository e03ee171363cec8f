"""The machine: absent libraries are quiet, GPUs are found by UUID; and Prometheus."""

import sys
from types import SimpleNamespace

import pytest

from inferix import profile
from inferix.profile import system


def test_without_psutil_and_without_a_gpu_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = system.Sampler(period=0.001)
    sampler.sample()
    sampler.stop()
    assert sampler.samples.kept[0][1] == {} and not sampler._thread.is_alive()
    assert capsys.readouterr() == ("", "")


def test_the_processor_is_sampled():
    pytest.importorskip("psutil", reason="needs the extra `profile`")
    sampler = system.Sampler(period=60.0)
    sampler.sample()
    sampler.stop()
    at, values = sampler.samples.kept[0]
    assert values.keys() == {"CPU %", "resident bytes"} and at > 0
    assert values["resident bytes"] > 2**20 and values["CPU %"] > 0


class Nvml:
    """As pynvml, of a machine with two GPUs of which CUDA_VISIBLE_DEVICES leaves the second."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1
    gone = False

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-first": 1, "GPU-second": 2}[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle):
        if self.gone:
            raise OSError("the driver has gone")
        return SimpleNamespace(used=handle * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=10 * handle)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 250_000

    def nvmlDeviceGetTemperature(self, handle, which):
        return 40 + handle

    def nvmlDeviceGetClockInfo(self, handle, which):
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 4


def test_a_gpu_is_the_one_that_torch_sees(monkeypatch):
    import torch

    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(system, "_uuids", lambda torch: ["second"])
    sampler = system.Sampler(period=60.0)
    sampler.sample()
    values = sampler.samples.kept[0][1]
    assert values["GPU 0 bytes"] == 2 * 2**30 and values["GPU 0 %"] == 20 and values["GPU 0 W"] == 250
    nvml.gone = True
    sampler.sample()
    sampler.stop()
    assert "GPU 0 %" not in sampler.samples.kept[1][1] and len(sampler._readers) == len(system._processor())


def test_a_driver_that_refuses_is_quiet(monkeypatch):
    import torch

    class Refusing:
        def nvmlInit(self):
            raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", Refusing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert system._gpus() == []


def test_prometheus_reads_what_was_measured(clock):
    parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra `profile`")
    from prometheus_client import Gauge

    from inferix.profile.rows import Figures

    figures = Figures()
    with profile.Profiling("block") as run:
        figures.processes["worlds"] = run.totals
        for _ in range(2):
            with profile.block() as block, profile.timed("denoise"):
                clock.now += 3
                block.frames = 4
            profile.count("pages evicted", 2)
            profile.metric('odd "name"\n', 5)
            figures.blocks.observe(3)
    Gauge("inferix_viewers", "Of another part", registry=figures.registry).set(7)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(figures.text().decode())
        for sample in family.samples
    }
    assert samples["inferix_frames_total", "worlds"] == 8 and samples["inferix_blocks_total", "worlds"] == 2
    assert samples["inferix_span_seconds_total", "denoise", "worlds"] == 6
    assert samples["inferix_spans_total", "denoise", "worlds"] == 2
    assert samples["inferix_counted_total", "pages evicted", "worlds"] == 4
    assert samples["inferix_metric", 'odd "name"\n', "worlds"] == 5
    assert samples["inferix_block_seconds_count",] == 2 and samples["inferix_viewers",] == 7
