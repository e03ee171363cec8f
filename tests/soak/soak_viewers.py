"""Viewers who come and go, and leave nothing behind: `python -m tests.soak.soak_viewers --seconds 30 --seed 0`.

Open tasks, threads, file handles and resident memory are those of before. A process of its own: a heap that other work
has left in pieces would hide what is looked for. Needs /proc, and the extra `stream`.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import operator
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from aiortc import RTCSessionDescription

from inferix.stream.webrtc import Connection
from tests.stream.stream_client import LOOP, PATIENCE, Viewer, running, until

VIEWERS = 4


async def watch(server, kind, seconds):
    """Join, watch one way or another, leave."""
    viewer = await Viewer.join(server, drive=kind == "jpeg")
    peer = None
    if kind == "webrtc":
        peer = Connection()
        peer.addTransceiver("video", direction="recvonly")
        peer.createDataChannel("keys", ordered=False, maxRetransmits=0)
        await peer.setLocalDescription(await peer.createOffer())
        answer = await viewer.request("offer", sdp=peer.localDescription.sdp)
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
    else:
        await viewer.request("video", codec=kind)
    await asyncio.sleep(seconds)
    seen = len(viewer.all("frame"))
    if peer is not None:
        await peer.close()
    await viewer.leave()
    return seen


def count():
    """Open tasks, threads and files, and resident MiB.

    The event loop's own pool of threads has a bound and fills when it pleases: its threads do not count.
    """
    gc.collect()
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later, in an arena for each thread there was, is no leak
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return len(asyncio.all_tasks(LOOP)), len(threads), len(os.listdir("/proc/self/fd")), resident


def soak(seconds: float, seed: int, folder: Path) -> None:
    generator = random.Random(seed)

    async def guest(server, until_when):
        seen = 0
        while time.monotonic() < until_when:
            kind = generator.choice(["h264", "jpeg", "webrtc", "webrtc"])
            seen += await watch(server, kind, generator.uniform(0.2, 2.0))
        return seen

    async def crowd(server, seconds):
        return await asyncio.gather(*(guest(server, time.monotonic() + seconds) for _ in range(VIEWERS)))

    async def all_left(server):
        await until(lambda: not server.lobby.clients and not server.session.player.broadcast.codecs)
        await until(lambda: not server._door._guests)

    async def least(looks=10, enough=lambda counts: False):
        """Of several looks: a block under way has a task of its own, and what has left takes a while to end."""
        lowest = count()
        for _ in range(looks):
            if enough(lowest):
                break
            await asyncio.sleep(0.1)
            lowest = [min(pair) for pair in zip(lowest, count())]
        return lowest

    async def visits():
        async with running(folder) as server:
            await crowd(server, seconds / 3)  # libraries load, pools fill
            await all_left(server)
            before = await least()
            seen = await crowd(server, 2 * seconds / 3)
            await all_left(server)
            after = await least(10 * PATIENCE, lambda counts: all(map(operator.le, counts[:3], before)))
            assert min(seen) > 0 and server.session.phase == "running"
            return before, after

    before, after = LOOP.run_until_complete(visits())
    assert after[0] <= before[0], f"tasks: {[task.get_stack() for task in asyncio.all_tasks(LOOP)]}"
    assert after[1] <= before[1], f"threads: {[thread.name for thread in threading.enumerate()]}"
    assert after[2] <= before[2], "file handles"
    # The allocator keeps a little of what a hundred connections have used; one connection leaked is megabytes.
    assert after[3] - before[3] < 24, f"resident memory grew from {before[3]:.0f} to {after[3]:.0f} MiB"
    print(f"before {before}, after {after}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="a third of them to warm up; a leak needs time to show"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        soak(args.seconds, args.seed, Path(scratch))


if __name__ == "__main__":
    main()
