"""`torchrun -m inferix generate` against one process, on tiny checkpoints; a rank is killed, and the video resumed.

`python -m tests.distributed.command_line` prints a table: of MAGI-1, whose folder has no VAE, latents are compared; of
Wan pictures, in levels of 255, after H.264 made more of one level in a few of them. Needs the extras of both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from tests.models import magi_folder, wan_folder

PATIENCE = 600.0  # seconds for a video
MODELS = {
    "wan": ["--model", "self-forcing", "--window", "6", "--sink", "1", "--size", "32x48"],
    "magi": ["--model", "magi-4.5b", "--steps", "8", "--size", "32x48"],
}
SECONDS_OF_BLOCK = {"wan": 12 / 16, "magi": 1.0}


def command(ranks: int, parallel: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "inferix"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "inferix"]
    return [*run, "generate", "--parallel", parallel]


class Videos:
    """Of one model, whose prompt changes in the middle: eviction begins with the third block."""

    def __init__(self, model: str, folder: Path, blocks: int):
        self.model, self.folder = model, folder
        weights = {"wan": wan_folder, "magi": magi_folder}[model].write_folder(folder / "weights")
        seconds = blocks * SECONDS_OF_BLOCK[model]
        (folder / "prompts").write_text(f"0 the red panda walks\n{seconds / 2:g} the fox runs in rain\n")
        self.options = [*MODELS[model], "--weights", str(weights), "--kv", "fp32", "--device", "cpu"]
        self.options += ["--seconds", f"{seconds:g}", "--prompt-file", str(folder / "prompts")]
        self.options += ["--prompt-cache", str(folder / "cache")]

    def start(self, ranks: int, parallel: str, name: str, *more: str) -> subprocess.Popen[str]:
        words = [*command(ranks, parallel), *(["generate"] if ranks == 1 else []), *self.options, *more]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen([*words, "--out", str(self.path(name))], stdout=log, stderr=log, text=True)

    def make(self, ranks: int, parallel: str, name: str, *more: str) -> np.ndarray:
        code = self.start(ranks, parallel, name, *more).wait(PATIENCE)
        assert code == 0, (self.folder / f"{name}.log").read_text()
        return self.read(name)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.mp4"

    def read(self, name: str) -> np.ndarray:
        """Latents, where there is no VAE; else pictures, in grey levels."""
        latents = self.path(name).with_suffix(".npy")
        if latents.exists():
            return np.load(latents)
        with av.open(str(self.path(name))) as video:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(np.float32)

    def killed(self, ranks: int, parallel: str, name: str) -> str:
        """SIGKILL to rank 1, once a third of the video is made; what the command said."""
        running = self.start(ranks, parallel, name)
        journal, began = self.folder / f".{name}.mp4.journal", time.monotonic()
        while not (journal.exists() and journal.read_bytes().count(b'"shape"') > 6):
            assert running.poll() is None and time.monotonic() - began < PATIENCE, self.log(name)
            time.sleep(0.02)
        os.kill(child_of(running.pid, rank=1), signal.SIGKILL)
        assert running.wait(PATIENCE) != 0 and journal.exists()
        return self.log(name)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def child_of(parent: int, rank: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            its = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if its == parent and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError(f"rank {rank} is not there")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.command_line", description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    wrong = 0
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            videos = Videos(model, Path(folder), options.blocks)
            alone = videos.make(1, "", "alone")

            def show(what: str, made: np.ndarray, alone: np.ndarray = alone, model: str = model) -> None:
                nonlocal wrong
                same = made.shape == alone.shape
                apart = np.abs(made - alone) if same else np.full(1, np.inf)
                good = apart.max() <= 2e-5 if model == "magi" else apart.mean() <= 0.05
                wrong += not good
                numbers = f"{apart.max():.1e} at most, {apart.mean():.1e} on average"
                print(f"{model:5} {what:40} {numbers}{'' if good else '  TOO FAR'}", flush=True)

            show("2 ranks, gather", videos.make(2, "gather", "two"))
            show("4 ranks, auto", videos.make(4, "auto", "four"))
            for ranks, parallel in ((1, ""), (3, "ring")):
                name = f"killed{ranks}"
                said = [line for line in videos.killed(2, "gather", name).splitlines() if "inferix generate: " in line]
                print("     ", *said or ["torchrun ended rank 0 before it could say why"], flush=True)
                show(f"2 ranks, one killed, resumed by {ranks}", videos.make(ranks, parallel, name, "--resume"))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
