"""Inspects the SASS of the CUDA kernels in the extension: registers, spills, instructions.

`python -m inferix_kernels compile --arch 90a` prints the table. Needs cuobjdump and nvdisasm, which come with CUDA and
with Triton.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Tensor-core instructions by type, TMA loads, and local memory, of which there should be none.
SHOWN = ("HGMMA", "IGMMA", "QGMMA", "UTMALDG", "UBLKCP", "LDG.128", "LDL", "STL")
# How the Hopper kernel multiplies: sm90::traits_of of csrc/cuda/attention_sm90.h, in its order. Format of the pages,
# and whether in 8 bits; else codes become bf16.
KINDS = {
    "bf16": ("bf16", False),
    "f16": ("fp16", False),
    **{name: (name, True) for name in ("i8f8", "fp8")},
    **{f"wide {name}": (name, False) for name in ("int8", "i8f8", "fp8", "int4")},
}
_TYPES = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}
_FUNCTION = re.compile(r"\s*Function : (\S+)|\.text\.(\S+):")
_LABEL = re.compile(r"([.$]\w\S*):\s*$")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+)")
_OPCODE = re.compile(r"(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]*)")
_TARGET = re.compile(r"`\(([.$]\w[^)\s]*)\)|(\.L_\w+)")
_ALWAYS_JUMPS = re.compile(r"(EXIT|RET\b.*|BRA(\.U)? `\S+|BRXU? .*)\s*$", re.DOTALL)  # without a condition
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int  # bytes
    instructions: Counter[str]
    highest: dict[str, int]  # register after setmaxnreg, by its kind: inc or dec


class Line(NamedTuple):
    """A label or an instruction of a listing."""

    text: str  # "@P0 BRA `(.L_x_7)"; of a label its name
    address: str = ""  # in hexadecimal; none: a label
    registers: str = ""  # by register number: ^ written, v read, x both; only of a listing with life ranges

    @property
    def opcode(self) -> str:
        """ "LDG.E.128" of "@P0 LDG.E.128 R4, ..."; "" of a label."""
        match = _OPCODE.match(self.text) if self.address else None
        return match[1] if match else ""


class MissingTool(RuntimeError):
    """The tool, or the binary that it would inspect, is not here."""


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, or inside the triton package."""
    if path := shutil.which(name):
        return path
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = str(Path(folder) / "backends" / "nvidia" / "bin" / name)
        if shutil.which(path):
            return path
    raise MissingTool(f"{name} is neither on PATH nor inside the triton package: pip install triton")


def kernels(binary: Path, arch: str) -> list[Kernel]:
    """The kernels for one architecture ("90a") in a binary that nvcc made, by name; none if it holds none.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not here.
    """
    found = []
    for cubin in cubins(binary, arch):
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
        )
        code = functions(disassemble(cubin))
        for name, registers, stack, _ in _USAGE.findall(usage.stdout):
            highest = registers_after_setmaxnreg(code[name])
            found.append(Kernel(readable(name), int(registers), int(stack), opcodes(code[name]), highest))
    return sorted(found, key=lambda kernel: kernel.name)


