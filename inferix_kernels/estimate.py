"""What bounds a kernel on a GPU that is not here, from its machine code. A model: nothing in here is measured.

`python -m inferix_kernels compile --estimate` prints it, for Triton's kernels and for the CUDA kernels that are built.

The hot loop is the cheapest way around a loop whose tensor-core instructions are all carried out. One warp that goes
around once keeps its quarter of a multiprocessor busy for so many cycles, at least:

- issue: one cycle for each instruction;
- tensor: its products, at the data sheet's rate;
- MUFU: the exponentials, of which four lanes are made in a cycle;
- shared memory: what products and loads read and stores write, 32 bytes in a cycle. Copies by TMA are left out.

Were all of that done at the same time, the largest would decide: the bound. No attention kernel gets there. What public
ones reach is near what the sum of tensor and issue cycles gives, as if neither ran while the other does: see MEASURED.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from . import sass
from ._dispatch import Unsupported

LANES, QUARTERS = 32, 4  # of a warp; of a multiprocessor
ROWS, KEYS = 16, 64  # instructions are counted for a warp's 16 queries and 64 keys
KEY_TILE, CONSUMERS = 128, 3  # kBlockN and kConsumers of csrc/cuda/layouts.h
_MUFU_CYCLES = LANES // 4  # 16 lanes a cycle and multiprocessor: CUDA C++ Programming Guide, arithmetic throughput
_SHARED_BYTES = 128 // QUARTERS  # a cycle
_GMMA = re.compile(r"([HIQ])GMMA\.(\d+)x(\d+)x(\d+)\.")
_MMA = re.compile(r"([HIQ])MMA\.(?:SP\.)?(16|8)8(\d+)\.")
_FROM_SHARED = re.compile(r"\S+ R\d+, gdesc")  # both operands of a GMMA are in shared memory
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes of a lane


class Gpu(NamedTuple):
    """From NVIDIA's data sheets: dense rates, without sparsity, at the boost clock they are given for."""

    name: str
    multiprocessors: int
    clock: float  # GHz
    macs: int  # multiply-adds of 16 bits, in a cycle of a quarter of a multiprocessor; of 8 bits twice as many


GPUS = {
    80: Gpu("A100", 108, 1.41, 256),  # 312 TFLOP/s: A100 Tensor Core GPU Architecture, table 3
    90: Gpu("H100 SXM, H200", 132, 1.83, 512),  # 989.4 TFLOP/s: H100 Tensor Core GPU Architecture, table 2
}
# Public attention kernels: where the figure is from, its TFLOP/s on an H100 SXM (forward, no mask, head_dim 128, 16,384
# tokens), and tensor and issue cycles of their hot loop as this module counts them (docs/gpu-path.md says in what).
MEASURED = {
    "FlashAttention-3, 16 bits": ("arXiv 2407.08608, figure 5", 648.0, (1408.0, 579)),
    "FlashAttention-3, fp8": ("arXiv 2407.08608, figure 7", 1008.0, (896.0, 662)),
    "Triton's tutorial, 16 bits": ("pytorch/benchmark, pull request 2391", 476.8, (1024.0, 508)),
}


class Cycles(NamedTuple):
    """What a warp's way around its hot loop takes of a quarter of a multiprocessor, each by itself."""

    tensor: float
    issue: float
    mufu: float
    shared: float

    @property
    def largest(self) -> str:
        return max(self._fields, key=lambda name: float(getattr(self, name)))


class Loop(NamedTuple):
    """The instructions of the cheapest way around a loop, and what was asked of it: by default multiply-adds."""

    lines: tuple[sass.Line, ...]
    work: int


