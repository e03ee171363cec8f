"""Compiling ahead of time, without a GPU: what each kernel uses of one, in every format and shipped configuration.

A kernel module lists its cases, calls of real widths whose launches are compiled in place of being run. The numbers are
ptxas's and the tensor-core instruction is read off the PTX, so they hold for the Triton that is installed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .. import hazards, sass
from .._dispatch import Unsupported
from .attention import cases as attention_cases
from .kv_pages import cases as page_cases
from .latent import cases as latent_cases
from .launch import Architecture, Case, architecture_name, compile_only
from .linear import cases as linear_cases
from .linear_rows import cases as rows_cases
from .merge import cases as merge_cases
from .qkv import cases as prologue_cases
from .select import cases as select_cases

CASES = (
    *(page_cases, prologue_cases, attention_cases, latent_cases, merge_cases, rows_cases, linear_cases, select_cases),
)
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, technical specifications; AMD's CDNA 3 and
# CDNA 4 instruction set architectures, local data share).
MOST_SHARED: dict[Architecture, int] = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
    "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip
ARCHITECTURES: tuple[Architecture, ...] = (80, 89, 90, 100, 120)
AMD = ("gfx942", "gfx950")


class Compilation(NamedTuple):
    """One kernel of one case on one architecture; no kernel where the architecture can't."""

    op: str
    format: str
    what: str
    architecture: Architecture
    kernel: str = ""
    registers: int = 0
    spilled: int = 0  # bytes of a thread's stack
    shared: int = 0  # bytes of shared memory
    tensor_core: str = ""  # the instruction that most products are made by
    followed: int = 0  # asynchronous products whose registers were checked (hazards.py)
    instructions: int = 0  # of the kernel, where they are counted
    loads: int = 0  # of these, from global memory
    warning: str = ""
    unsupported: str = ""

    @property
    def sound(self) -> bool:
        return self.spilled == 0 and not self.warning


def all_cases(device: torch.device | str = "cpu") -> Iterator[Case]:
    return chain.from_iterable(cases(device) for cases in CASES)


def compile_ahead(
    architectures: Sequence[Architecture], wanted: Sequence[str] = (), counted: bool = False
) -> Iterator[Compilation]:
    """Every case on each architecture; if anything is wanted, those that begin with it: "linear" or "linear int8".

    counted: are instructions of NVIDIA's GPUs to be counted? It takes a disassembly of each kernel.
    """
    for case in all_cases():
        name = f"{case.op} {case.format} {case.what}"
        if not wanted or any(name.startswith(prefix) for prefix in wanted):
            for architecture in architectures:
                yield from _compile(case, architecture, counted)


def _compile(case: Case, architecture: Architecture, counted: bool) -> Iterator[Compilation]:
    row = Compilation(*case[:3], architecture)
    with compile_only(architecture) as kernels:
        try:
            case.call()
        except Unsupported as error:
            yield row._replace(unsupported=str(error))
            return
    for kernel in kernels:
        row = row._replace(kernel=kernel.metadata.name, shared=kernel.metadata.shared)
        yield _of_amd(row, kernel.asm["amdgcn"]) if isinstance(architecture, str) else _of_nvidia(row, kernel, counted)


def _of_nvidia(row: Compilation, kernel: Any, counted: bool) -> Compilation:
    usage, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
    instruction = tensor_core(ptx)
    asynchronous = "wgmma" in instruction
    listing = sass.listing_of(kernel.asm["cubin"], life_ranges=asynchronous) if counted or asynchronous else ""
    if counted:
        (code,) = sass.functions(listing).values()
        loads = sass.opcodes(code)["LDG"]
        row = row._replace(instructions=sum(bool(line.address) for line in code), loads=loads)
    seen = hazards.inspect_listing(listing) if asynchronous else []
    hazard = next((str(hazard) for one in seen for hazard in one.hazards), "")
    return row._replace(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        tensor_core=instruction,
        followed=sum(one.products for one in seen),
        warning=_warning(row.architecture, row.shared, ptx if asynchronous else "") or hazard,
    )


