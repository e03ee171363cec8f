"""What `python -m benchmarks gpu` does, most wanted first, and how long each may take.

The caps of first_call's stages fit one call of FIRST minutes together. What follows is done in the time that is left,
of a second call or of an hour. Speed waits for no test: every contender is checked before it is timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .environment import device_name
from .gpu import FINISH, NO_TESTS, SAID_NO, STOPPED, Job, Run, Stage
from .ledger import ROOT
from .processes import search_path
from .summary import summary

FIRST = 7.5  # minutes
SHAPE = "wan1.3b-480p"
# 1 frame over 21; 3 frames over 6; Wan 14B; grouped heads. The quick ones first.
OTHERS = ("1560x32760x12x128", "4680x9360x12x128", "wan14b-480p", "4680x32760x48/8x128")
FORMATS = "bf16,int8,i8f8,fp8,int4,int8+bf16,int8+fp32"
TRITON_FORMATS = "bf16,int8,i8f8,int8+bf16,int8+fp32"
PEERS = "sdpa-flash,sdpa-cudnn,flash-attn-3"
SLOW_PEERS = "flex,flashinfer,flash-attn-4,sage,cudnn"  # they compile at their first call, or nobody has them
# pytest's -k for the tests of each kind of page in HOPPER_TESTS (KINDS there).
PROBES = {
    "bf16": "bf16 and not wide",
    "f16": "f16 and not bf16",
    "i8f8": "i8f8 and not wide",
    "fp8": "fp8 and not wide",
    "wide int8": "wide and int8",
    "wide i8f8": "wide and i8f8",
    "wide fp8": "wide and fp8",
    "wide int4": "wide and int4",
}
HOPPER_TESTS = ("tests/cuda/test_hopper_stages.py", "tests/cuda/test_hopper_gpu.py")
# What compute-sanitizer gets through in a minute. racecheck does not follow mbarriers through TMA everywhere, and three
# warpgroups clear the unused end of a page with the same zeros: read what it says before believing it.
SMALL = "(test_1 or test_2) and 128 or test_3_accumulate or test_3_bias"
METRICS = (
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,sm__cycles_active.avg,"
    "lts__t_sector_hit_rate.pct,dram__bytes_read.sum,smsp__issue_active.avg.pct_of_peak_sustained_active,"
    "l1tex__data_bank_conflicts_pipe_lsu.sum"
)
# For who has an hour: families at their reference shapes.
REST = (
    ("e2e", "-"),
    ("attention", SHAPE),  # with the formats and peers that were left out above
    ("attention", "wan14b-480p"),
    ("attention", "magi-4.5b"),
    ("kv_pages", "magi-4.5b"),
    ("linear", "wan14b-480p"),
    ("page_table", "-"),
)
TESTED = (0, SAID_NO, NO_TESTS, STOPPED)  # exit codes of pytest, or its time was up: a finding each


def gpu_run(out: Path, dry: bool = False) -> Run:
    """A run that goes through all of it; `dry` on the CPU, at shapes for tests."""
    plan = Plan(out, dry)
    return Run(out, plan.stages, dry, summary, plan.plots, device=device_name(plan.device))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a run whose rows go to out/run.jsonl."""

    out: Path
    dry: bool = False

    def stages(self) -> Iterator[Stage]:
        """One by one: whether there is an extension is known when the build is over."""
        yield from self.first_call()
        yield from self.later()

    def first_call(self) -> Iterator[Stage]:
        yield Stage("build", (*self.build(), *self.first_calls()), 125, 30)
        yield self.one("environment", self.bench("env", "--device", self.device), 8, 5)
        probe = module("pytest", "-v", "-m", "gpu", *HOPPER_TESTS)
        probes = [
            Job(f"probe {kind}", [*probe, "-k", f"({which}) and not test_4"], TESTED, "tests.txt")
            for kind, which in list(PROBES.items())[: 1 if self.dry else None]
        ]
        lacks = self.lacks_hopper()
        yield Stage("probes", tuple(probes), 25, 15, lacks)
        peers = "sdpa" if self.dry else f"{PEERS},flex,ours-triton"
        yield self.one("speed of peers and Triton", self.attention((SHAPE,), peers, TRITON_FORMATS), 55, 20)
        yield self.one("speed of Hopper", self.attention((SHAPE,), "ours-compiled", FORMATS, 8), 30, 15, lacks)
        yield self.block("compiled", 35, lacks)
        yield self.block("triton", 36, "a CPU runs no Triton" if self.dry else "")
        everyone = "sdpa" if self.dry else f"{PEERS},ours-triton"
        yield self.one("other shapes, peers and Triton", self.attention(OTHERS, everyone, TRITON_FORMATS), 38, 20)
        yield self.one("other shapes, Hopper", self.attention(OTHERS, "ours-compiled", FORMATS, 12), 30, 15, lacks)
        hazards = module("inferix_kernels", "hazards", "--arch", "90a")
        yield self.one("hazards", hazards, 30, 15, lacks or no_command("hazards"))
        yield self.counters("compiled", lacks)

    def later(self) -> Iterator[Stage]:
        lacks = "a CPU has none" if self.dry else no_command("prove")
        yield self.one("proof", module("inferix_kernels", "prove"), 60, 20, lacks)
        slow = self.attention((SHAPE, *OTHERS), "sdpa" if self.dry else SLOW_PEERS, "bf16,fp8,int8")
        yield self.one("speed of peers that compile", slow, 60, 20)
        lacks, sanitizer = self.lacks_hopper(), tool("compute-sanitizer")
        for what in ("memcheck", "racecheck"):
            command = [str(sanitizer), "--tool", what, "--error-exitcode", "9", *module("pytest", "-q", "-m", "gpu")]
            job = Job(what, [*command, *HOPPER_TESTS, "-k", SMALL], (*TESTED, 9), "tests.txt")
            yield Stage(what, (job,), 45, 20, lacks or ("" if sanitizer else "compute-sanitizer is not here"))
        ops = [f"tests/ops/test_{family}.py" for family in ("kv_pages", "qkv", "attention")]
        sample = ["-p", "benchmarks.sample_tests", "--every", "20", "--continue-on-collection-errors"]
        yield self.tests("a sample of the ops' tests", *sample, *ops, cap=60)
        for family in ("kv_pages", "qkv", "linear"):
            run = self.bench("run", family, *self.shapes(SHAPE), "--isolate", "--resume", *self.measured)
            yield self.one(f"{family} {SHAPE}", run, 60)
        yield self.counters("triton", "a CPU has none" if self.dry else "")
        yield self.one("kernels", module("inferix_kernels"), 60)
        for family, shape in () if self.dry else REST:
            run = self.bench("run", family, *self.shapes(shape), "--isolate", "--resume", *self.measured)
            yield self.one(f"{family} {shape}", [*run, "--model", "self-forcing"], 300, 60)
        sweep = self.bench("sweep", "--shape", "smoke" if self.dry else "wan1.3b-480p-frame", *self.measured)
        yield self.one("sweep", sweep, 300, 60)
        yield self.tests("tests", "--continue-on-collection-errors", "tests", cap=1500, least=120)

    # What stages are made of.

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def measured(self) -> list[str]:
        quick = ["--rounds", "3", "--seconds", "1", "--warm-l2"] if self.dry else ["--rounds", "20", "--seconds", "2"]
        return ["--device", self.device, "--json", str(self.out / "run.jsonl"), *quick]

    def shapes(self, *names: str) -> list[str]:
        if names == ("-",):
            return []
        return ["--shapes", "smoke" if self.dry else ",".join(names)]

    def bench(self, *words: str) -> list[str]:
        return module("benchmarks", *words)

    def one(self, name: str, command: list[str], cap: float, least: float = 10, lacks: str = "") -> Stage:
        return Stage(name, (Job(name, command, (0, SAID_NO)),), cap, least, lacks)

    def tests(self, name: str, *words: str, cap: float, least: float = 15) -> Stage:
        job = Job(name, module("pytest", "-q", "-m", "gpu", *words), TESTED, "tests.txt")
        return Stage(name, (job,), cap, least)

    def attention(self, shapes: Sequence[str], backends: str, formats: str, patience: int = 20) -> list[str]:
        """Contenders in processes of their own, but for those in run.jsonl."""
        wanted = ["--ops", "paged_attention", "--backends", backends, "--formats", formats]
        run = self.bench("run", "attention", "--isolate", "--resume", *self.shapes(*shapes), *wanted)
        return [*run, "--patience", str(patience), *self.measured]

    def block(self, backend: str, cap: float, lacks: str) -> Stage:
        command = self.bench("run", "block", "--backends", f"ours-{backend}", *self.measured)
        name = f"block {backend}"
        return Stage(name, (Job(name, command, (0, SAID_NO), "profile.txt"),), cap, 20, lacks)

    def counters(self, backend: str, lacks: str) -> Stage:
        """By ncu, whose clock control would change the card's settings. Two calls of each format, both counted."""
        ncu = tool("ncu")
        command = [str(ncu), "--clock-control", "none", "--metrics", METRICS, "--kernel-name", "regex:attention_kernel"]
        run = self.bench("run", "attention", *self.shapes(SHAPE), "--device", self.device, "--rounds", "0")
        run += ["--backends", f"ours-{backend}", "--formats", "bf16,int8,i8f8"]
        name = f"counters of {backend}"
        return self.one(
            name, [*command, "--launch-count", "8", *run], 25, 15, lacks or ("" if ncu else "ncu is not here")
        )

    def first_calls(self) -> Iterator[Job]:
        """Triton's kernels, flex and the block compile while the extension is built, and are found compiled later.
        Each shape in a process of its own: Triton compiles anew for each, and a rented machine has the cores."""
        checked, fine = ["--device", self.device, "--rounds", "0"], (0, SAID_NO, STOPPED)
        for backend, shape in [("ours-triton", shape) for shape in (SHAPE, *OTHERS)] + [("flex", SHAPE)]:
            run = self.bench("run", "attention", *self.shapes(shape), "--isolate", "--ops", "paged_attention")
            run += ["--backends", "sdpa" if self.dry else backend, "--formats", TRITON_FORMATS, "--patience", "60"]
            yield Job(f"first calls, {backend} {shape}", [*run, *checked], fine)
            if self.dry:
                break
        yield Job("first block", self.bench("run", "block", "--backends", "ours-triton", *checked), fine)

    def build(self) -> Iterator[Job]:
        """Of the CUDA kernels for this GPU alone, unless what is there has them, loads and is not older than they."""
        for (
            path
        ) in sources():  # copied from a machine whose clock is ahead, it would be newer than all that is made of it
            if path.stat().st_mtime > time.time():
                os.utime(path)
        has = extension(older=self.dry)
        if has == "with CUDA" or (has and (self.dry or not tool("nvcc"))):
            return
        arch = "90a" if self.dry or not without_hopper() else "80"
        words = ["setup.py", "build_ext", "--inplace", "--parallel", str(os.cpu_count() or 1)]
        yield Job("build", [sys.executable, *words, "--cuda-architectures", arch], always=True)

    def lacks_hopper(self) -> str:
        """Why nothing can be known of Hopper's kernels here; empty if it can."""
        if not self.dry and (reason := without_hopper()):
            return reason
        if self.dry or extension() == "with CUDA":
            return ""
        return "the extension is not built with CUDA" + ("" if tool("nvcc") else ": there is no nvcc on PATH")

    def plots(self) -> Stage | None:
        """rates.png and sweep.png, of what there is."""
        record = self.out / "run.jsonl"
        text = record.read_text() if record.exists() else ""
        draw = self.bench("report", "--records", str(record))
        wanted = [("rates.png", "--plot", '"seconds"'), ("sweep.png", "--plot-sweep", '"family": "sweep"')]
        jobs = [Job(name, [*draw, option, str(self.out / name)]) for name, option, of in wanted if of in text]
        return Stage("plots", tuple(jobs), 2 * FINISH, FINISH) if jobs else None


