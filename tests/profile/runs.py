"""Recordings for the tests of what is made of them: by a clock of our own, the same every time."""

from inferix import profile
from inferix_kernels import profile as spans


def recorded(clock, blocks=30, attention=2.0, system=(), capacity=1 << 12, name="world", more=0.0):
    """Blocks of 20 ms, of which attention has `attention` ms in each of 2 steps; 2 ms between blocks are nobody's."""
    recording = profile.start("layer", capacity)
    recording.perf, recording.unix = clock.now, 1_000_000.0
    for number in range(blocks):
        with spans.block() as block:
            with spans.timed("denoise"):
                for step in range(2):
                    with spans.span("step", step=step):
                        with spans.span("attention"):
                            clock.now += (attention + number % 3 * 0.01) / 1e3
                        clock.now += 7e-3 - attention / 1e3
            with spans.timed("pictures"):
                clock.now += 6e-3 + more
            spans.count("pages read", 12)
            spans.metric("KV bytes int8", 2**20 * min(number, 10))
            block.frames = 3
        clock.now += 2e-3
    profile.record("send", clock.now - 3e-3, clock.now - 1e-3, track="viewers")
    profile.record("send", clock.now - 2e-3, clock.now, track="viewers")
    profile.stop()
    return profile.snapshot(recording, name, system)
