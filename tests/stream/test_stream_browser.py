"""The page in a real browser, headless: what is seen is read off the canvas, where bars say which picture it is."""

import asyncio
import functools
import io
import shutil
import tempfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("aiortc", reason="needs the extra `stream`")
pytest.importorskip("selenium", reason="needs selenium")

import aioice.ice
from selenium import webdriver
from selenium.webdriver.common.by import By

from inferix.commands.interactive import open_world
from inferix.stream.server import Server
from inferix.stream.testing import ACTIONS, BITS, CELL, WORDS, open_bars

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver, which are not here"
)
PATIENCE = 40
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,900",
    "--autoplay-policy=no-user-gesture-required", "--allow-loopback-in-peer-connection",
]  # fmt: skip
# Notes of every picture seen: what its bars say, and what the server said of it.
WATCH = """
window.seen = [];
const row = Object.assign(document.createElement("canvas"), {width: BITS * CELL, height: 1});
const scratch = row.getContext("2d", {willReadFrequently: true});
inferix.screen.addEventListener("seen", ({detail: {frame}}) => {
  const read = (canvas) => {
    scratch.drawImage(canvas, 0, -CELL / 2);
    const data = scratch.getImageData(0, 0, BITS * CELL, 1).data;
    let code = 0;
    for (let i = 0; i < BITS; i++) code = code * 2 + (data[4 * (i * CELL + CELL / 2)] > 127 ? 1 : 0);
    return [code >> 8, code >> 4 & 15, code & 15];
  };
  if (!frame) return seen.push(null);
  const block = inferix.blocks.get(frame.block) ?? null;
  const bars = Object.fromEntries(frame.worlds.map((name) => [name, read(inferix.screen.canvases[name])]));
  seen.push({frame, block, bars});
});""".replace("BITS", str(BITS)).replace("CELL", str(CELL))


