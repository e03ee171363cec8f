"""The instructions that a run may use: ours by name, and AMX for nobody where the name is below it.

Linux gives a process the tiles of AMX when a library asks for them, once (arch_prctl, Documentation/arch/x86/xstate.rst
of the kernel). A seccomp filter that refuses the request sends every library down its next best path, whether or
not it reads a variable, as oneDNN does ONEDNN_MAX_CPU_ISA. Below AVX512-BF16 nothing holds all libraries, so that is
the lowest name.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from pathlib import Path

LOWEST = "avx512_bf16"
# Linux on x86-64.
_ARCH_PRCTL, _ASK, _ASKED, _TILES = 158, 0x1023, 0x1022, 18
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
# Classic BPF: (code, jump if true, jump if false, operand). The call's number lies at 0, its first argument at 16.
_REFUSE = [
    (0x20, 0, 0, 0),
    (0x15, 0, 3, _ARCH_PRCTL),
    (0x20, 0, 0, 16),
    (0x15, 0, 1, _ASK),
    (0x06, 0, 0, 0x00050001),  # EPERM
    (0x06, 0, 0, 0x7FFF0000),  # allowed
]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def has_tiles() -> bool:
    """Does the processor have AMX?"""
    try:
        return platform.machine() == "x86_64" and " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def may_use_tiles() -> bool:
    """Is there AMX, and may this process use it? Asks for it, as a library would."""
    return has_tiles() and _libc().syscall(_ARCH_PRCTL, _ASK, _TILES) == 0


def hold(name: str) -> None:
    """Our CPU kernels use these instructions, and without "amx" in their name no library of this process uses AMX.

    It holds for the processes that this one starts, too, but there for other libraries alone; "" changes nothing.

    Raises:
        ValueError: not one of ours from LOWEST up, not on this processor, or a library has AMX already.
    """
    if not name:
        return
    if "amx" not in name:
        refuse_tiles()
    from inferix_kernels import compiled  # not before: it may ask for AMX

    levels, best = compiled.Isa.__members__, compiled._C.best_isa()
    known = [level for level, value in levels.items() if int(value) >= int(levels[LOWEST])]
    if name not in known:
        raise ValueError(f"--isa must be one of {', '.join(known)}, got {name}")
    if int(levels[name]) > int(best):
        raise ValueError(f"--isa must be at most {best.name} on this processor, got {name}")
    compiled.ISA = levels[name]


def refuse_tiles() -> None:
    """No library of this process gets AMX from now on.

    Raises:
        ValueError: one has it already, or the system takes no filter.
    """
    if not has_tiles():
        return
    libc, given = _libc(), ctypes.c_uint64()
    libc.syscall(_ARCH_PRCTL, _ASKED, ctypes.byref(given))
    if given.value >> _TILES & 1:
        raise ValueError("--isa must come before a library has AMX, and one of this process has it")
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _REFUSE))
    program = _Program(len(_REFUSE), ctypes.cast(code, ctypes.c_void_p))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program)):
        raise ValueError("--isa: this system takes no seccomp filter, which AMX is refused by")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