def module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def extension(older: bool = False) -> str:
    """ "with CUDA", "without CUDA", or "" if none loads; nor, unless asked so, one that is older than its sources.

    What loads says so, not what an earlier call remembers: it may have been on another machine. It is loaded in a
    process of its own, since this one could not load another later.
    """
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("inferix_kernels._C")
    if spec is None or spec.origin is None:
        return ""
    if not older and Path(spec.origin).stat().st_mtime < max(path.stat().st_mtime for path in sources()):
        return ""
    code = f"import sys; sys.path.insert(0, {str(Path(spec.origin).parent)!r}); import _C; print(_C.has_cuda)"
    try:
        said = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        return ""
    return {"True": "with CUDA", "False": "without CUDA"}.get(said.strip(), "")


def sources() -> list[Path]:
    """Of the extension."""
    return [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]


def without_hopper() -> str:
    """Why this GPU runs no Hopper kernels; empty if it does."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "" if major == 9 else f"needs a Hopper GPU (sm_90), and this is sm_{major}{minor}"


def no_command(name: str) -> str:
    """Why `python -m inferix_kernels NAME` can't be asked for; empty if it can."""
    there = f'"{name}"' in (ROOT / "inferix_kernels" / "__main__.py").read_text()
    return "" if there else f"python -m inferix_kernels has no command {name}"


def tool(name: str) -> str | None:
    return shutil.which(name, path=search_path())