class Page:
    """A browser at a server."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self, query="", before=""):
        """Load the page; `before` runs ahead of its own script."""
        if before:
            self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": before})
        self.driver.get(f"http://127.0.0.1:{self.server.port}/{query}")
        self.until("document.body.dataset.phase === 'running'")
        self.run(WATCH)

    def run(self, script):
        return self.driver.execute_script(script)

    def until(self, expression, seconds=PATIENCE):
        """The value of a JavaScript expression once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {expression}")):
            assert time.monotonic() < deadline, f"{expression} never came; {self.log()}"
            time.sleep(0.05)
        return value

    def click(self, selector):
        self.until(f"!document.querySelector({selector!r}).disabled")
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def key(self, key, down=True):
        kind = "keyDown" if down else "keyUp"
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": f"Key{key.upper()}"})

    def watch(self, count, condition="true"):
        """The next `count` pictures that are so."""
        self.run("seen.length = 0")
        chosen = f"seen.filter((s) => s && s.block && ({condition}))"
        return self.until(f"{chosen}.length >= {count} && {chosen}")

    def log(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tempfile.mkdtemp()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def loop():
    """An event loop in a thread of its own, since Selenium waits in this one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    addresses = aioice.ice.get_host_addresses
    if not addresses(True, False):  # a sandbox without a network: this machine's own address will do
        aioice.ice.get_host_addresses = lambda *_: ["127.0.0.1"]
    yield loop
    aioice.ice.get_host_addresses = addresses
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def serve(loop, opener, folder):
    async def start():
        server = Server(opener, port=0, folder=str(folder))
        await server.start()
        return server

    return asyncio.run_coroutine_threadsafe(start(), loop).result()


def end(loop, server):
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()


@pytest.fixture(scope="module")
def server(loop, tmp_path_factory):
    server = serve(loop, open_bars, tmp_path_factory.mktemp("bars"))
    yield server
    end(loop, server)


@pytest.fixture
def page(driver, server):
    page = Page(driver, server)
    yield page
    driver.get("about:blank")
    if server.session.player.paused:
        asyncio.run_coroutine_threadsafe(server.session.command("resume"), server.session.remote._loop).result()


def identical(seen):
    """Is every picture the one that the server said it was, under the keys and words that it said?"""
    for picture in seen:
        frame, block = picture["frame"], picture["block"]
        for name, (number, action, _) in picture["bars"].items():
            assert number == block["positions"][name] + frame["frame"] - block["first"]
            assert ACTIONS[action] == block["actions"][name]


def test_video_plays_and_every_picture_is_the_one_it_should_be(page):
    page.open("?transport=webrtc")
    page.until("inferix.link.transport === 'WebRTC' && inferix.link.origin !== null")
    assert page.run("return inferix.link.video.srcObject") is None, "pictures are taken from the track itself"
    seen = page.watch(24)
    identical(seen)
    numbers = [picture["frame"]["frame"] for picture in seen]
    assert numbers == sorted(set(numbers)), "pictures come in their order, none twice"
    assert not page.log()


def test_a_browser_that_gives_no_pictures_of_a_track_shows_it_as_a_video(driver, server):
    driver.switch_to.new_window("tab")
    page = Page(driver, server)
    page.open("?transport=webrtc", before="delete window.MediaStreamTrackProcessor")
    page.until("inferix.link.transport === 'WebRTC' && inferix.link.video.videoWidth > 0")
    for picture in page.watch(
        12
    ):  # on a busy machine the <video> may be one further than the callback that tells of it
        number = picture["block"]["positions"]["a"] + picture["frame"]["frame"] - picture["block"]["first"]
        assert picture["bars"]["a"][0] - number in (0, 1)
    driver.close()
    driver.switch_to.window(driver.window_handles[0])


@pytest.mark.parametrize("query", ["?transport=webrtc", "?transport=websocket", "?transport=jpeg"])
def test_a_key_shows_in_the_pixels(page, query):
    page.open(query)
    page.watch(3)
    page.key("w")
    seen = page.watch(3, "s.bars.a[1] === 1")
    identical(seen)
    assert seen[0]["block"]["applied_seq"] >= 1
    page.key("w", down=False)
    identical(page.watch(3, "s.bars.a[1] === 0"))
    delay = page.run("return inferix.figures.delays.at(-1)")
    assert 0 < delay < 1000 * PATIENCE and str(round(delay)) == page.run(
        "return document.getElementById('f-latency').textContent"
    )


def test_words_show_and_the_page_says_when(page):
    page.open()
    page.watch(3)
    page.click(".chip:nth-child(2)")
    seen = page.watch(3, "s.bars.a[2] === 1")
    page.until("document.getElementById('effect').textContent.includes('in force')")
    page.until("document.querySelector('.chip:nth-child(2)').getAttribute('aria-pressed') === 'true'")
    identical(seen)
    field = page.driver.find_element(By.ID, "words")
    field.send_keys("nonsense\n")
    page.until("document.getElementById('notice').textContent.includes('must be one of calm')")
    field.clear()
    field.send_keys("calm\n")
    assert WORDS[page.watch(1, "s.bars.a[2] === 0")[0]["bars"]["a"][2]] == "calm"


def test_redoing_memory_is_offered_where_it_can_be_done(page, monkeypatch):
    box = "document.getElementById('recache-choice')"
    page.open("?transport=websocket")
    assert page.run(f"return {box}.hidden"), "a model with actions"
    monkeypatch.setitem(page.server.session.model, "can_recache", True)
    page.open("?transport=websocket")
    assert not page.run(f"return {box}.hidden")


def test_where_the_time_goes_is_shown_and_looked_at_closer(page):
    page.open("?transport=websocket")
    page.until("document.getElementById('split-key').textContent.includes('denoise')")
    assert not page.run("return document.getElementById('profile').checked")
    page.click("#profile")
    page.until("inferix.state().profile === 'layer'")
    page.click("#profile")
    page.until("inferix.state().profile === 'block'")


def test_a_world_without_words_shows_its_keys(page, monkeypatch):
    page.open("?transport=websocket")
    told = {"words": False, "actions": ["nomove", "forward", "camera_l"]}
    told["keys"] = {" ": "nomove", "w": "forward", "j": "camera_l", "arrowleft": "camera_l"}
    for name, value in told.items():
        monkeypatch.setitem(page.server.session.model, name, value)
    page.open("?transport=websocket")
    page.until("document.getElementById('hint').textContent.startsWith('w forward · j camera_l · p pauses')")
    assert page.run("return ['say', 'pad'].every((id) => document.getElementById(id).hidden)")
    page.run("inferix.pads.set('gamepad', 'up')")
    assert page.run("return inferix.pads.held.length") == 0, "it knows no such action"


def test_pause_stops_the_pictures_and_step_makes_one_block(page):
    page.open()
    page.watch(3)
    page.click("#pause")
    page.until("inferix.state().paused")
    last, _ = page.server.session.player._newest  # nothing is shown any more
    page.until(f"seen.some((s) => s && s.frame.frame === {last})")
    time.sleep(1)  # another would have come by then, on a machine that is not busy
    assert page.run(f"return seen.every((s) => !s || s.frame.frame <= {last})")
    last = page.run("return Math.max(...inferix.blocks.keys())")
    page.click("#step")
    page.until(f"seen.some((s) => s && s.frame.block === {last + 1} && s.frame.frame === s.block.first + 2)")
    assert page.run("return Math.max(...inferix.blocks.keys())") == last + 1
    page.click("#pause")
    page.watch(6)


def test_a_fork_is_shown_beside_and_steered_alone(page):
    page.open()
    page.watch(3)
    page.click("#fork")
    page.watch(3, "s.frame.worlds.length === 2")
    page.key("d")
    seen = page.watch(3, "s.bars.b && s.bars.b[1] === 4")
    page.key("d", down=False)
    identical(seen)
    assert all(picture["bars"]["a"][1] == 0 for picture in seen)
    page.click("[data-world=b] .close")
    page.watch(3, "s.frame.worlds.length === 1")


def test_the_slider_takes_the_world_back(page):
    page.open()
    made = page.until("inferix.state().made.a > 24 && inferix.state().made.a")
    past = "document.getElementById('past')"
    page.run(f"{past}.value = {made - 15}")
    for event in ("input", "change"):
        page.run(f"{past}.dispatchEvent(new Event('{event}'))")
    page.until("!inferix.state().paused")
    numbers = [picture["bars"]["a"][0] for picture in page.watch(2)]
    assert numbers[0] < made + 30
    identical(page.watch(6))


def test_the_slider_dropped_where_it_was_goes_on(page):
    page.open("?transport=websocket")
    page.until("inferix.state().made.a > 24")
    past = "document.getElementById('past')"
    for value in ("min", "max"):  # there and back; not every browser calls that a change
        page.run(f"{past}.value = {past}.{value}; {past}.dispatchEvent(new Event('input'))")
    page.until("inferix.state().paused")
    page.run(f"{past}.dispatchEvent(new Event('pointerup', {{bubbles: true}}))")
    page.until("!inferix.state().paused")
    assert "−" not in page.run("return document.getElementById('when').textContent")
    identical(page.watch(3))


def test_where_webrtc_is_missing_or_finds_no_way_the_websocket_carries_on(driver, server):
    for before, transport in (
        ("delete window.RTCPeerConnection", "WebSocket · H.264"),
        # Only relays may be used, and there is none: ICE finds no way.
        ("const R = RTCPeerConnection; window.RTCPeerConnection = class extends R {"
         " constructor(c) { super({...c, iceTransportPolicy: 'relay'}); } }", "WebSocket · H.264"),
        ("delete window.RTCPeerConnection; delete window.VideoDecoder", "WebSocket · JPEG"),
    ):  # fmt: skip
        driver.switch_to.new_window("tab")
        page = Page(driver, server)
        page.open(before=before)
        assert page.until("inferix.link.transport") == transport
        identical(page.watch(6))
        driver.close()
        driver.switch_to.window(driver.window_handles[0])


def test_a_second_browser_watches_until_the_wheel_is_free(page):
    page.open()
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    second = Page(page.driver, page.server)
    second.open("?transport=websocket")
    second.until("document.getElementById('pause').disabled")
    second.until("document.getElementById('hint').textContent.includes('watching')")
    other = page.driver.current_window_handle
    page.driver.switch_to.window(first)
    page.driver.get("about:blank")
    page.driver.switch_to.window(other)
    second.until("document.querySelector('#hint button')")
    second.run("document.querySelector('#hint button').click()")
    second.until("!document.getElementById('pause').disabled")
    page.driver.close()
    page.driver.switch_to.window(first)


def test_a_crash_shows_and_the_page_starts_again(page):
    page.open()
    page.watch(3)
    page.run("inferix.link.request('prompt', {text: 'exit'})")
    page.until("document.body.dataset.phase === 'crashed'")
    assert "exit code 3" in page.run("return document.getElementById('veil-more').textContent")
    page.click("#restart")
    page.until("document.body.dataset.phase === 'running'")
    identical(page.watch(6))


def test_the_tiny_world_looks_like_this(driver, loop, tmp_path, request):
    """With --screenshot FILE, the picture in the README."""
    settings = {"kv": "int8", "window": None, "sink": None, "seed": 0, "backend": "auto"}
    opener = functools.partial(open_world, "tiny", undo_seconds=15, worlds=2, **settings)
    server = serve(loop, opener, tmp_path)
    try:
        asyncio.run_coroutine_threadsafe(_reset(server, 6), loop).result()
        page = Page(driver, server)
        page.open()
        keep = request.config.getoption("--screenshot")
        for key in "wdsdw" if keep else "w":
            page.until("inferix.screen.fps(performance.now()) > 0")
            page.key(key)
            page.until("inferix.pads.pressed.size === 0")
            page.key(key, down=False)
        page.click("#fork")
        page.until("inferix.state().worlds.length === 2")
        page.until("[...inferix.blocks.values()].at(-1).positions.b")
        page.click(".chip:nth-child(4)")
        page.until("document.getElementById('effect').textContent.includes('in force')")
        last = page.run("return inferix.state().made.b")
        page.until(f"inferix.state().made.b > {last + (12 if keep else 2)}")
        driver.save_screenshot(str(tmp_path / "page.png"))
        shown = Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")
        box = page.run(
            "const b = inferix.screen.canvases.b.getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]"
        )
        world = np.asarray(shown.crop(tuple(map(round, box)))).reshape(-1, 3)
        assert len(np.unique(world // 32, axis=0)) > 5, "a picture with several colours"
        if keep:
            shown.save(keep, optimize=True)
    finally:
        driver.get("about:blank")
        end(loop, server)


async def _reset(server, seed):
    while server.session.phase == "opening":
        await asyncio.sleep(0.05)
    await server.session.command("reset", seed=seed)
