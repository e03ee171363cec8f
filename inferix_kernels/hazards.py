"""Register hazards of asynchronous wgmma: does compiled code touch their registers before it has waited for them?

A wgmma runs on after it was issued: until the wait that covers it, it may still read A, where A is in registers, and
write D. There is no hardware interlock: the compiler has to keep these registers unused, and has failed to before. So
every path from every product (wgmma) to its wait is followed through the SASS. `python -m inferix_kernels hazards
--arch 90a` does so for the extension that is built, `python -m inferix_kernels compile` for Triton's kernels.

Which registers an instruction reads and writes is taken from nvdisasm's life ranges, not from a table of ours.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import sass

PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")  # the asynchronous ones, by what they multiply: 16-bit, int8, fp8
_OPERANDS = re.compile(r"(?:@\S+ )?\S+ R(\d+)(?:\.reuse)?, (?:R(\d+)|gdesc)")
_SHAPE = re.compile(r"\.\d+x\d+x\d+")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\S* gsb0, (0x[0-9a-f]+)")  # without a condition
_A = 4  # registers of A: 64 rows of 32 bytes, over the 128 threads of a warp group


class Hazard(NamedTuple):
    """An instruction that touches registers of a product that may not have finished."""

    kernel: str
    product: str  # "12a0: HGMMA.64x64x16.F32.BF16 R24, R60, ..."
    other: str  # the instruction, likewise
    what: str  # "writes A", "reads D", "writes D", "overlaps D"
    registers: tuple[int, ...]

    def __str__(self) -> str:
        registers = ", ".join(f"R{number}" for number in self.registers)
        return f"{self.other} | {self.what} ({registers}) of | {self.product}"


class KernelHazards(NamedTuple):
    """A kernel that has asynchronous products, and its hazards."""

    kernel: str
    products: int
    hazards: tuple[Hazard, ...]


def check(binary: Path, arch: str) -> list[Hazard]:
    """Every hazard in the kernels for one architecture ("90a") of a binary that nvcc made; none if it holds none.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not here.
    """
    return [hazard for seen in inspect_binary(binary, arch) for hazard in seen.hazards]


def inspect_binary(binary: Path, arch: str) -> list[KernelHazards]:
    """As `check`, by kernel, and with the number of products that were followed."""
    seen = [kernel for cubin in sass.cubins(binary, arch) for kernel in inspect_listing(sass.disassemble(cubin, True))]
    return sorted(seen, key=lambda kernel: kernel.kernel)


def inspect_listing(listing: str) -> list[KernelHazards]:
    """The kernels of a listing that have asynchronous products.

    Raises:
        ValueError: the listing has no life ranges, or not in the format that is read here.
    """
    found = []
    for name, code in sass.functions(listing).items():
        if products := [i for i, line in enumerate(code) if _is_product(line)]:
            kernel, following = sass.readable(name), sass.successors(code)
            waits = [_groups_left(line) for line in code]
            hazards = [
                Hazard(kernel, _shown(code[product]), _shown(code[i]), what, tuple(sorted(registers)))
                for product in products
                for i in sorted(_in_flight(code, following, waits, product))
                for what, registers in _conflicts(code[product], code[i])
            ]
            found.append(KernelHazards(kernel, len(products), tuple(hazards)))
    return found


def _in_flight(
    code: Sequence[sass.Line], following: Sequence[Sequence[int]], waits: Sequence[int | None], product: int
) -> set[int]:
    """The lines that can be reached from a product before a wait that covers it."""
    most = 1 + max([wait for wait in waits if wait is not None], default=0)  # commits that need to be told apart
    reached = set()
    # A wait leaves the latest groups pending, so commits are counted from the product's own.
    seen = {(i, int(_commits(code[product]))) for i in following[product]}
    ahead = list(seen)
    while ahead:
        i, commits = ahead.pop()
        if (left := waits[i]) is not None and commits > left:
            continue
        reached.add(i)
        commits = min(commits + _commits(code[i]), most)
        new = {(j, commits) for j in following[i]} - seen
        seen |= new
        ahead += new
    return reached


def _conflicts(product: sass.Line, other: sass.Line) -> Iterator[tuple[str, frozenset[int]]]:
    A, D = _registers(product)
    reads, writes = _registers(other)
    if writes & A:
        yield "writes A", writes & A
    if reads & D:
        yield "reads D", reads & D
    if common := writes & D:
        if not _is_product(other):
            yield "writes D", common
        elif writes != D or _shape(other) != _shape(product):  # the same accumulators: the hardware keeps the order
            yield "overlaps D", common


@functools.lru_cache(1 << 16)  # each line is in flight beside many products
def _registers(line: sass.Line) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that an instruction reads, and those that it writes; of a product A and D."""
    read, written, both = (_marked(line, mark) for mark in "v^x")
    if not _is_product(line):
        return read | both, written | both
    # A product reads D as well, to accumulate: no hazard between products, and left out. What else it reads is A.
    D, operands = written | both, _OPERANDS.match(line.text)
    if operands is None or not D or min(D) != int(operands[1]):
        raise ValueError(f"a listing must have nvdisasm's narrow life ranges, got none that fit: {_shown(line)}")
    A = range(int(operands[2]), int(operands[2]) + _A) if operands[2] else ()
    return read.union(A), D


def _marked(line: sass.Line, mark: str) -> frozenset[int]:
    return frozenset(number for number, found in enumerate(line.registers) if found == mark)


def _is_product(line: sass.Line) -> bool:
    return line.opcode.split(".")[0] in PRODUCTS


def _commits(line: sass.Line) -> bool:
    """Whether it commits a group of products, unconditionally."""
    return "gsb0" in line.text and _is_product(line) and not line.text.startswith("@")


def _groups_left(line: sass.Line) -> int | None:
    """How many groups a wait leaves pending (wait_group N); None: no wait, or a conditional one."""
    match = _WAIT.match(line.text)
    return int(match[1], 16) if match else None


def _shape(line: sass.Line) -> str:
    match = _SHAPE.search(line.opcode)
    return match[0] if match else ""


def _shown(line: sass.Line) -> str:
    return f"{line.address}: {line.text}"


def table(found: Sequence[KernelHazards]) -> str:
    """A line for each kernel, the hazards under it, and the sums."""
    width = max([len(seen.kernel) for seen in found])
    lines = [f"{'kernel'.ljust(width)}  products  hazards"]
    for seen in found:
        lines.append(f"{seen.kernel.ljust(width)}  {seen.products:8}  {len(seen.hazards):7}")
        lines += [f"    {hazard}" for hazard in seen.hazards]
    products, hazards = sum(seen.products for seen in found), sum(len(seen.hazards) for seen in found)
    return "\n".join([*lines, f"{len(found)} kernels, {products} asynchronous products, {hazards} hazards"])


def inspect_extension(arch: str = "90a") -> list[KernelHazards]:
    """The kernels with asynchronous products in the extension that is built here.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not here, or the extension holds no such kernels.
    """
    found = inspect_binary(sass.extension(), arch)
    if not found:
        raise sass.MissingTool(f"the extension holds no kernels with wgmma for sm_{arch}: only sm_90a has it")
    return found


def report(arch: str = "90a") -> str:
    """`inspect_extension` as a table. Raises as it does."""
    return table(inspect_extension(arch))
