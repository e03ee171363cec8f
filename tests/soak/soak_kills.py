"""Kills at random moments: `python -m tests.soak.soak_kills --times 100 --seed 0`.

A process that generates, saves, loads, converts or records is ended by SIGKILL or SIGTERM at a random moment. Then
every file that can be read must be whole, or the beginning of what would have been made; and a run that is taken up, or
made again, must give the very bytes of one that nobody ended. Exit code 1 if anything did not hold, or if fewer than
nine of ten were killed at work.

The moment is a share of the processor time that the same work took when nobody killed it, and the kernel sends the
signal when so much is spent: on a busy machine too it falls into the work. Kinds take turns. Those that need an extra
which is not installed are left out by name. Processes are forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np

from inferix.commands.cli import main as inferix

GENERATE = ["generate", "--threads", "1"]
SAVES, LOADS, PICTURES = 6, 60, 64
IMPORTS = ["inferix.commands.generate", "inferix.saved", "inferix.stream.recorder", "inferix.models.tiny"]
LARGE_IMPORTS = [  # of the kinds that need packages
    "inferix.models.wan",
    "inferix.models.magi",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.modeling_t5",
    "bs4",
    "ftfy",
]


Begun = Callable[[], None]


@dataclass(frozen=True)
class Kind:
    """Something that is killed.

    Attributes:
        work: (folder, begun) done in a process of its own; writes into the folder, and calls `begun` when that begins
            which is to be killed.
        check: (folder, folder of a run that nobody killed) -> what was found in a word; raises AssertionError.
        needs: packages.
    """

    work: Callable[[Path, Begun], object]
    check: Callable[[Path, Path], str]
    needs: Sequence[str] = ()


def frames_in(path: Path) -> np.ndarray:
    """[n, height, width, 3] uint8; none if the file is no video yet."""
    try:
        with av.open(str(path)) as video:
            found = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    except (av.FFmpegError, IndexError):
        found = []
    return np.stack(found) if found else np.empty((0, 0, 0, 3), np.uint8)


def check_video(made: Path, whole: Path) -> str:
    """A video under its own name is whole; under its temporary one it is the beginning."""
    if made.exists():
        assert made.read_bytes() == whole.read_bytes(), "the video under its own name is not whole"
        return "whole"
    part = made.with_name(f".{made.name}.part")
    if not part.exists():
        return "nothing"
    if made.suffix == ".npy":
        beginning, wanted = np.load(part) if part.stat().st_size else np.empty(0), np.load(whole)
    else:
        beginning, wanted = frames_in(part), frames_in(whole)
    assert not len(beginning) or np.array_equal(beginning, wanted[: len(beginning)]), "not the beginning of the video"
    return "beginning" if len(beginning) else "nothing"


def command(argv: Sequence[object]) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = inferix(list(map(str, argv)))
    assert code == 0, f"exit code {code}"


@contextlib.contextmanager
def noted_pictures(to: Path) -> Iterator[None]:
    """The encoder's pictures as checksums, before and after the change of colours, a line each: of two videos that
    differ they say whether what went in did."""
    from inferix.media import video_writer

    convert = video_writer.in_bt709
    with to.open("w") as file:

        def noted(picture: np.ndarray) -> av.VideoFrame:
            image = convert(picture)
            print(zlib.crc32(picture.tobytes()), zlib.crc32(image.to_ndarray().tobytes()), file=file)
            return image

        video_writer.in_bt709 = noted
        try:
            yield
        finally:
            video_writer.in_bt709 = convert


def generated(options: Sequence[object], needs: Sequence[str] = (), suffix: str = ".mp4") -> Kind:
    def make(folder: Path, *more: str) -> None:
        with noted_pictures(folder / "pictures.txt"):
            command([*GENERATE, "--out", folder / f"v{suffix}", *options, *more])

    def check(folder: Path, whole: Path) -> str:
        made, journal = folder / f"v{suffix}", folder / f".v{suffix}.journal"
        found, resumed = check_video(made, whole / made.name), journal.exists() and journal.stat().st_size > 0
        if found != "whole" or resumed:
            make(folder, *(["--resume"] if resumed else []))
            found += ", resumed" if resumed else ", made again"
        assert check_video(made, whole / made.name) == "whole"
        return found

    def work(folder: Path, begun: Begun) -> None:
        begun()
        make(folder)

    return Kind(work, check, needs)


def new_world() -> object:
    from inferix import World

    world = World("tiny", kv="bf16", window=3, worlds=2)
    world.step(action="up", prompt="desert night")
    return world


def save_worlds(folder: Path, begun: Begun) -> None:
    from inferix import saved

    world = new_world()
    begun()
    for i in range(SAVES):
        saved.save(world, folder / f"w{i}")
        world.step(action="left")


def check_saved(folder: Path, whole: Path) -> str:
    from inferix import saved

    world, found = new_world(), 0
    for i in range(SAVES):
        if not (folder / f"w{i}").exists():
            saved.save(world, folder / f"w{i}")  # over what the kill left
            continue
        found += 1
        made, wanted = (loaded_step(world, each / f"w{i}") for each in (folder, whole))
        assert np.array_equal(made, wanted), f"w{i} goes on as another world"
    assert sorted(path.name for path in folder.iterdir()) == [f"w{i}" for i in range(SAVES)], "something was left over"
    return f"{found} of {SAVES}"


def loaded_step(world: object, folder: Path) -> np.ndarray:
    from inferix import saved

    other = saved.load(world, folder)
    try:
        return other.step(action="up")
    finally:
        other.release()


def load_worlds(folder: Path, begun: Begun) -> None:
    from inferix import saved

    world = new_world()
    saved.save(world, folder / "w")
    begun()
    for _ in range(LOADS):
        saved.load(world, folder / "w").release()


def check_loaded(folder: Path, whole: Path) -> str:
    world = new_world()
    made, wanted = (loaded_step(world, each / "w") for each in (folder, whole))
    assert np.array_equal(made, wanted), "it goes on as another world"
    assert [path.name for path in folder.iterdir()] == ["w"], "something was left over"
    return "loads"


def record(folder: Path, begun: Begun) -> None:
    from inferix.stream.recorder import Recorder

    pictures = np.random.default_rng(0).integers(0, 255, (PICTURES, 96, 96, 3), np.uint8)
    begun()
    recorder = Recorder(folder / "v.mp4", "a", 16, (96, 96), 4)
    for picture in pictures:
        recorder.write({"a": picture})
        time.sleep(0.01)
    recorder.close()


def check_converted(folder: Path, whole: Path) -> str:
    made = [path for i in range(SAVES) if (path := folder / f"m{i}.safetensors").exists()]
    for path in made:
        assert path.read_bytes() == (whole / path.name).read_bytes(), f"{path.name} is not whole"
    return f"{len(made)} of {SAVES}"


def kinds(weights: Path) -> dict[str, Kind]:
    wan, magi = ("diffusers", "transformers", "ftfy"), ("transformers", "ftfy", "bs4", "zstandard")
    prompt = ("--device", "cpu", "--prompt", "the red panda", "--prompt-cache", weights / "prompts", "--weights")
    blocks = ("--model", "self-forcing", *prompt, weights / "wan", "--size", "32x48", "--window", 6, "--seconds", 12)
    chunks = ("--model", "magi-4.5b", *prompt, weights / "magi", "--size", "48x80", "--steps", 8, "--seconds", 8)

    def convert(folder: Path, begun: Begun) -> None:
        begun()
        for i in range(SAVES):
            command(["convert", weights / "wan", folder / f"m{i}.safetensors"])

    return {
        "generate": generated(("--seconds", 4, "--actions", "scripted")),
        "save": Kind(save_worlds, check_saved),
        "record": Kind(record, lambda made, whole: check_video(made / "v.mp4", whole / "v.mp4")),
        "generate, journal": generated(blocks, wan),
        "load": Kind(load_worlds, check_loaded),
        "latents, journal": generated(chunks, magi, ".npy"),
        "convert": Kind(convert, check_converted, wan),
    }


def write_weights(weights: Path, names: Sequence[str]) -> None:
    if any(name in names for name in ("generate, journal", "convert")):
        from tests.models.wan_folder import write_folder

        write_folder(weights / "wan")
    if "latents, journal" in names:
        from tests.models.magi_folder import write_folder as write_magi

        write_magi(weights / "magi")


class Sigevent(ctypes.Structure):
    """As timer_create takes it; a signal for the process."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_byte * 48),
    )