def cubins(binary: Path, arch: str) -> Iterator[Path]:
    """The files of device code for one architecture ("90a") in a binary. They last as long as the iterator.

    Raises:
        MissingTool: cuobjdump is not here.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "--extract-elf", "all", str(binary.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True)  # fails if there is no device code: none is found
        found = sorted(Path(folder).glob(f"*.sm_{arch}.cubin"))
        # cuobjdump 12.8, which Triton 3.6 brings, leaves the letter out of the names that it gives.
        yield from found or sorted(Path(folder).glob(f"*.sm_{arch.rstrip('af')}.cubin"))


def disassemble(cubin: Path, life_ranges: bool = False) -> str:
    """nvdisasm's listing; with life ranges it says of each instruction which registers it reads and writes."""
    options = ["-plr", "-lrm=narrow"] if life_ranges else []
    command = [tool("nvdisasm"), "-c", *options, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def listing_of(cubin: bytes, life_ranges: bool = False) -> str:
    """`disassemble`, of a cubin that is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return disassemble(file, life_ranges)


def functions(listing: str) -> dict[str, list[Line]]:
    """The code of each function, by mangled name."""
    code: dict[str, list[Line]] = {}
    current: list[Line] = []
    first = 0  # where the life ranges have register 0
    for line in listing.splitlines():
        text, _, ranges = line.partition("// |")
        if match := _FUNCTION.match(text):
            current = code.setdefault(match[1] or match[2], [])
        elif match := _LABEL.match(text):
            current.append(Line(match[1]))
        elif match := _INSTRUCTION.search(text):
            registers = ranges[first:].split("|")[0].rstrip() if ranges else ""
            current.append(Line(re.sub(r"\s+", " ", match[2]).strip(), match[1], registers))
        elif "# 0" in ranges:
            first = ranges.index("# 0") + 2
    return code


def successors(code: Sequence[Line]) -> list[list[int]]:
    """For each line of a function those that can follow it: a superset, where the listing does not say."""
    labels = {line.text: i for i, line in enumerate(code) if not line.address}
    behind_calls = [i + 1 for i, line in enumerate(code) if line.opcode.startswith("CALL")]
    following: list[list[int]] = []
    for i, line in enumerate(code):
        kind = line.opcode.split(".")[0]
        named = ["".join(pair) for pair in _TARGET.findall(line.text)] if line.address else []
        targets = behind_calls if kind == "RET" else [labels[name] for name in named if name in labels]
        if kind in ("BRX", "BRXU") and not targets:  # through a table that nvdisasm did not read
            targets = list(labels.values())
        goes_on = not _ALWAYS_JUMPS.match(line.text) and not (line.text.startswith("CALL") and targets)
        following.append([j for j in dict.fromkeys([*targets, *[i + 1] * goes_on]) if j < len(code)])
    return following


def opcodes(code: Sequence[Line]) -> Counter[str]:
    """How often each instruction occurs in a function; a 16-byte load also as LDG.128."""
    parts = [line.opcode.split(".") for line in code if line.opcode]
    counts = Counter(part[0] for part in parts)
    counts["LDG.128"] = sum(part[0] == "LDG" and "128" in part for part in parts)
    return counts


def registers_after_setmaxnreg(code: Sequence[Line]) -> dict[str, int]:
    """The highest register used after each setmaxnreg of a function: its warps have no others."""
    starts = [i for i, line in enumerate(code) if line.opcode.startswith("USETMAXREG")]
    following = successors(code) if starts else []
    return {
        "dec" if "DEALLOC" in code[start].opcode else "inc": _highest_register(code, following, start)
        for start in starts
    }


def reached_from(start: int, following: Sequence[Sequence[int]]) -> set[int]:
    """The lines that can be run from a line on, itself included."""
    seen = {start}
    ahead = [start]
    while ahead:
        new = set(following[ahead.pop()]) - seen
        seen |= new
        ahead += new
    return seen


def _highest_register(code: Sequence[Line], following: Sequence[Sequence[int]], start: int) -> int:
    """Of the instructions that can follow `start`."""
    seen = reached_from(start, following)
    return max([-1, *(int(number) for i in seen for number in re.findall(r"\bR(\d+)\b", code[i].text))])


def readable(mangled: str) -> str:
    """attention_kernel<bf16, 128> for _ZN7inferix4sm9016attention_kernelILNS0_4KindE0ELi128EEE..."""
    rest, names = re.sub(r"^_ZN?", "", mangled), []
    while match := re.match(r"(\d+)", rest):
        stop = len(match[1]) + int(match[1])
        names.append(rest[len(match[1]) : stop])
        rest = rest[stop:]
    arguments = [list(KINDS)[int(kind)] for kind in re.findall(r"4KindE(\d)", rest.split("EEv")[0])]
    arguments += re.findall(r"Li(\d+)E", rest.split("EEv")[0])
    if not arguments and (types := re.match(r"I(\w+?)E+v", rest)):  # of a merge: element types
        for word in re.findall(r"13__nv_bfloat16|6__half|S\d*_|f", types[1]):
            arguments.append(_TYPES.get(word) or arguments[-1])  # S_: the same again
    return (names[-1] if names else mangled) + (f"<{', '.join(arguments)}>" if arguments else "")


def table(found: list[Kernel]) -> str:
    rows: list[tuple[str, ...]] = [("kernel", "registers", "stack", *SHOWN)]
    for kernel in found:
        counts = (str(kernel.instructions[opcode] or "-") for opcode in SHOWN)
        rows.append((kernel.name, str(kernel.registers), str(kernel.stack), *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def report(arch: str) -> str:
    """The table of the kernels for one architecture ("80", "90a") in the extension that is built here.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not here, or the extension holds no such kernels.
    """
    found = kernels(extension(), arch)
    if not found:
        raise MissingTool(f"the extension holds no kernels for sm_{arch}: it was built without nvcc")
    return table(found)


def extension() -> Path:
    """Where the extension is that is built here.

    Raises:
        MissingTool: it is not built.
    """
    spec = importlib.util.find_spec("._C", __package__)
    if spec is None or spec.origin is None:
        raise MissingTool("the extension inferix_kernels._C is not built: pip install -e .")
    return Path(spec.origin)
