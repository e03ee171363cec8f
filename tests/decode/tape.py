"""What stands for a CUDA graph on a CPU.

`Tape` notes every operation of torch and every call of a kernel, with the very tensors that they were given, and plays
them again. Python is not run again, and addresses are those of the recording: what lies elsewhere, or is stale, shows
in the results.
"""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host import tensors_in
from tests.decode.recording_backend import listening


def storage(x):
    return x.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors_in(args, kwargs)}
        new = [i for i, x in enumerate(tensors_in(made)) if storage(x) not in given]  # others are views, or written to
        self.steps.append((func, args, kwargs or {}, [tensors_in(made)[i] for i in new], new))
        return made

    def listen(self, op, function, args, kwargs):
        self.steps.append((function, args, kwargs, [], []))

    def replay(self):
        for func, args, kwargs, places, new in self.steps:
            made = tensors_in(func(*args, **kwargs))
            for place, i in zip(places, new):
                place.copy_(made[i])


class TapeRecorder:
    """A Recorder of tapes.

    Attributes:
        here: the stream that launches go to.
        waits: (stream, the one that it waited for).
        tapes, replays: how many were recorded, and played.
    """

    def __init__(self):
        self.here, self.waits, self.tapes, self.replays = "main", [], 0, 0

    def stream(self):
        return self.here

    def wait_for(self, stream):
        self.waits.append((self.here, stream))

    def record(self, make):
        tape = Tape()
        with tape, listening(tape.listen):
            made = make()
        for x in made:
            x.fill_(float("nan"))  # a capture computes nothing
        self.tapes += 1

        def replay():
            self.replays += 1
            tape.replay()

        return made, replay
