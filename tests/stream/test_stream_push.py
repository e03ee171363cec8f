"""Pushing to RTMP, HLS and files: many blocks through one encoder, and servers that go and come back."""

import contextlib
import itertools
import multiprocessing
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.stream.push import Sink
from inferix.stream.recorder import Recorder
from inferix.stream.testing import BITS, CELL, bars, read_bars

SIZE, FPS, BLOCK = (2 * CELL, BITS * CELL), 32, 3
PATIENCE = 60
MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")


def picture(number):
    made = np.full((*SIZE, 3), 90, np.uint8)
    made[:CELL] = bars(number, number % 5, 0)
    return made


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def numbers_in(path):
    with av.open(str(path)) as container:
        return [read_bars(frame.to_ndarray(format="rgb24"))[0] for frame in container.decode(video=0)]


class Source:
    """Hands pictures to a sink at their pace, in blocks, as a world makes them."""

    def __init__(self, sink):
        self.sink, self.made, self._stop = sink, 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        sink.open(FPS, SIZE, 1)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            for _ in range(BLOCK):
                self.sink.write(picture(self.made))
                self.made += 1
            time.sleep(BLOCK / FPS)

    def close(self):
        self._stop.set()
        self._thread.join()
        self.sink.close()


def _receive(pipe, url, wanted, **options):
    """The process of `receive`: sends all in one."""
    options |= {"fflags": "nobuffer", "probesize": "32"}
    while True:  # who publishes may find nobody, and try again
        with contextlib.suppress(OSError), av.open(url, options=options) as container:
            frames = itertools.islice(container.decode(video=0), wanted)
            seen = [(read_bars(frame.to_ndarray(format="rgb24"))[0], frame.time) for frame in frames]
            if len(seen) == wanted:
                return pipe.send(seen)
        time.sleep(0.1)


