"""The first meeting of the Hopper kernels with a GPU, in one call of under eight minutes.

    python setup.py build_ext --inplace && python -m benchmarks.bringup_sm90 --out FOLDER

In order: what is here; each stage by itself (a TMA load, one product of each type, the whole) with pytest; memory and
races with compute-sanitizer; speed at five shapes beside torch's attention and FlashAttention-3 if it is installed;
counters with ncu. Every step has a time limit of its own, since a kernel that waits for ever is the likeliest mistake;
what no longer fits into the eight minutes is left out by name. FOLDER receives bringup.log and speed.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix_kernels import KVPages, PageList, Plan, compiled, kv_append, make_plan, paged_attention

ROOT = Path(__file__).parent.parent
LIMIT = 6.5 * 60  # seconds, of everything but the build
PAGE = 64
STAGES = ("test_1", "test_2", "test_3_attention", "test_3", "test_4")
# What compute-sanitizer gets through in a minute.
SMALL = "(test_1 or test_2) and 128 or test_3_accumulate or test_3_bias"


class Shape(NamedTuple):
    name: str
    queries: int
    frames: int  # of 1560 tokens
    heads: int
    kv_heads: int


SHAPES = (
    Shape("W: Wan 1.3B, 3 frames over 21", 4680, 21, 12, 12),
    Shape("frame-wise, 1 frame over 21", 1560, 21, 12, 12),
    Shape("Wan 14B, 3 frames over 21", 4680, 21, 40, 40),
    Shape("grouped heads, 48 over 8", 4680, 21, 48, 8),
    Shape("short window, 3 frames over 6", 4680, 6, 12, 12),
)
D, FRAME = 128, 1560
# Format of the pages, whether they are multiplied in 8 bits, and how far that may leave a right result from attention
# to what was never quantized (rel. L2 error on normal numbers). tests/test_hopper.py holds the formats to it.
OURS = {
    "bf16": ("bf16", False, 0.02),
    "i8f8": ("i8f8", True, 0.06),
    "fp8": ("fp8", True, 0.08),
    "int8 as bf16": ("int8", False, 0.02),
    "i8f8 as bf16": ("i8f8", False, 0.05),
    "int4 as bf16": ("int4", False, 0.2),
}
LIMITS = {f"inferix, {name} pages": limit for name, (_, _, limit) in OURS.items()}


class Log:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "bringup.log").open("w")
        self.started = time.monotonic()

    def left(self) -> float:
        return LIMIT - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.started:6.1f} s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def step(self, name: str, command: list[str], seconds: float, lines: int = 25, may_skip: bool = True) -> bool:
        """Run a command, show the end of what it says. `may_skip`: tests that were skipped are no failure."""
        seconds = min(seconds, self.left())
        if seconds < 5:
            self.say(f"{name}: left out, the time is up")
            return False
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            code: object = result.returncode
            output = result.stdout + result.stderr
        except subprocess.TimeoutExpired as error:
            code = f"stopped after {seconds:.0f} s: a deadlock?"
            output = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode(errors="replace")
        said = output.splitlines()[-lines:]
        if code == 0 and not may_skip and "skipped" in said[-1]:
            code = "something was skipped"
        self.say(f"{name}: {'passed' if code == 0 else f'FAILED ({code})'}")
        self.say("\n    " + "\n    ".join(said))
        return code == 0


def tests(which: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "gpu",
        "tests/test_hopper_stages.py",
        "tests/test_hopper_gpu.py",
        "-k",
        which,
    ]


def check(log: Log) -> bool:
    good = True
    for stage in STAGES:
        # An op that has no kernel is skipped by its tests; here a kernel that refuses its arguments would be.
        good = log.step(stage, tests(stage), 60, may_skip=False) and good
    families = [f"tests/test_{family}.py" for family in ("kv_pages", "qkv", "attention")]
    good = log.step("all ops", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *families], 75) and good
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        log.say("compute-sanitizer: not here")
        return good
    for what in ("memcheck", "racecheck"):
        # racecheck does not follow mbarriers through TMA everywhere, and three warpgroups clear the unused end of a
        # page with the same zeros, each for itself: read what it says before believing it.
        log.step(what, [sanitizer, "--tool", what, "--error-exitcode", "9", *tests(SMALL)], 75)
    return good


def inputs(shape: Shape, format: str) -> tuple[Tensor, Tensor, Tensor, KVPages, Plan]:
    """Random numbers, never zeros: on those tensor cores run 13% faster. One page list, shuffled by frames."""
    generator = torch.Generator("cuda").manual_seed(0)
    keys = shape.frames * FRAME
    q = torch.randn(shape.queries, shape.heads, D, device="cuda", generator=generator).bfloat16()
    k, v = (torch.randn(keys, shape.kv_heads, D, device="cuda", generator=generator).bfloat16() for _ in range(2))
    lens = ([PAGE] * (FRAME // PAGE) + [FRAME % PAGE]) * shape.frames
    per_frame = len(lens) // shape.frames
    order = torch.randperm(shape.frames, generator=torch.Generator().manual_seed(1)).tolist()
    ids = [frame * per_frame + i for frame in order for i in range(per_frame)]
    pool = KVPages.empty(format, len(ids), shape.kv_heads, PAGE, D, "cuda")
    kv_append(k, v, pool, PageList.of(ids, lens, "cuda"), backend="compiled")
    return q, k, v, pool, make_plan([(shape.queries, ids, lens)], "cuda")


def ours(eight_bit: bool, q: Tensor, pool: KVPages, plan: Plan, out: Tensor, lse: Tensor) -> Tensor:
    compiled.ALLOW_8_BIT = eight_bit
    return paged_attention(q, [pool], plan, out=out, lse=lse, backend="compiled")[0]


def contenders(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, (format, eight_bit, _) in OURS.items():
        q, k, v, pool, plan = inputs(shape, format)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
        calls[f"inferix, {name} pages"] = functools.partial(ours, eight_bit, q, pool, plan, out, lse)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def sdpa(backend: str) -> Tensor:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            grouped = shape.heads != shape.kv_heads
            out = F.scaled_dot_product_attention(*heads_first, enable_gqa=grouped)  # type: ignore[misc,arg-type]
        return out[0].transpose(0, 1)

    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        calls[f"SDPA, {backend.lower()}"] = functools.partial(sdpa, backend)
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return calls
    for splits in (1, 2, 3, 4):
        flash = functools.partial(flash_attn_func, q[None], k[None], v[None], num_splits=splits)
        calls[f"FlashAttention-3, {splits} splits"] = lambda flash=flash: _first(flash())[0]  # type: ignore[misc]
    return calls


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def seconds_of(call: Callable[[], Tensor], rounds: int) -> list[float]:
    """By CUDA events, with the L2 cache emptied before each."""
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    call()
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def speed(log: Log, folder: Path, rounds: int) -> None:
    records = []
    for shape in SHAPES:
        if log.left() < 20:
            log.say(f"{shape.name}: left out, the time is up")
            continue
        flop = 4 * shape.queries * shape.frames * FRAME * D * shape.heads
        calls = contenders(shape)
        exact = None
        for name in sorted(calls, key=lambda name: not name.startswith("SDPA")):  # peers first: they are the measure
            try:
                got = calls[name]().float()
                torch.cuda.synchronize()
            except RuntimeError as error:
                log.say(f"{shape.name} | {name}: {str(error).splitlines()[0]}")
                continue
            exact = got if exact is None else exact
            off = float((got - exact).norm() / exact.norm())
            if off > LIMITS.get(name, 0.02):
                log.say(f"{shape.name} | {name}: WRONG by {off:.2g}, not timed")
                continue
            times = seconds_of(calls[name], rounds)
            median = statistics.median(times)
            records.append({"shape": shape.name, "contender": name, "error": off, "seconds": times})
            log.say(
                f"{shape.name} | {name}: {1e3 * median:.3f} ms, {flop / median / 1e12:.0f} TFLOP/s, error {off:.2g}"
            )
        (folder / "speed.json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "records": records}))


def counters(log: Log) -> None:
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        log.say("ncu: not here")
        return
    metrics = (
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,sm__cycles_active.avg,"
        "lts__t_sector_hit_rate.pct,dram__bytes_read.sum,smsp__issue_active.avg.pct_of_peak_sustained_active,"
        "l1tex__data_bank_conflicts_pipe_lsu.sum"
    )
    for name in ("bf16", "i8f8", "int8 as bf16"):
        program = [sys.executable, "-m", "benchmarks.bringup_sm90", "--once", name]
        which = ["--kernel-name", "regex:attention_kernel", "--launch-count", "1"]
        command = [ncu, "--clock-control", "none", "--metrics", metrics, *which, *program]
        log.step(f"ncu, {name}", command, 60, lines=15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bringup"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--once", choices=tuple(OURS), help="shape W once, for a profiler")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("this needs a Hopper GPU")
    if not compiled.HAS_CUDA:
        raise SystemExit("the extension was built without nvcc: put it on PATH, then pip install -e .")
    if options.once:
        format, eight_bit, _ = OURS[options.once]
        q, _, _, pool, plan = inputs(SHAPES[0], format)
        ours(eight_bit, q, pool, plan, torch.empty_like(q), torch.empty(q.shape[:2], device="cuda"))
        torch.cuda.synchronize()
        return
    log = Log(options.out)
    log.say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if check(log):
        speed(log, options.out, options.rounds)
        counters(log)
    else:
        log.say("a stage failed: nothing is timed")


if __name__ == "__main__":
    main()
