"""The command line: what it writes, and that bad input is one line, exit code 2, and nothing left behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import torch

from inferix.commands.cli import main
from inferix.commands.controls import Prompts, actions_from
from inferix.commands.options import MOST_THREADS
from inferix.media import VideoWriter
from inferix.models.tiny import ADAPTER
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import export
from inferix.world import World
from inferix_kernels import OutOfPages, Unsupported
from inferix_kernels.layout import KV_FORMATS


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny world that has learned nothing: enough for everything but the picture."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    export(TinyWorldModel(TinyConfig(dim=32, layers=2, heads=2, head_dim=16, ffn=48)), path, {})
    return str(path)


def generate(weights, out, *options):
    return main(["generate", "--weights", weights, "--out", str(out), *map(str, options)])


def fail_at(monkeypatch, method, count, error):
    """World.advance or VideoWriter.write raises this, the count-th time it is called."""
    where = {"advance": World, "write": VideoWriter}[method]
    real, calls = getattr(where, method), []

    def failing(self, *args, **options):
        calls.append(self)
        if len(calls) == count:
            raise error
        return real(self, *args, **options)

    monkeypatch.setattr(where, method, failing)


def frames_in(path):
    with av.open(str(path)) as video:
        return sum(1 for _ in video.decode(video=0))


def test_generate_writes_a_video_a_sheet_and_a_summary(weights, tmp_path, capsys):
    out = tmp_path / "v.mp4"
    options = ("--seconds", 0.5, "--kv", "bf16", "--actions", "scripted", "--prompt", "a desert at night")
    assert generate(weights, out, *options) == 0
    assert frames_in(out) == 8  # 16 FPS; not a multiple of the block of 3
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "v.json").read_text())
    assert summary["frames"] == 8 and summary["seconds_of_video"] == 0.5 and summary["kv"] == "bf16"
    # 9 frames of 64 tokens, 2 layers, 2 heads x 16 channels, K and V of 2 bytes.
    assert summary["kv_bytes"]["bf16"] == 9 * 64 * 2 * 2 * 16 * 2 * 2
    assert summary["fps"] > 0 and 0 < summary["block_seconds_p50"] <= summary["block_seconds_p95"]
    assert set(summary["measures"]) >= {"player exactly once", "theme as asked"}
    assert "8 frames" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_video(weights, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(weights, tmp_path / f"{name}.mp4", "--seconds", 0.4, "--seed", seed) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_actions_and_prompts_come_from_files(weights, tmp_path):
    (tmp_path / "actions").write_text("up 2  # then\nright\n")
    (tmp_path / "prompts").write_text("0 meadow day\n\n0.3 volcano night\n")
    files = ("--actions", tmp_path / "actions", "--prompt-file", tmp_path / "prompts")
    assert generate(weights, tmp_path / "v.mp4", "--seconds", 0.5, *files) == 0


BAD = {
    "model": (["--model", "giant"], "model must be one of tiny, self-forcing, "),
    "weights": (["--weights", "nowhere.safetensors"], "weights: there is no file nowhere.safetensors"),
    "prompt": (["--prompt", "purple night"], "prompt: unknown word 'purple'"),
    "no place": (["--prompt", "night"], "prompt must name one place"),
    "zero": (["--seconds", "0"], "--seconds must be a positive number, got 0"),
    "negative": (["--seconds", "-3"], "--seconds must be a positive number, got -3"),
    "endless": (["--seconds", "inf"], "--seconds must be a finite number, got inf"),
    "too long": (["--seconds", "1e18"], "--seconds must be at most 1000000, about 11 days, got 1e+18"),
    "seed": (["--seed", "-1"], "--seed must be from 0 to 2^64 - 1, got -1"),
    "long seed": (["--seed", "9" * 23], "--seed must be from 0 to 2^64 - 1, got 9999"),
    "no words": (["--prompt", ""], "prompt must name one place"),
    "image": (["--image", "nowhere.png"], "--image must not be given: tiny begins with words and actions alone"),
    "too short": (["--seconds", "0.01"], "--seconds must be at least one frame, 1/16, got 0.01"),
    "window": (["--window", "2"], "window must be at least the 3 frames of one block"),
    "sink": (["--sink", "-1"], "sink must be 0 or more frames, got -1"),
    "kv": (["--kv", "int3"], "kv must be one of fp32, fp16, bf16, int8, i8f8, fp8, int4, got 'int3'"),
    "threads": (["--threads", "0"], f"--threads must be from 1 to {MOST_THREADS}, got 0"),
    "many threads": (["--threads", "100000"], f"--threads must be from 1 to {MOST_THREADS}, got 100000"),
    "scale": (["--scale", "0"], "--scale must be at least 1, got 0"),
    "large scale": (["--scale", "100000"], "--scale must make 96 x 96 pixels at most 16,384 a side and"),
    "guidance": (["--guidance", "nan"], "--guidance must be a finite number, got nan"),
    "no file": (["--actions", "nowhere"], "--actions: cannot read 'nowhere'"),
    "backend": (["--backend", "abacus"], "backend must be"),
    "device": (["--device", "foo"], "--device must be a device that is there, got 'foo'"),
    "no such device": (["--device", "cuda:99"], "--device must be a device that is there, got 'cuda:99'"),
    "another device": (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, weights, tmp_path, capsys):
    options, message = BAD[case]
    assert generate(weights, tmp_path / "v.mp4", "--seconds", 0.5, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("jump", ":1: action must be one of none, up"),
        ("up\nup x", ":2: frames must be one positive number"),
        ("up ²", ":1: frames must be one positive number"),
        ("up " + "9" * 5000, ":1: frames must be one positive number of at most 9 digits, got '9999"),
        ("", "no action"),
    ],
)
def test_a_bad_action_file_names_its_line(text, message, weights, tmp_path, capsys):
    (tmp_path / "actions").write_text(text)
    assert generate(weights, tmp_path / "v.mp4", "--actions", tmp_path / "actions") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["actions"]


@pytest.mark.parametrize(
    "option, name",
    [("--prompt-file", "v.json"), ("--actions", "v.png"), ("--image", "link.png"), ("--video", ".v.mp4.part")],
)
def test_what_is_read_is_not_written_over(option, name, weights, tmp_path, capsys):
    read = tmp_path / name
    if name == "link.png":
        read.symlink_to("v.png")
    read.write_text("up\n")
    assert generate(weights, tmp_path / "v.mp4", "--seconds", 0.5, option, read) == 2
    error = capsys.readouterr().err
    assert f"would be written, but {option} is read from it" in error and error.count("\n") == 1
    assert read.read_text() == "up\n" and not (tmp_path / "v.mp4").exists()


@pytest.mark.parametrize(
    "text", ["5 desert", "0 desert\n0 meadow", "0 desert\nnan meadow", "0 desert\n1e999 ice", "now desert", "0", ""]
)
def test_a_bad_prompt_file_is_refused(text, weights, tmp_path, capsys):
    (tmp_path / "prompts").write_text(text)
    assert generate(weights, tmp_path / "v.mp4", "--prompt-file", tmp_path / "prompts") == 2
    assert "--prompt-file:" in capsys.readouterr().err


def test_a_prompt_file_is_read_as_it_stands(tmp_path):
    """A '#' is a comment only where a line begins; a byte order mark, as Windows writes one, is none of it."""
    text = "\ufeff0 a panda with a #1 shirt, #ff0000\r\n  # not this\r\n\r\n5 fox\u2028den\r\n"
    (tmp_path / "prompts").write_bytes(text.encode())
    starts = Prompts.read(tmp_path / "prompts").starts
    assert starts == ((0.0, "a panda with a #1 shirt, #ff0000"), (5.0, "fox den"))
    with pytest.raises(ValueError, match=r"path: '/dev/zero' must be at most 16,777,216 characters long"):
        Prompts.read(Path("/dev/zero"))


def test_actions_may_be_held_for_ever(tmp_path):
    (tmp_path / "actions").write_text("up 3\nleft 999999999  # no list of them is made\n")
    actions = actions_from(str(tmp_path / "actions"), ADAPTER, 0)
    assert [next(actions) for _ in range(5)] == ["up"] * 3 + ["left"] * 2


def test_a_second_run_of_one_video_is_refused(weights, tmp_path, capsys):
    """And the first one's video is what it would have been alone."""
    out = tmp_path / "v.mp4"
    command = [sys.executable, "-m", "inferix", "generate", "--weights", weights, "--out", str(out), "--seconds", "600"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: (tmp_path / ".v.mp4.part").exists(), first)
        assert generate(weights, out, "--seconds", 4) == 2
        assert capsys.readouterr().err == f"inferix generate: --out: '{out}' is being written by another run\n"
        wait_for(lambda: (tmp_path / ".v.mp4.part").stat().st_size > 30_000, first)
    finally:
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=60)
    assert first.returncode == 130, output
    assert frames_in(out) == json.loads((tmp_path / "v.json").read_text())["frames"] > 16
    assert generate(weights, out, "--seconds", 1) == 0
    assert frames_in(out) == 16