class Estimate(NamedTuple):
    """Modelled: of one hot loop of a kernel."""

    kernel: str
    what: str
    gpu: Gpu
    cycles: Cycles
    macs: int
    head_dim: int = 0  # of attention; else 0

    @property
    def instructions_per_keys(self) -> float | None:
        """Of a warp, for 16 queries and 64 keys; None unless it is attention."""
        return self.cycles.issue * 2 * self.head_dim * ROWS * KEYS / self.macs if self.head_dim else None

    @property
    def bound(self) -> float:
        """TFLOP/s that it can't exceed."""
        return self.rate(max(self.cycles))

    @property
    def expected(self) -> tuple[float, float]:
        """TFLOP/s, as public kernels reach them: from the worst of them to the best."""
        serial = self.rate(self.cycles.tensor + self.cycles.issue)
        low, high = reached()
        return serial * low, serial * high

    def rate(self, cycles: float) -> float:
        return 2e-3 * self.macs / cycles * QUARTERS * self.gpu.multiprocessors * self.gpu.clock


def reached() -> tuple[float, float]:
    """The least and the greatest share of `tensor + issue` that MEASURED kernels reach.

    Example:
        >>> low, high = reached()
        >>> 0.5 < low < high < 1
        True
    """
    gpu = GPUS[90]
    shares = [
        tflops / (2e-3 * tensor * _rate(name, gpu) / (tensor + issue) * QUARTERS * gpu.multiprocessors * gpu.clock)
        for name, (_, tflops, (tensor, issue)) in MEASURED.items()
    ]
    return min(shares), max(shares)


def _rate(name: str, gpu: Gpu) -> int:
    return gpu.macs * (2 if "fp8" in name else 1)


def macs(line: sass.Line) -> int:
    """Multiply-adds of an instruction's warp: 0 but for tensor-core instructions whose shape is in their name.

    Example:
        >>> macs(sass.Line("HMMA.16816.F32.BF16 R4, R8, R10, R4", "0010"))
        2048
    """
    if match := _GMMA.match(line.opcode):
        return int(match[2]) * int(match[3]) * int(match[4]) // 4  # of four warps
    match = _MMA.match(line.opcode)
    return int(match[2]) * 8 * int(match[3]) if match else 0


def tensor_cycles(line: sass.Line, gpu: Gpu) -> float:
    rate = gpu.macs * (1 if line.opcode.startswith("H") else 2)
    return macs(line) / (rate / 2 if "TF32" in line.opcode else rate)


def shared_bytes(line: sass.Line) -> int:
    """Bytes of shared memory that an instruction's warp reads or writes, as if no two lanes meant the same.

    Example:
        >>> shared_bytes(sass.Line("LDS.128 R4, [R2]", "0010"))
        512
    """
    if match := _GMMA.match(line.opcode):  # k is 32 bytes of a row, whatever the type
        rows = int(match[3]) + (int(match[2]) if _FROM_SHARED.match(line.text) else 0)
        return rows * 32 // 4
    kind, *parts = line.opcode.split(".")
    if kind in ("LDSM", "STSM"):
        return 128 * int(parts[-1]) if parts[-1] in ("2", "4") else 128
    if kind in ("LDS", "STS", "LDGSTS"):
        return LANES * next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)
    return 0


def stored_bytes(line: sass.Line) -> int:
    return shared_bytes(line) if line.opcode.split(".")[0] == "STS" else 0


def hot_loops(
    code: Sequence[sass.Line], measure: Callable[[sass.Line], int] = macs, work: int | None = None
) -> list[Loop]:
    """The loops of a function in which `measure` is not 0, each by its cheapest way around.

    The cheapest in instructions. With `work`, the one cheapest way that does so much: an inner loop is gone through as
    often as that takes. Without, of each loop the ways that go through no line twice and do the most; loops that share
    what is measured are one, the one that costs the least for it.
    """
    following, amounts, issued = (
        sass.successors(code),
        [measure(line) for line in code],
        [bool(x.address) for x in code],
    )
    heads = {j for i, lines in enumerate(following) for j in lines if j <= i}
    found, most = [], len(code) ** 2
    for head in sorted(heads, reverse=True):  # inner loops first: with their cost no outer one is looked at for long
        if way := _cheapest(following, amounts, issued, head, work, most):
            found.append((way, sum(amounts[i] for i in way)))
            most = most if work is None else sum(issued[i] for i in way)
    found = found if work is None else found[-1:]
    loops: list[tuple[list[int], int]] = []
    for way, done in sorted(found, key=lambda one: (sum(issued[i] for i in one[0]) / one[1], one[0])):
        if all(not amounts[i] or all(i not in other for other, _ in loops) for i in way):
            loops.append((way, done))
    loops.sort(key=lambda loop: min(loop[0]))
    return [Loop(tuple(code[i] for i in way if code[i].address), done) for way, done in loops]


