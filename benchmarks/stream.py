"""A world on its page, as people have it: a server, a headless Chromium, keys pressed, pixels seen.

    python -m benchmarks run stream [--seconds 60] [--json FILE]

Needs the extra `stream`, selenium, and Debian's chromium and chromium-driver. The server runs in a process of its own
and its worlds in another, so that what encoding and transport cost can be separated from what the world costs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.util
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .harness.measure import Settings
from .harness.rows import Row

# World, transport, and what must be: key to pixel within a block and 150 ms, the way of a picture within 100 ms.
CASES = [
    ("tiny", "webrtc"),
    ("tiny", "websocket"),
    ("synthetic 832 x 480", "webrtc"),
    ("synthetic 832 x 480", "websocket"),
]
BLOCK_MS = 3 * 1000 / 16
PATIENCE = 60.0  # seconds for a page to come to anything, on a slow machine
GOALS = {
    "key to pixel p95": (BLOCK_MS + 150, "ms", "tiny"),
    "picture's way p95": (100.0, "ms", "synthetic"),
    "freezes": (0, "", ""),
    "server CPU per video second": (0.1, "s", ""),
    "server memory grew": (16, "MiB", ""),
}
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,900",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
# Gaps of more than 150 ms over the usual interval are what WebRTC calls freezes; here they are of pictures seen.
WATCH = """
window.gaps = []; let before = null;
inferix.figures.delays.length = inferix.figures.ways.length = 0;
inferix.screen.addEventListener("seen", ({detail: {seen}}) => { if (before) gaps.push(seen - before); before = seen; });
"""
STATS = """
const done = arguments[0], peer = inferix.link.peer;
if (!peer) done(null);
else peer.getStats().then((all) => done([...all.values()].find((s) => s.type === "inbound-rtp" && s.kind === "video")));
"""


def run(settings: Settings, shapes: Sequence[str]) -> Iterator[Row]:
    """One row per world and transport, `settings.seconds` of video each; its note names the goals that were missed."""
    if settings.rounds == 0:  # to check and not to time: that is what tests/test_stream_*.py do
        return
    for world, transport in CASES:
        row = Row("stream", "play", world, transport, "-", settings.device, "ok")
        if absent := _absent():
            yield dataclasses.replace(row, status="absent", note=absent)
            continue
        missed = []
        for measure, value, unit in _measure(world, transport, settings.seconds):
            row.metrics[f"{measure}, {unit}" if unit else measure] = value
            goal, _, only = GOALS.get(measure, (math.inf, "", ""))
            if world.startswith(only) and value > goal:
                missed.append(f"{measure} {value:.4g} > {goal:g} {unit}".rstrip())
        row.note = "missed: " + "; ".join(missed) if missed else "all goals met"
        yield row


def _absent() -> str:
    """What a browser test needs and this machine lacks."""
    modules = [name for name in ("aiohttp", "aiortc", "selenium") if importlib.util.find_spec(name) is None]
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    hints = [f"pip install {' '.join(modules)}"] * bool(modules) + ["apt install chromium chromium-driver"] * bool(
        programs
    )
    return "; ".join(hints)


def _measure(world: str, transport: str, seconds: float) -> Iterator[tuple[str, float, str]]:
    with _server(world) as (process, address), _browser() as browser:
        browser.get(f"{address}?transport={transport}")
        _until(browser, "document.body.dataset.phase === 'running' && inferix.link.transport")
        assert browser.execute_script("return inferix.link.transport").lower().startswith(transport)
        settle = min(5.0, seconds)  # codecs and clocks
        time.sleep(settle)
        browser.execute_script(WATCH)
        before, begun = _used(process.pid), time.monotonic()
        delays, ways = _press(browser, seconds)
        _until(browser, "gaps.length")
        video, after = time.monotonic() - begun, _used(process.pid)
        gaps = np.array(browser.execute_script("return gaps"))
        stats = browser.execute_async_script(STATS)
    for name, samples in (("key to pixel", delays), ("picture's way", ways)):
        for share in (50, 95):
            yield f"{name} p{share}", float(np.percentile(samples, share)), "ms"
    yield "pictures seen per second", len(gaps) / video, ""
    yield "interval, standard deviation", float(gaps.std()), "ms"
    yield "interval, longest", float(gaps.max()), "ms"
    usual = gaps.mean()
    yield "freezes", int((gaps > max(3 * usual, usual + 150)).sum()), ""
    if stats:
        yield "freezes as WebRTC counts", stats["freezeCount"], ""
        yield "jitter buffer", 1000 * stats["jitterBufferDelay"] / max(1, stats["jitterBufferEmittedCount"]), "ms"
        yield "received", 8e-6 * stats["bytesReceived"] / (video + settle), "Mbit/s"
    yield "server CPU per video second", (after[0] - before[0]) / video, "s"
    yield "server memory grew", after[1] - before[1], "MiB"


def _press(browser: Any, seconds: float) -> tuple[list[float], list[float]]:
    """Press keys at odd moments; ms from key to pixel, and from encoder to pixel."""
    generator, end = random.Random(0), time.monotonic() + seconds
    delays: list[float] = []
    ways: list[float] = []
    # A slow machine may show nothing in a second: until something was seen, there is nothing to tell.
    while (now := time.monotonic()) < end or not (delays and ways):
        if now > end + PATIENCE:
            raise TimeoutError("the page never showed what a key had changed")
        key = generator.choice("wasd")
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": f"Key{key.upper()}"}
            browser.execute_cdp_cmd("Input.dispatchKeyEvent", event)
            time.sleep(generator.uniform(0.25, 0.5))
        delays += browser.execute_script("return inferix.figures.delays.splice(0)")
        ways += browser.execute_script("return inferix.figures.ways.splice(0)")
    return delays, ways


def _used(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, its children apart, and its resident MiB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = os.sysconf("SC_CLK_TCK")
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / ticks, pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def _server(world: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "benchmarks.stream", world]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def _serve(world: str) -> None:
    from inferix.commands.interactive import open_world
    from inferix.stream.server import Server, serve
    from inferix.stream.testing import open_bars

    if world == "tiny":
        settings: dict[str, Any] = {"kv": "int8", "window": None, "sink": None, "seed": 6, "backend": "auto"}
        opener: Any = functools.partial(open_world, "tiny", undo_seconds=15, worlds=2, **settings)
    else:
        opener = functools.partial(open_bars, size=(480, 832), texture=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(opener, port=0, folder=folder, seed=6)
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(server, lambda address: print(address, flush=True)))


@contextmanager
def _browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        driver.set_script_timeout(30)
        try:
            yield driver
        finally:
            driver.quit()


def _until(browser: Any, expression: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not browser.execute_script(f"return {expression}"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the page never came to {expression}")
        time.sleep(0.1)


if __name__ == "__main__":
    _serve(sys.argv[1])