def wait_for(there, process):
    deadline = time.monotonic() + 60
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["v.mp4", "v.json", "v.png", ".v.mp4.part"])
def test_a_pipe_as_output_is_refused(name, weights, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    assert generate(weights, tmp_path / "v.mp4", "--seconds", 0.5) == 2
    error = capsys.readouterr().err
    assert f"--out must be a file, got '{tmp_path / name}', which is a device or a pipe" in error
    assert error.count("\n") == 1 and os.listdir(tmp_path) == [name]


def test_a_disk_that_fills_up_is_one_line(weights, small_disk, capsys):
    out = small_disk.folder / "v.mp4"
    assert generate(weights, out, "--seconds", 600, "--scale", 2, "--actions", "scripted") == 2
    first, said = capsys.readouterr().err.splitlines()
    kept = frames_in(out.with_name(".v.mp4.part"))
    assert first == f"inferix generate: the first {kept} frames are in {out.with_name('.v.mp4.part')}" and kept > 0
    assert said == f"inferix generate: --out: no space left: '{out}'"
    assert os.listdir(small_disk.folder) == [".v.mp4.part"]


@pytest.mark.parametrize("beside", ["png", "json"])
def test_a_disk_that_is_full_after_the_video_leaves_it(beside, weights, small_disk, capsys, monkeypatch):
    if beside == "json":
        monkeypatch.setattr("inferix.commands.maker.contact_sheet", lambda *_, **__: None)
    monkeypatch.setattr("inferix.media.VideoWriter.close", closing_then(small_disk.fill))
    assert generate(weights, small_disk.folder / "v.mp4", "--seconds", 0.5) == 2
    said = "contact sheet" if beside == "png" else "--out"
    assert (
        capsys.readouterr().err == f"inferix generate: {said}: no space left: '{small_disk.folder / f'v.{beside}'}'\n"
    )
    assert frames_in(small_disk.folder / "v.mp4") == 8


def closing_then(fill):
    close = VideoWriter.close

    def closed(self, *args, **options):
        close(self, *args, **options)
        fill()

    return closed


COMMANDS = {
    "help": ["--help"],
    "generate help": ["generate", "--help"],
    "doctor": ["doctor"],
    "generate": ["generate", "--seconds", "0.5", "--out", "v.mp4"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_reading_ends_a_command_quietly(command, weights, tmp_path):
    """As `| head` does: the pipe is closed before anything is printed. What was to be made is there."""
    reading, writing = os.pipe()
    os.close(reading)
    options = ["--weights", weights] if command == "generate" else []
    done = subprocess.run(
        [sys.executable, "-m", "inferix", *COMMANDS[command], *options],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))},
    )
    os.close(writing)
    assert done.returncode == (0 if "help" in command else 141), "argparse itself is quiet"
    assert done.stderr == b""
    if command == "generate":
        assert frames_in(tmp_path / "v.mp4") == 8 and (tmp_path / "v.json").exists()