def _cheapest(
    following: Sequence[Sequence[int]],
    amounts: Sequence[int],
    issued: Sequence[bool],
    head: int,
    work: int | None,
    limit: int,
) -> list[int] | None:
    """The lines of the way around from `head` to before it; it comes by `head` once. None: no way does the work for at
    most so many instructions."""
    body = _body(following, head)
    if not any(amounts[i] for i in body):
        return None
    start = (head, amounts[head])
    cost, before = {start: int(issued[head])}, {start: start}
    ends: dict[int, tuple[int, tuple[int, int]]] = {}  # by work done: the cost, and the last state
    ahead = [(cost[start], start)]
    while ahead:
        spent, state = heapq.heappop(ahead)
        i, done = state
        if spent > cost[state]:
            continue
        for j in following[i]:
            if j == head:
                ends.setdefault(done, (spent, state))
            elif j in body and (work is not None or j > i):
                total = done + amounts[j]
                new = (j, total if work is None else min(total, work))
                price = spent + issued[j]
                if price <= limit and price < cost.get(new, price + 1):
                    cost[new], before[new] = price, state
                    heapq.heappush(ahead, (price, new))
    most = work if work is not None else max(ends, default=0)
    if not most or most not in ends:
        return None
    way = [state := ends[most][1]]
    while before[state] != state:
        way.append(state := before[state])
    return [i for i, _ in reversed(way)]


def _body(following: Sequence[Sequence[int]], head: int) -> set[int]:
    """The lines from which a jump back to `head` can be reached, without coming by it."""
    preceding: dict[int, list[int]] = {}
    for i, lines in enumerate(following):
        for j in lines:
            preceding.setdefault(j, []).append(i)
    body = {i for i in preceding.get(head, ()) if i >= head}
    ahead = list(body - {head})
    while ahead:
        new = set(preceding.get(ahead.pop(), ())) - body - {head}
        body |= new
        ahead += new
    return body


def cycles_of(lines: Iterable[sass.Line], gpu: Gpu) -> Cycles:
    """Of one warp that issues these instructions."""
    lines = list(lines)
    return Cycles(
        sum(tensor_cycles(line, gpu) for line in lines),
        len(lines),
        _MUFU_CYCLES * sum(line.opcode.startswith("MUFU") for line in lines),
        sum(shared_bytes(line) for line in lines) / _SHARED_BYTES,
    )


def of_listing(listing: str, what: str, architecture: int, head_dim: int = 0) -> list[Estimate]:
    """Of every kernel in a listing that has products in a loop: one for each of its hot loops.

    head_dim: of attention, for instructions per 64 keys.

    Raises:
        Unsupported: no data sheet of this architecture is in GPUS.
    """
    gpu = _gpu(architecture)
    return [
        Estimate(sass.readable(name), what, gpu, cycles_of(loop.lines, gpu), loop.work, head_dim)
        for name, code in sass.functions(listing).items()
        for loop in hot_loops(code)
    ]


def _gpu(architecture: int) -> Gpu:
    if architecture not in GPUS:
        raise Unsupported(f"an estimate is made for {' and '.join(f'sm_{x}' for x in GPUS)}, got sm_{architecture}")
    return GPUS[architecture]


def of_triton(architectures: Sequence[int], wanted: Sequence[str] = ()) -> Iterator[Estimate]:
    """Of Triton's kernels, compiled here: of all cases of `compile`, or of those that begin with what is wanted.

    Raises:
        Unsupported: no data sheet of an architecture is in GPUS; Triton is in its interpreter.
        ImportError: Triton is not installed.
    """
    from .triton_kernels import aot
    from .triton_kernels.launch import compile_only

    for architecture in architectures:
        _gpu(architecture)
    for case in aot.all_cases():
        name = f"{case.op} {case.format} {case.what}"
        if wanted and not any(name.startswith(prefix) for prefix in wanted):
            continue
        width = re.search(r"\bD (\d+)", case.what)
        for architecture in architectures:
            with compile_only(architecture) as kernels:
                try:
                    case.call()
                except Unsupported:  # of this architecture: `compile` says so
                    continue
            for kernel in kernels:
                listing = sass.listing_of(kernel.asm["cubin"])
                for one in of_listing(listing, case.what, architecture, int(width[1]) if width else 0):
                    yield one._replace(kernel=f"{case.op} {case.format}")