def receive(port, wanted, **options):
    """Numbers and times of `wanted` pictures of the stream at a port; listen="1": as the server that it is pushed to.
    In a process, which can be ended."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    arguments = (theirs, f"rtmp://127.0.0.1:{port}/live/key", wanted)
    process = context.Process(target=_receive, args=arguments, kwargs=options, daemon=True)
    process.start()
    try:
        assert mine.poll(PATIENCE), "no stream"
        return zip(*mine.recv())
    finally:
        process.kill()
        process.join()


def test_rtmp_goes_on_block_after_block_and_comes_back_when_the_server_does():
    port = free_port()
    sink = Sink(f"rtmp://127.0.0.1:{port}/live/key", retry=0.1)
    source = Source(sink)
    assert sink.label == "rtmp://127.0.0.1", "the key of the channel is nobody's business"
    for _ in range(2):  # the second time the server was gone in between
        numbers, times = receive(port, 8 * BLOCK, listen="1")
        assert np.all(np.diff(numbers) > 0), "eight blocks in their order"
        assert np.all(np.diff(times) > 0)
    assert sink.connections >= 2
    source.close()
    assert sink.state == "ended"


def test_a_dead_server_costs_pictures_but_no_memory():
    sink = Sink(f"rtmp://127.0.0.1:{free_port()}/live/key", retry=0.1)
    sink.open(FPS, SIZE, 1)
    for number in range(500):
        sink.write(picture(number))
    assert sink._queue.qsize() <= 64 and sink.dropped >= 400
    started = time.monotonic()
    sink.close()
    assert time.monotonic() - started < PATIENCE


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    """It takes the connection and then is silent, as a server does that hangs."""
    monkeypatch.setattr("inferix.stream.push.PATIENCE", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        sink = Sink(f"rtmp://127.0.0.1:{silent.getsockname()[1]}/live/key", retry=0.1)
        sink.open(FPS, SIZE, 1)
        first, _ = silent.accept()
        second, _ = silent.accept()  # it tries again
        sink.close()
        first.close(), second.close()
    assert sink.connections == 0 and sink.state == "ended"


def test_a_stream_at_rest_is_kept_alive(tmp_path):
    """One picture was made, and no more: it is sent again, since servers drop who is silent."""
    sink = Sink(str(tmp_path / "out.ts"))
    sink.open(FPS, SIZE, 1)
    while sink.state != "live":
        time.sleep(0.01)
    sink.write(picture(7))
    while sink.frames < 3:
        time.sleep(0.01)
    sink.close()
    assert numbers_in(tmp_path / "out.ts")[:3] == [7, 7, 7]


@pytest.mark.parametrize("name", ["out.m3u8", "out.mp4", "out.ts", "out.flv"])
def test_files_hold_every_picture(name, tmp_path):
    sink = Sink(str(tmp_path / name))
    sink.open(FPS, SIZE, 1)
    while sink.state != "live":
        time.sleep(0.01)
    for number in range(10 * BLOCK):
        sink.write(picture(number))
        time.sleep(0.002)
    while sink.frames < 10 * BLOCK:
        time.sleep(0.01)
    sink.close()
    assert numbers_in(tmp_path / name) == list(range(10 * BLOCK))


@pytest.mark.parametrize("target", ["http://x/y", "out.avi", "rtmp:", ""])
def test_an_address_that_is_none_is_refused(target):
    with pytest.raises(ValueError, match="push must be an rtmp://"):
        Sink(target)


def test_a_file_that_can_not_be_written_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"push: cannot write .*No such file or directory"):
        Sink(str(tmp_path / "nowhere" / "out.ts"))
    (tmp_path / "soon gone").mkdir()
    sink = Sink(str(tmp_path / "soon gone" / "out.ts"))
    (tmp_path / "soon gone").rmdir()
    sink.open(FPS, SIZE, 1)
    sink._thread.join(PATIENCE)
    assert sink.state == "ended: cannot write out.ts: No such file or directory"
    sink.close()


def test_a_recording_is_whole_when_it_is_closed(tmp_path):
    recorder = Recorder(tmp_path / "r.mp4", "a", FPS, SIZE, 1)
    for number in range(20):
        recorder.write({"a": picture(number), "b": picture(0)})
    recorder.write({"b": picture(0)})  # its world is gone
    recorder.close()
    assert numbers_in(tmp_path / "r.mp4") == list(range(20)) and recorder.frames == 20


def test_a_recording_that_failed_can_be_closed(tmp_path):
    recorder = Recorder(tmp_path / "r.mp4", "a", FPS, SIZE, 1)
    recorder._writer.write = lambda frames: 1 / 0
    closing = threading.Thread(target=feed, args=(recorder, itertools.repeat(picture(0))), daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive() and recorder.error == "division by zero"


def feed(recorder, pictures):
    """Give pictures until the recording has ended by itself, never faster than they are taken."""
    for made in pictures:
        while recorder._queue.full() and not recorder.error:
            time.sleep(0.001)
        if recorder.error:
            return recorder.close()
        recorder.write({"a": made})


def test_a_recording_ends_whole_where_there_is_no_more_room(tmp_path):
    left = [200, 100, 0]
    recorder = Recorder(tmp_path / "r.mp4", "a", FPS, SIZE, 1, room=lambda: left.pop(0))
    feed(recorder, map(picture, itertools.count()))
    assert numbers_in(tmp_path / "r.mp4") == list(range(3 * FPS)) and not left
    assert recorder.error == "r.mp4 ends here: there is no room for more recordings, see play --max-gb"


def test_a_recording_that_meets_a_full_disk_says_so_and_can_be_closed(small_disk):
    generator = np.random.default_rng(0)
    recorder = Recorder(small_disk.folder / "r.mp4", "a", FPS, SIZE, 1)
    small_disk.fill()
    feed(recorder, (generator.integers(0, 255, (*SIZE, 3), np.uint8) for _ in itertools.count()))
    assert recorder.error == "no space left: r.mp4" and not (small_disk.folder / "r.mp4").exists()
    with pytest.raises(ValueError, match=r"^no space left: r2.mp4 needs .* bytes, 0 are free$"):
        Recorder(small_disk.folder / "r2.mp4", "a", FPS, SIZE, 1)


@pytest.mark.parametrize("name", ["out.m3u8", "out.mp4", "out.ts", "out.flv"])
def test_a_file_that_meets_a_full_disk_says_so(name, small_disk):
    generator = np.random.default_rng(0)
    sink = Sink(str(small_disk.folder / name))
    sink.open(FPS, SIZE, 1)
    while sink.state != "live":
        time.sleep(0.01)
    small_disk.fill()
    ended = time.monotonic() + PATIENCE
    while not sink.state.startswith("ended") and time.monotonic() < ended:
        sink.write(generator.integers(0, 255, (*SIZE, 3), np.uint8))
        time.sleep(0.01)
    sink.close()
    assert sink.state == "ended: No space left on device"


NGINX = """load_module {module}; daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ live on; wait_key on; idle_streams off;
    hls on; hls_path {folder}/hls; hls_fragment 1s; }} }} }}
"""


@pytest.mark.skipif(
    shutil.which("nginx") is None or not MODULE.exists(),
    reason="needs Debian's nginx and libnginx-mod-rtmp, which are not here",
)
def test_nginx_takes_it_and_takes_it_again_after_a_restart(tmp_path):
    port = free_port()
    (tmp_path / "hls").mkdir(mode=0o777)
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(module=MODULE, folder=tmp_path, port=port))

    def start():
        return subprocess.Popen(["nginx", "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    server = start()
    sink = Sink(f"rtmp://127.0.0.1:{port}/live/key", retry=0.1)
    source = Source(sink)
    try:
        before, _ = receive(port, 4 * BLOCK)
        server.kill()
        server.wait()
        server = start()
        after, _ = receive(port, 4 * BLOCK)
    finally:
        source.close()
        server.kill()
        server.wait()
    assert np.all(np.diff(before) > 0) and np.all(np.diff(after) > 0) and after[0] > before[-1]
    assert sink.connections >= 2 and list((tmp_path / "hls").iterdir())
