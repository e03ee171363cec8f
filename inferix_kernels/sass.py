"""What the compiler made of the CUDA kernels in the extension: registers, spills, and which instructions.

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
from pathlib import Path
from typing import NamedTuple

# Tensor cores by type, TMA, and what should not be there: local memory.
SHOWN = ("HGMMA", "IGMMA", "QGMMA", "UTMALDG", "UBLKCP", "LDG.128", "LDL", "STL")
_KINDS = ("bf16", "f16", "i8f8", "fp8", "wide int8", "wide i8f8", "wide fp8", "wide int4")  # sm90::Kind
_TYPES = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}
_FUNCTION = re.compile(r"\s*Function : (\S+)|\.text\.(\S+):")
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+([^;]+)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int  # bytes
    instructions: Counter[str]
    highest: dict[str, int]  # register after setmaxnreg, by what it did: inc or dec


class MissingTool(RuntimeError):
    """What there is to look at, or to look with, is not here."""


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
    nvdisasm = tool("nvdisasm")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "--extract-elf", "all", str(binary.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True)  # fails if there is no device code: none is found
        for cubin in sorted(Path(folder).glob(f"*.sm_{arch}.cubin")):
            usage = subprocess.run(
                [tool("cuobjdump"), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
            )
            listing = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True)
            counts, highest = opcodes(listing.stdout), registers_after_setmaxnreg(listing.stdout)
            for name, registers, stack, _ in _USAGE.findall(usage.stdout):
                found.append(Kernel(readable(name), int(registers), int(stack), counts[name], highest[name]))
    return sorted(found, key=lambda kernel: kernel.name)


def opcodes(listing: str) -> dict[str, Counter[str]]:
    """How often each instruction occurs in each function; a 16-byte load also as LDG.128."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            current = counts.setdefault(match[1] or match[2], Counter())
        elif match := _OPCODE.search(line):
            parts = match[1].split(".")
            current[parts[0]] += 1
            if parts[0] == "LDG" and "128" in parts:
                current["LDG.128"] += 1
    return counts


def registers_after_setmaxnreg(listing: str) -> dict[str, dict[str, int]]:
    """The highest register named by what each setmaxnreg of a function leads to: its warps have no others."""
    code: dict[str, list[str]] = {}  # labels, with a colon, and instructions
    current: list[str] = []
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            current = code.setdefault(match[1] or match[2], [])
        elif match := _LABEL.match(line.strip()):
            current.append(match[0])
        elif match := _INSTRUCTION.search(line):
            current.append(match[1].strip())
    found: dict[str, dict[str, int]] = {name: {} for name in code}
    for name, lines in code.items():
        for i, line in enumerate(lines):
            if "USETMAXREG" in line:
                found[name]["dec" if "DEALLOC" in line else "inc"] = _highest_register(lines, i)
    return found


def _highest_register(lines: list[str], start: int) -> int:
    """Of the instructions that can follow `start`."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    seen: set[int] = set()
    ahead, highest = [start], -1
    while ahead:
        i = ahead.pop()
        while i < len(lines) and i not in seen:
            seen.add(i)
            highest = max([highest, *(int(number) for number in re.findall(r"\bR(\d+)\b", lines[i]))])
            ahead += [labels[target] for target in re.findall(r"`\((\.L_\w+)\)", lines[i]) if target in labels]
            if re.match(r"(EXIT|RET\b.*|BRA(\.U)? `\S+)\s*$", lines[i]):  # without a condition
                break
            i += 1
    return highest


def readable(mangled: str) -> str:
    """attention_kernel<bf16, 128> for _ZN7inferix4sm9016attention_kernelILNS0_4KindE0ELi128EEE..."""
    rest, names = re.sub(r"^_ZN?", "", mangled), []
    while match := re.match(r"(\d+)", rest):
        stop = len(match[1]) + int(match[1])
        names.append(rest[len(match[1]) : stop])
        rest = rest[stop:]
    arguments = [_KINDS[int(kind)] for kind in re.findall(r"4KindE(\d)", rest.split("EEv")[0])]
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
    extension = importlib.util.find_spec("inferix_kernels._C")
    if extension is None or extension.origin is None:
        raise MissingTool("the extension inferix_kernels._C is not built: pip install -e .")
    found = kernels(Path(extension.origin), arch)
    if not found:
        raise MissingTool(f"the extension holds no kernels for sm_{arch}: it was built without nvcc")
    return table(found)