def of_extension() -> Iterator[Estimate]:
    """Of the Hopper attention kernels in the extension that is built here.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not here, or the extension holds no such kernels.
    """
    found = [
        of_attention(name, code)
        for cubin in sass.cubins(sass.extension(), "90a")
        for name, code in sass.functions(sass.disassemble(cubin)).items()
        if sass.readable(name).startswith("attention_kernel<")
    ]
    if not found:
        raise sass.MissingTool("the extension holds no kernels for sm_90a: it was built without nvcc")
    yield from sorted(found, key=lambda one: (-one.head_dim, list(sass.KINDS).index(one.what)))


def of_attention(name: str, code: Sequence[sass.Line]) -> Estimate:
    """Of one kernel of csrc/cuda/attention_sm90.cuh: the loop over key tiles of a consumer warp and, where codes are
    widened, a third of that of a producer warp, which does it for three.
    """
    gpu, (what, width) = GPUS[90], sass.readable(name).removesuffix(">").split("<")[1].split(", ")
    D = int(width)
    loop = min(hot_loops(code, work=2 * ROWS * KEY_TILE * D), key=lambda loop: len(loop.lines))
    cycles = cycles_of(loop.lines, gpu)
    if what.startswith("wide"):
        mine = _produced(code)
        tile = 2 * KEY_TILE * D * 2 // QUARTERS  # bytes of bf16 keys and values that one warp of four writes
        loops = hot_loops(code, lambda line: stored_bytes(line) if line.address in mine else 0, tile)
        more = cycles_of(min(loops, key=lambda loop: len(loop.lines)).lines, gpu)
        cycles = Cycles(*(mine + its / CONSUMERS for mine, its in zip(cycles, more, strict=True)))
    return Estimate("compiled paged_attention", what, gpu, cycles, loop.work, D)


def _produced(code: Sequence[sass.Line]) -> set[str]:
    """Addresses of what the producer's warps run: behind the setmaxnreg that gives registers away."""
    starts = [i for i, line in enumerate(code) if line.opcode.startswith("USETMAXREG.DEALLOC")]
    following = sass.successors(code)
    return {code[i].address for start in starts for i in sass.reached_from(start, following)}


COLUMNS = ("kernel", "", "GPU", "of 64 keys", "tensor", "issue", "MUFU", "shared", "at most", "by", "as public kernels")


def cells(one: Estimate) -> tuple[str, ...]:
    keys, (low, high) = one.instructions_per_keys, one.expected
    return (
        one.kernel,
        one.what + (f", D {one.head_dim}" if one.kernel.startswith("compiled") else ""),
        one.gpu.name.split()[0],
        "" if keys is None else f"{keys:.0f}",
        *(f"{number:.0f}" for number in one.cycles),
        f"{one.bound:.0f}",
        one.cycles.largest,
        f"{low:.0f} to {high:.0f}" if one.gpu == GPUS[90] else "",  # MEASURED are of that one
    )


def table(estimates: Iterable[Estimate]) -> Iterator[str]:
    """As text, line by line while they are made."""
    yield "modelled, never run on a GPU: cycles of a quarter of a multiprocessor for a warp's hot loop; TFLOP/s"
    layout = "{:34} {:34} {:5} {:>10} {:>7} {:>6} {:>6} {:>7} {:>8}  {:7} {}"
    yield layout.format(*COLUMNS)
    for one in estimates:
        yield layout.format(*cells(one)).rstrip()


def markdown(estimates: Iterable[Estimate]) -> Iterator[str]:
    for row in (COLUMNS, ["---"] * len(COLUMNS)):
        yield f"| {' | '.join(row)} |"
    for one in estimates:
        yield f"| {' | '.join(cells(one))} |"
