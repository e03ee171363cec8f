"""`inferix play`, as typed: the address, Ctrl-C, and one line for what is wrong."""

import re
import signal
import subprocess
import sys

import av
import pytest

pytest.importorskip("aiohttp", reason="needs the extra `stream`")

from inferix.commands.cli import main
from tests.stream.stream_client import PATIENCE, Viewer, asynchronous


class Listening:
    """Where a server in another process listens."""

    def __init__(self, port):
        self.port = port


@asynchronous
async def test_ctrl_c_ends_it_and_closes_files(tmp_path):
    command = [sys.executable, "-m", "inferix", "play", "--port", "0", "--folder", str(tmp_path / "worlds")]
    command += ["--push", str(tmp_path / "pushed.mp4")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())[1])
        viewer = await Viewer.join(Listening(port))
        await viewer.until("frame")
        name = (await viewer.request("record", on=True))["result"]["name"]
        saved = await viewer.request("save")
        assert saved["type"] == "done"
        frames = len(viewer.all("frame"))
        await viewer.until("state", lambda message: [each["state"] for each in message["pushing"]] == ["live"])
        await viewer.until("frame", since=len(viewer.messages) + 30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "Traceback" not in errors, errors
        await viewer.leave()
    finally:
        process.kill()
    assert frames
    for path in (tmp_path / "worlds" / name, tmp_path / "pushed.mp4"):
        with av.open(str(path)) as video:
            assert sum(1 for _ in video.decode(video=0)) > 0
    assert (tmp_path / "worlds" / saved["result"]["name"] / "world.pt").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        (["--host", "203.0.113.1"], "--host, --port: cannot listen at 203.0.113.1"),
        (["--port", "99999999"], "--host, --port: cannot listen"),
        (["--push", "http://x"], "--push must be an rtmp://"),
        (["--push", "/nowhere/out.mp4"], "--push: cannot write '/nowhere/out.mp4': No such file or directory"),
        (["--worlds", "0"], "--worlds must be at least 1, got 0"),
        (["--undo", "-1"], "--undo must be at least 0, got -1"),
        (["--undo", "inf"], "--undo must be a finite number, got inf"),
        (["--undo", "nan"], "--undo must be a finite number, got nan"),
        (["--threads", "-1"], "--threads must be from 1 to "),
        (["--max-files", "-1"], "--max-files must be at least 0, got -1"),
        (["--max-gb", "nan"], "--max-gb must be a finite number, got nan"),
    ],
)
def test_bad_options_are_one_line(options, says, capsys, tmp_path):
    assert main(["play", "--folder", str(tmp_path / "worlds"), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model", "nope"], "model must be one of tiny"),
        (["--window", "1"], "window must be at least the 3 frames"),
        (["--weights", "/nope"], "/nope"),
    ],
)
def test_a_world_that_can_not_be_opened_is_one_line_and_not_served(options, says, tmp_path, capsys):
    assert main(["play", "--port", "0", "--folder", str(tmp_path / "worlds"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("inferix play: ") and says in error and error.count("\n") == 1


def test_without_the_extra_play_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "inferix.stream.server", None)
    assert main(["play"]) == 2
    assert "pip install 'inferix-kernels[stream]'" in capsys.readouterr().err
