"""Does a world that goes on grow? Blocks by the thousand, with forks, rewinds, saves, loads and new words, weighed.

    python -m tests.soak.soak_world --blocks 5000 --seed 0 [--through process|worker|server] [--small]

Prints resident memory now and then, as it is and as it is after malloc_trim(0): what the second does not have is the
allocator's, kept for later. The trim is done in a forked copy, so that it changes nothing of what is measured. Exit
code 1 if it grows: after a trim by more than 1 % from the 500th block on, by a line fitted to all weights, since single
ones differ by what is alive just then; as it is to more than 1.15 times that of the 1,000th.
"""

import argparse
import asyncio
import ctypes
import dataclasses
import functools
import gc
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from inferix.models import load_model
from inferix.models.tiny import TinyWorld
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.simulator import PLACES, TIMES
from inferix.stream.remote import Remote
from inferix.stream.worker import Order, Stage
from inferix.world import World

ACTIONS = ("none", "up", "down", "left", "right")
FLAT, GROWTH = 1.01, 1.15
OTHER = ("a", "an", "the", "at", "in", "by", "on", "of")


def weigh() -> tuple[int, int]:
    """Bytes of this process that are resident: as it is, and after a trim."""
    gc.collect()
    resident, anonymous = _resident()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).malloc_trim(0)
        os.write(write, str(_resident()[1]).encode())
        os._exit(0)
    os.close(write)
    trimmed = int(os.read(read, 64))
    os.close(read)
    os.waitpid(child, 0)
    return resident, resident - anonymous + trimmed


def _resident() -> tuple[int, int]:
    """All of it, and what is backed by no file: a fork shares the one with its parent, and need not map the other."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return tuple(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon"))


class Weighed(World):
    """Says with its bytes of keys and values what its process weighs, looked at after every `period` blocks of it and
    its forks. A server's worker can be asked for nothing else."""

    def step(self, *args, **kwargs):
        self.scales["blocks"] += 1
        return super().step(*args, **kwargs)

    def kv_bytes(self):
        scales = self.scales  # shared with the forks
        if scales["blocks"] >= self.period:
            scales["blocks"] = 0
            scales["resident"], scales["trimmed"] = weigh()
        return super().kv_bytes() | {name: scales[name] for name in ("resident", "trimmed")}


def open_weighed(period, small=False, fps=None):
    """The tiny world as `play` opens it.

    Args:
        small: or one of the same kind with a network of a few thousand random numbers, whose blocks take milliseconds.
        fps: its pace, so that a server need not wait for the clock.
    """
    torch.set_num_threads(1)
    if small:
        torch.manual_seed(0)
        config = TinyConfig(dim=32, layers=2, heads=2, head_dim=16, ffn=48)
        model = TinyWorld(TinyWorldModel(config))
    else:
        model = load_model("tiny")
    if fps:
        model.presentation = dataclasses.replace(model.presentation, fps=fps)
    world = Weighed(model, undo=48, worlds=2)
    world.period, world.scales = period, {"blocks": period, "resident": 0, "trimmed": 0}
    return world


def wording(generator):
    """Words for one of twelve themes, hardly ever the same twice."""
    words = [generator.choice(PLACES), generator.choice(TIMES)]
    for _ in range(generator.randrange(8)):
        words.insert(generator.randrange(len(words) + 1), generator.choice(OTHER))
    return " ".join(words)


class Plan:
    """What is asked between two blocks, drawn anew each time; the same for all ways through."""

    def __init__(self, seed):
        self.generator = random.Random(seed)

    def next(self, worlds, undo, saved):
        """(request, arguments) or None."""
        draw, generator = self.generator.random(), self.generator
        if draw < 0.10:
            return "prompt", {"text": wording(generator)}
        if draw < 0.15 and worlds == 1:
            return "fork", {}
        if draw < 0.20 and worlds == 2:
            return "close", {"world": generator.choice("ab")}
        if draw < 0.25 and undo:
            return "rewind", {"back": generator.randrange(1, undo + 1)}
        if draw < 0.27:
            return "save", {}
        if draw < 0.28 and saved:
            return "load", {"name": generator.choice(saved)}
        return None


