"""A rented machine, simulated: time is a number that fake commands move on, so that nothing waits or is in a hurry."""

from benchmarks.harness import plan, processes
from benchmarks.harness.gpu import Job, Run, Stage
from benchmarks.harness.ledger import fingerprints
from benchmarks.harness.rows import Row

NEVER = float("inf")
HEADER = {
    "date": "2026-11-30T12:00:00+00:00", "device": "NVIDIA H200", "architecture": "sm_90", "commit": "abc", "note": "",
    "dirty": False, "kernels": fingerprints(), "settings": {"threads": 1, "timer": "graph", "cold": True},
    "software": {"torch": "2.11.0"},
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Command:
    """Takes so many seconds of the clock, then does something and ends."""

    def __init__(self, clock, lasts=1.0, code=0, said="", does=None, can_be_ended=True):
        self.clock, self.ends, self.code, self.said, self.does = clock, clock.now + lasts, code, said, does
        self.can_be_ended = can_be_ended

    def wait(self, seconds):
        self.clock.now = max(self.clock.now, min(self.clock.now + seconds, self.ends))
        if self.clock.now < self.ends:
            return None
        if self.does:
            self.does()
        return self.code

    def kill(self):
        self.clock.now += 0.0 if self.can_be_ended else processes.GRACE
        return self.can_be_ended

    def output(self, most):
        return self.said


class Machine:
    """Starts fake commands: by the name of a job, what they take and do."""

    def __init__(self, **script):
        self.clock, self.script, self.started = Clock(), script, []

    def __call__(self, job):
        self.started.append(job.name)
        given = self.script.get(job.name, {})
        if isinstance(given, OSError):
            raise given
        return Command(self.clock, **given)

    def run(self, out, stages, **more):
        return Run(out, lambda: iter(stages), clock=self.clock, start=self, **more)


def stage(name, cap=60.0, least=10.0, lacks="", **job):
    return Stage(name, (Job(name, ["x"], **job),), cap, least, lacks)


def a_row(contender="ours-compiled", format="bf16", tflops=600.0, **more):
    flops = 4.0 * 4680 * 32760 * 12 * 128
    given = {"flops": flops, "seconds": [flops / 1e12 / tflops] * 5, "nbytes": 1, "kernel": "cuda/attention"} | more
    return Row(
        "attention", "paged_attention", plan.SHAPE, contender, format, "cuda", given.pop("status", "ok"), **given
    )
