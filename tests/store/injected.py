"""Failures on purpose: at a call of a seam, or wherever Python looks for signals in the store's own code."""

import contextlib
import dis
import sys
from pathlib import Path

from inferix_kernels.store import page_table, passes, storage
from inferix_kernels.store.copies import Copies
from inferix_kernels.store.page_lists import PageLists
from inferix_kernels.store.slots import Pool

# Where the store hands on what can fail: (who has the name, the name).
SEAMS = (
    (storage, "kv_commit"),
    (storage, "kv_gather"),
    (passes, "kv_append"),
    (passes, "kv_commit"),
    (page_table, "kv_append"),
    (Copies, "_transfer"),
    (PageLists, "upload"),
    (Pool, "take"),
)
NOT_OURS = ("snapshot", "memory", "policy", "turns")
FILES = {str(path) for path in Path(storage.__file__).parent.glob("*.py") if path.stem not in NOT_OURS}


class Injected(BaseException):
    """As KeyboardInterrupt: no handler of the store's expects it."""


class Failure:
    """Whether it has happened."""

    fired = False

    def fire(self):
        self.fired = True
        raise Injected


@contextlib.contextmanager
def at_call(number, seams=SEAMS, late=False):
    """The call of this number of these seams together fails, before it has done anything or, if `late`, after all."""
    failure, calls = Failure(), 0

    def watched(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            here = calls == number
            if here and not late:
                failure.fire()
            result = real(*args, **kwargs)
            if here:
                del result
                failure.fire()
            return result

        return call

    real = [getattr(owner, name) for owner, name in seams]
    for (owner, name), function in zip(seams, real):
        setattr(owner, name, watched(function))
    try:
        yield failure
    finally:
        for (owner, name), function in zip(seams, real):
            setattr(owner, name, function)


@contextlib.contextmanager
def at_instruction(number, files=FILES):
    """The instruction of this number in the store's files fails, counting those before which Python looks for signals:
    after a call, where a function begins and where a loop begins again."""
    failure, passed = Failure(), 0

    def enter(frame, event, argument):
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, before = frame.f_code.co_code, ""

        def step(frame, event, argument):
            nonlocal passed, before
            if event != "opcode":
                return step
            here, before = before, dis.opname[code[frame.f_lasti]]
            looks = here.startswith("CALL") or here in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
            if looks and before != "PUSH_EXC_INFO":  # a call that raised goes to its handler without looking
                passed += 1
                if passed == number:
                    sys.settrace(None)
                    failure.fire()
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield failure
    finally:
        sys.settrace(before)