def _of_amd(row: Compilation, assembly: str) -> Compilation:
    """Registers are vector registers, of 64 lanes; those that accumulate count among them."""
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+): +(\d+)\s*$", assembly, re.MULTILINE)}
    return row._replace(
        registers=usage["vgpr_count"],
        spilled=usage["private_segment_fixed_size"],
        tensor_core=matrix_core(assembly),
        warning=_warning(row.architecture, row.shared, ""),
    )


def _warning(architecture: Architecture, shared: int, ptx: str) -> str:
    most = MOST_SHARED.get(architecture, shared)
    if shared > most:
        return f"more shared memory than the {most} bytes that a program may have"
    return serialized(ptx) if ptx else ""


def resources(cubin: bytes) -> dict[str, int]:
    """{"REG": 80, "STACK": 0, ...} as cuobjdump reads them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        text = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", line)}


def tensor_core(ptx: str) -> str:
    """The commonest of "wgmma m64n256k32 s8", "mma m16n8k16 bf16", "tcgen05 f8f6f4"; "" if there is none."""
    found = re.findall(r"\b(wgmma)\.mma_async\S*\.(m\d+n\d+k\d+)\.\w+\.(\w+)", ptx)
    found += re.findall(r"\b(mma)\.sync\S*\.(m\d+n\d+k\d+)\S*?\.(s8|f16|bf16|tf32|e4m3|f64)\b", ptx)
    found += [(name, kind) for name, kind in re.findall(r"\b(tcgen05)\.mma\S*kind::(\w+)", ptx)]
    return " ".join(Counter(found).most_common(1)[0][0]) if found else ""


def matrix_core(assembly: str) -> str:
    """The commonest of "mfma 32x32x16 bf16", "mfma 16x16x32 fp8"; "" if there is none."""
    found = re.findall(r"\bv_(mfma)_\w+?_(\d+x\d+x\d+)_?(bf16|f16|i8|fp8|f32|xf32|bf8|f8f6f4)", assembly)
    return " ".join(Counter(found).most_common(1)[0][0]) if found else ""


def serialized(ptx: str) -> str:
    """ptxas's C7510, if it has one to say: wgmma instructions that wait for each other are a silent factor of two."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        said = _run(get_ptxas(90).path, "--gpu-name=sm_90a", str(file), "-o", str(Path(folder, "cubin")))
    return next((line.strip() for line in said.splitlines() if "C7510" in line), "")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(rows: Iterable[Compilation]) -> Iterator[str]:
    """As text, line by line while the kernels are compiled."""
    layout = "{:14} {:8} {:34} {:>6} {:18} {:>9} {:>7} {:>7}  {}"
    yield layout.format("op", "format", "", "", "kernel", "registers", "spilled", "shared", "")
    for row in rows:
        said = row.unsupported or row.warning or row.tensor_core
        numbers = ("", "", "") if row.unsupported else (row.registers, row.spilled, row.shared)
        name = architecture_name(row.architecture)
        yield layout.format(row.op, row.format, row.what, name, row.kernel, *numbers, said).rstrip()


def markdown(rows: Sequence[Compilation]) -> str:
    """A line for each op: the formats it was compiled for and, by architecture, registers and tensor-core types."""
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    lines = [
        f"| op | formats | {' | '.join(map(architecture_name, architectures))} |",
        f"|---|---|{'---|' * len(architectures)}",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        cells = (_cell([row for row in mine if row.architecture == x]) for x in architectures)
        formats = " ".join(f"`{format}`" for format in dict.fromkeys(row.format for row in mine))
        lines.append(f"| `{op}` | {formats} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Compilation]) -> str:
    compiled = [row for row in rows if row.kernel]
    if not compiled:
        return "none"
    registers = sorted({row.registers for row in compiled})
    said = [" to ".join(map(str, dict.fromkeys((registers[0], registers[-1]))))]
    kinds = (re.sub(r"(m\d+n\d+k\d+|\d+x\d+x\d+) ", "", row.tensor_core) for row in compiled if row.tensor_core)
    said += dict.fromkeys(kinds)
    said += [f"**{row.format}, {row.what}: {row.spilled} bytes spilled**" for row in compiled if row.spilled]
    formats = dict.fromkeys(row.format for row in compiled)
    said += [f"no `{format}`" for format in dict.fromkeys(row.format for row in rows) if format not in formats]
    return ", ".join(said)