def kill_after(seconds: float, kill: signal.Signals) -> None:
    """Have the kernel send this process a signal, which Python never sees, once it has spent so much processor time."""
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    when = (ctypes.c_long * 4)(0, 0, int(seconds), 1 + int(seconds % 1 * 1e9))  # itimerspec: once; 0 would be never
    event = Sigevent(None, kill, 0, (ctypes.c_byte * 48)())
    failed = libc.timer_create(time.CLOCK_PROCESS_CPUTIME_ID, ctypes.byref(event), ctypes.byref(timer))
    if failed or libc.timer_settime(timer, 0, when, None):
        raise OSError(ctypes.get_errno(), "no timer of processor time")


def run(name: str, weights: Path, folder: Path, kill: signal.Signals, seconds: float | None, spent: Connection) -> None:
    """The process that may be killed; sends what the work has spent, if it is done."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    started = 0.0

    def begun() -> None:
        nonlocal started
        started = time.process_time()
        if seconds is not None:
            kill_after(seconds, kill)

    kinds(weights)[name].work(folder, begun)
    spent.send(time.process_time() - started)


class Runs:
    """Processes, forked from one that has imported everything.

    Attributes:
        spent: seconds of processor time that each kind has taken, when it was not killed; the least so far.
    """

    def __init__(self, names: Sequence[str], weights: Path, large: bool):
        self.weights, self.spent = weights, dict.fromkeys(names, float("inf"))
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(IMPORTS + LARGE_IMPORTS * large)

    def run(self, name: str, folder: Path, kill: signal.Signals = signal.SIGKILL, moment: float | None = None) -> bool:
        """Was it killed at work? `moment`: at this share of it; None: it is let alone."""
        ours, theirs = self._processes.Pipe(duplex=False)
        seconds = None if moment is None else moment * self.spent[name]
        process = self._processes.Process(target=run, args=(name, self.weights, folder, kill, seconds, theirs))
        process.start()
        theirs.close()
        process.join()
        ends = (0,) if moment is None else (0, -kill)
        assert process.exitcode in ends, f"{name} ended with {process.exitcode}"
        with ours, contextlib.suppress(EOFError):
            self.spent[name] = min(self.spent[name], ours.recv())
            return False  # it was done, even if the signal came after all
        return True


def soak(times: int, seed: int, folder: Path) -> tuple[list[str], int]:
    """Returns what did not hold, and how many were killed at work."""
    chance, failed = random.Random(seed), []
    found: Counter[tuple[str, str, str]] = Counter()
    killed: Counter[tuple[str, bool]] = Counter()
    every = kinds(folder / "weights")
    missing = {name: [n for n in kind.needs if importlib.util.find_spec(n) is None] for name, kind in every.items()}
    names = [name for name in every if not missing[name]][: max(1, times)]
    for name, packages in missing.items():
        if packages:
            print(f"left out: {name}, which needs {', '.join(packages)}")
    write_weights(folder / "weights", names)
    runs = Runs(names, folder / "weights", any(every[name].needs for name in names))
    for name in names:
        whole = folder / "whole" / name
        for _ in range(2):  # the first run also imports what is left, and fills the prompt cache
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir(parents=True)
            runs.run(name, whole)
    for i in range(times):
        name, kill = names[i % len(names)], chance.choice((signal.SIGKILL, signal.SIGTERM))
        moment = chance.random()
        made = folder / "made"
        made.mkdir()
        at_work = runs.run(name, made, kill, moment)
        ended = kill.name if at_work else "in time"
        try:
            result = every[name].check(made, folder / "whole" / name)
        except (AssertionError, ValueError) as error:
            result = f"FAILED: {error}"
            kept = Path(tempfile.mkdtemp(prefix="soak_kills_"))  # to be looked at: a kill is hardly met twice
            for each in (made, folder / "whole" / name):
                shutil.copytree(each, kept / each.name)
            what = f"{i} ({name}, {kill.name} at {moment:.3f} of {runs.spent[name]:.2f} s): {error}"
            failed.append(f"{what}; kept in {kept}")
        found[name, ended, result] += 1
        killed[name, at_work] += 1
        print(f"{i}: {name}, {ended} at {moment:.0%}: {result}", flush=True)
        shutil.rmtree(made)
    for (name, ended, result), count in sorted(found.items()):
        print(f"{count:4} {name}: {ended}: {result}")
    for name in names:
        total = killed[name, True] + killed[name, False]
        print(f"{name}: {killed[name, True]} of {total} killed at work, of {runs.spent[name]:.2f} s of processor time")
    return failed, sum(killed[name, True] for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        failed, killed = soak(args.times, args.seed, Path(folder))
    print(f"{args.times} kills, seed {args.seed}: {killed} met the work, {len(failed)} did not hold", *failed, sep="\n")
    return 1 if failed or killed < 0.9 * args.times else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