@pytest.mark.parametrize("command", ["doctor", "generate"])
def test_a_closed_output_is_no_error(command, weights, tmp_path):
    options = ["--weights", weights] if command == "generate" else []
    line = shlex.join([sys.executable, "-m", "inferix", *COMMANDS[command], *options])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run(["sh", "-c", f"{line} >&-"], stderr=subprocess.PIPE, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_a_truncated_checkpoint_is_refused(keep, weights, tmp_path, capsys):
    whole = Path(weights).read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    assert generate(str(broken), tmp_path / "v.mp4") == 2
    error = capsys.readouterr().err
    assert "is damaged or not a safetensors file" in error and error.count("\n") == 1


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path, capsys):
    config = TinyConfig(dim=32, layers=1, heads=2, head_dim=16, ffn=48)
    model = TinyWorldModel(config)
    model.text = torch.nn.Linear(32, 31)
    path = tmp_path / "other.safetensors"
    export(model, path, {})
    assert generate(str(path), tmp_path / "v.mp4") == 2
    assert "text.bias must be [32], got [31]" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["missing/v.mp4", "folder", f"{'v' * 300}.mp4", "folder/.."])
def test_an_unwritable_output_is_refused(where, weights, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert generate(weights, tmp_path / where, "--seconds", 0.5) == 2
    error = capsys.readouterr().err
    assert "--out" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", ["v.json", "v.png", ".v.mp4.part"])
def test_what_goes_beside_the_video_is_checked_before_it_is_made(name, weights, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert generate(weights, tmp_path / "v.mp4", "--seconds", 0.5) == 2
    error = capsys.readouterr().err
    assert "--out: cannot write" in error and f"{name}': Is a directory" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [Unsupported, OutOfPages])
def test_what_the_kernels_can_not_do_is_one_line(error, weights, tmp_path, capsys, monkeypatch):
    def step(*_, **__):
        raise error("kv_append: not\nhere")

    monkeypatch.setattr("inferix.world.World.advance", step)
    assert generate(weights, tmp_path / "v.mp4") == 2
    assert capsys.readouterr().err == "inferix generate: kv_append: not here\n"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_a_playable_video(weights, tmp_path):
    out = tmp_path / "v.mp4"
    command = [sys.executable, "-m", "inferix", "generate", "--weights", weights, "--out", str(out), "--seconds", "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)  # some blocks in
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    made = json.loads((tmp_path / "v.json").read_text())["frames"]
    assert 0 < made < 9600 and frames_in(out) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json", "v.mp4", "v.png"]


@pytest.mark.parametrize("method, made", [("advance", 9), ("write", 9), ("advance", 0)])
def test_a_second_ctrl_c_says_what_was_made(method, made, weights, tmp_path, capsys, monkeypatch):
    fail_at(monkeypatch, method, made // 3 + 1, KeyboardInterrupt)
    assert generate(weights, tmp_path / "v.mp4") == 130
    said = capsys.readouterr()
    if made:
        assert f"{made} frames" in said.out and "nothing" not in said.err
        assert json.loads((tmp_path / "v.json").read_text())["frames"] == frames_in(tmp_path / "v.mp4") == made
    else:
        assert said.err == "inferix generate: interrupted before the first frame: nothing was written\n"
        assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_an_earlier_video_as_it_was(weights, tmp_path, capsys, monkeypatch):
    out, part = tmp_path / "v.mp4", tmp_path / ".v.mp4.part"
    out.write_bytes(b"earlier")
    fail_at(monkeypatch, "advance", 4, ValueError)
    assert generate(weights, out) == 2
    assert f"the first 9 frames are in {part}\n" in capsys.readouterr().err
    assert out.read_bytes() == b"earlier" and frames_in(part) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".v.mp4.part", "v.mp4"]


def test_doctor_names_every_part(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out
    assert all(f"{part}:" in lines for part in ("python", "torch", "inferix_kernels._C", "video", "tiny world"))


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert f"{', '.join(KV_FORMATS)} (default" in " ".join(capsys.readouterr().out.split())