async def through_stage(call, blocks, seed, folder, note):
    """Ask a Stage, here or in a worker, for everything directly."""
    plan, saved, prompts, blank = Plan(seed), [], {"a": "meadow day"}, 0
    extent = await call("reset", seed=seed)
    for block in range(1, blocks + 1):
        orders = {name: Order(plan.generator.choice(ACTIONS), prompts.pop(name, None)) for name in extent["made"]}
        extent = await call("step", orders=orders)
        note(block, extent["kv_bytes"])
        name = plan.generator.choice(list(extent["made"]))
        asked = plan.next(len(extent["made"]), extent["undo"][name], saved)
        if asked is None:
            continue
        request, given = asked
        if request == "prompt":
            await call("prepare", text=given["text"])
            prompts[name] = given["text"]
        elif request == "fork":
            extent = await call("fork")
        elif request == "close":
            extent, prompts = await call("close", name=given["world"]), {}
        elif request == "rewind":
            extent = await call("rewind", names=[name], position=max(0, extent["made"][name] - given["back"]))
        elif request == "save":
            blank += 1
            saved.append(f"world-{blank}")
            extent = await call("save", name=name, folder=folder / saved[-1])
            for old in saved[:-3]:
                shutil.rmtree(folder / old)
            del saved[:-3]
        elif len(extent["made"]) == 1:  # there is room for one more world beside it
            extent, prompts = await call("load", folder=folder / given["name"]), {}


async def through_server(blocks, seed, folder, note, opener):
    """Drive a server as a page does, over its WebSocket, with video."""
    from tests.stream.stream_client import Viewer, running, until

    plan, counts = Plan(seed), {"refused": 0}
    async with running(folder, opener=opener) as server:
        viewer = await Viewer.join(server)
        await viewer.request("video", codec="h264")
        made, saved = 0, []
        while made < blocks:
            await until(lambda: viewer.all("block"))
            seen = viewer.all("block")
            viewer.messages.clear(), viewer.pictures.clear()
            for block in seen:
                made += 1
                note(made, block["kv_bytes"])
            undo = min(seen[-1]["undo"].values())
            asked = plan.next(len(seen[-1]["made"]), undo, saved)
            await viewer.say("keys", seq=made, pressed=[plan.generator.choice(ACTIONS[1:])])
            if asked is None:
                continue
            request, given = asked
            if request == "rewind":
                given = {"frame": max(0, min(seen[-1]["made"].values()) - given["back"])}
            answer = await viewer.request(request, **given)
            counts["refused"] += answer["type"] == "error"
            if request == "save" and answer["type"] == "done":
                saved.append(answer["result"]["name"])
                for old in saved[:-3]:
                    shutil.rmtree(server.archive.world(old))
                del saved[:-3]
            assert server.session.phase == "running", server.session.crash
        await viewer.leave()
    print(f"{counts['refused']} requests were refused")


def judge(weights, blocks):
    """What is wrong with (block, resident, trimmed), in words; nothing if it is flat."""
    first, reference = blocks // 10, blocks // 5  # the 500th and the 1,000th of 5,000
    at, trimmed = np.array([(block, each) for block, _, each in weights if block >= first]).T
    start, *_ = resident = [each for block, each, _ in weights if block >= reference]
    slope, _ = np.polyfit(at, trimmed, 1)
    flat, growth = float(1 + slope * (at[-1] - at[0]) / trimmed.mean()), max(resident) / start
    print(
        f"after a trim {flat:.4f} times as much at the end as at block {first}, by a fitted line (most / least of "
        f"{len(at)}: {trimmed.max() / trimmed.min():.4f}); as it is, most / that at block {reference}: {growth:.3f}"
    )
    return [f"{flat:.4f} > {FLAT}"] * (flat > FLAT) + [f"{growth:.3f} > {GROWTH}"] * (growth > GROWTH)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--through", choices=["process", "worker", "server"], default="process")
    parser.add_argument("--small", action="store_true", help="a network of a few thousand numbers")
    args = parser.parse_args(arguments)
    period = max(1, args.blocks // 100)
    weights = {"world": [], "server": []}

    def note(block, nbytes):
        if block % period == 0:
            weights["world"].append((block, nbytes["resident"], nbytes["trimmed"]))
            if args.through == "server":
                weights["server"].append((block, *weigh()))
            told = [f"{name} {r / 2**20:.1f} MiB, trimmed {t / 2**20:.1f}" for name, (*_, (_, r, t)) in pairs()]
            print(f"block {block}: {'; '.join(told)}", flush=True)

    def pairs():
        return [(name, rows) for name, rows in weights.items() if rows]

    async def run(folder):
        if args.through == "server":
            opener = functools.partial(open_weighed, period, args.small, fps=200)
            await through_server(args.blocks, args.seed, folder, note, opener)
            return
        opener = functools.partial(open_weighed, period, args.small)
        if args.through == "worker":
            remote = Remote(opener)
            await remote.opened()
            await through_stage(remote.call, args.blocks, args.seed, folder, note)
            await remote.close()
            return
        stage = Stage(opener)

        async def call(name, /, **given):
            return getattr(stage, name)(**given)

        await through_stage(call, args.blocks, args.seed, folder, note)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
    wrong = [f"{name}: {text}" for name, rows in pairs() for text in judge(rows, args.blocks)]
    for text in wrong:
        print("GROWS", text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
