"""Registers of asynchronous products: listings by hand with one mistake each, then every kernel that is built."""

import re

import pytest

from inferix_kernels import compiled, hazards, sass
from inferix_kernels.__main__ import main

WIDTH = 96  # registers of the columns of a listing
QK = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT"  # D: R24 to R39
PV = "HGMMA.64x32x16.F32.BF16 R56, R48, gdesc[UR8].tnspB, R56"  # A: R48 to R51, D: R56 to R71
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
REGISTERS = {QK: (range(0), range(24, 40)), PV: (range(48, 52), range(56, 72))}


def line(text, reads=(), writes=(), address=0):
    """As nvdisasm prints it with life ranges: written ^, read v, both x."""
    if text.endswith(":"):
        return text
    product = text.removesuffix(", gsb0").removeprefix("@P0 ")
    if product in REGISTERS:
        reads, writes = REGISTERS[product]
    both = set(writes) if product == PV else set(reads) & set(writes)
    marks = "".join("x" if i in both else "^" if i in writes else "v" if i in reads else ":" for i in range(WIDTH))
    return f"        /*{address:04x}*/                   {text} ;".ljust(110) + f"// |  {WIDTH} {marks}  | 1 :      |"


def listing(*lines, name="_ZN7inferix6kernelILi64EEEv"):
    numbers = "".join(str(i % 10) for i in range(WIDTH))
    code = [text if isinstance(text, tuple) else (text,) for text in lines]
    return "\n".join(
        ["".ljust(110) + f"// |   # {numbers}  | # 0123456  |", f".text.{name}:"]
        + [line(*parts, address=16 * i) for i, parts in enumerate([*code, ("EXIT",)])]
    )


def found(*lines):
    (kernel,) = hazards.inspect_listing(listing(*lines))
    return [(hazard.product[:4], hazard.other[:4], hazard.what, hazard.registers) for hazard in kernel.hazards]


READ = ("FADD R3, R30, R31", [30, 31], [3])
WRITE = ("MOV R24, R3", [3], [24])
REFILL = ("F2FP.BF16.F32.PACK_AB R48, R3, R3", [3], [48])
ELSEWHERE = ("FADD R3, R4, R5", [4, 5], [3])


@pytest.mark.parametrize(
    "lines, hazard",
    [
        ([f"{QK}, gsb0", READ, WAIT], ("0000", "0010", "reads D", (30, 31))),
        ([f"{QK}, gsb0", WRITE, WAIT], ("0000", "0010", "writes D", (24,))),
        ([f"{PV}, gsb0", REFILL, WAIT], ("0000", "0010", "writes A", (48,))),
        (
            [f"{PV}, gsb0", ("LDSM.16.M88.4 R44, [R3]", [3], [44, 45, 46, 47, 48]), WAIT],
            ("0000", "0010", "writes A", (48,)),
        ),
        # A wait that lets the last group go on, and one that comes before the group ends.
        ([f"{QK}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", READ, WAIT], ("0000", "0020", "reads D", (30, 31))),
        ([QK, WAIT, READ, f"{PV}, gsb0", WAIT], ("0000", "0020", "reads D", (30, 31))),
        # A wait, or an end of the group, on one way only.
        ([f"{QK}, gsb0", f"@P0 {WAIT}", READ], ("0000", "0020", "reads D", (30, 31))),
        ([f"@P0 {QK}, gsb0", WAIT, READ], ("0000", "0020", "reads D", (30, 31))),
        ([f"{QK}, gsb0", "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", READ, WAIT], ("0000", "0040", "reads D", (30, 31))),
        ([".L_x_1:", WRITE, f"{QK}, gsb0", "@P0 BRA `(.L_x_1)", WAIT], ("0020", "0010", "writes D", (24,))),
        (
            [f"{QK}, gsb0", 'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1"*)', ".L_x_1:", READ],
            ("0000", "0030", "reads D", (30, 31)),
        ),
        ([f"{QK}, gsb0", "BRXU UR4 -0x10", WAIT, ".L_x_1:", READ], ("0000", "0040", "reads D", (30, 31))),
        (
            [
                f"{QK}, gsb0",
                "CALL.REL.NOINC `($slow)",
                WAIT,
                READ,
                "EXIT",
                "$slow:",
                WRITE,
                "RET.REL.NODEC R2 `(kernel)",
            ],
            ("0000", "0060", "writes D", (24,)),
        ),
    ],
)
def test_a_planted_hazard_is_found(lines, hazard):
    assert found(*lines) == [hazard]


@pytest.mark.parametrize(
    "other, reads, writes, what",
    [
        ("HGMMA.64x32x16.F32.BF16 R32, gdesc[UR4], RZ, !UPT", [], range(32, 48), {"overlaps D"}),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT", [], range(24, 32), {"overlaps D"}),
        ("QGMMA.64x32x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT", [], range(24, 40), {"overlaps D"}),
        ("HGMMA.64x32x16.F32.BF16 R72, R36, gdesc[UR4], RZ, !UPT", range(36, 40), range(72, 88), {"reads D"}),
    ],
)
def test_a_second_product_before_the_wait(other, reads, writes, what):
    hazards = found(f"{QK}, gsb0", (f"{other}, gsb0", reads, writes), WAIT)
    assert {hazard[2] for hazard in hazards} == what


def test_a_second_product_that_writes_what_the_first_multiplies():
    into_A = ("HGMMA.64x32x16.F32.BF16 R40, gdesc[UR4], RZ, !UPT, gsb0", [], range(40, 56))
    assert found(f"{PV}, gsb0", into_A, WAIT) == [("0000", "0010", "writes A", (48, 49, 50, 51))]


@pytest.mark.parametrize(
    "lines",
    [
        [f"{QK}, gsb0", ELSEWHERE, WAIT, READ, WRITE],
        [f"{PV}, gsb0", ("FADD R3, R48, R49", [48, 49], [3]), WAIT, REFILL],  # reading A is no harm
        [f"{PV}", f"{PV}, gsb0", WAIT, REFILL],  # into the same sums
        [f"{QK}, gsb0", f"{PV}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", READ, WRITE, WAIT, REFILL],
        [QK, f"{PV}, gsb0", WAIT, READ, REFILL],  # one group
        [f"{QK}, gsb0", "BRA `(.L_x_1)", READ, ".L_x_1:", WAIT, READ],  # never comes by
        [".L_x_1:", f"{QK}, gsb0", WAIT, READ, WRITE, "@P0 BRA `(.L_x_1)"],
        [f"{QK}, gsb0", "CALL.REL.NOINC `($slow)", READ, "EXIT", "$slow:", WAIT, "RET.REL.NODEC R2 `(kernel)"],
    ],
)
def test_sound_code_is_left_alone(lines):
    assert found(*lines) == []


def test_kernels_without_products_are_not_counted_and_others_by_name():
    two = listing(f"{QK}, gsb0", WAIT) + "\n" + listing(READ, name="_Z5otherv")
    (kernel,) = hazards.inspect_listing(two)
    assert (kernel.kernel, kernel.products, kernel.hazards) == ("kernel<64>", 1, ())


@pytest.mark.parametrize("change", [lambda text: text.split("//")[0], lambda text: text.replace("# 0", "#  0")])
def test_a_listing_without_life_ranges_is_refused(change):
    lines = [change(line) for line in listing(f"{QK}, gsb0", READ, WAIT).splitlines()]
    with pytest.raises(
        ValueError, match="a listing must have nvdisasm's narrow life ranges, got none that fit: 0000: HGMMA"
    ):
        hazards.inspect_listing("\n".join(lines))


# Every kernel that is built

with_nvcc = pytest.mark.skipif(not compiled.HAS_CUDA, reason="the extension was built without nvcc")


@pytest.fixture(scope="module")
def built():
    """Listings of the device code of sm_90a in the extension."""
    try:
        return [sass.disassemble(cubin, life_ranges=True) for cubin in sass.cubins(sass.extension(), "90a")]
    except sass.MissingTool as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def attention(built):
    """The listing of one attention kernel, whose scores and values are products of two types."""
    text = next(text for text in built if "GMMA" in text)
    start = re.search(r"^\.text\.\w*attention_kernel\w*KindE2ELi128E.*$", text, re.MULTILINE).start()
    columns = [line for line in text[:start].splitlines() if "# 0123" in line][-1]  # which registers they are
    return "\n".join([columns, text[start:].split("\n.text.")[0]])


@with_nvcc
def test_no_kernel_that_is_built_has_a_hazard(built):
    seen = [kernel for text in built for kernel in hazards.inspect_listing(text)]
    assert [str(hazard) for kernel in seen for hazard in kernel.hazards] == []
    # 8 kinds of pages at 2 widths: attention, and a probe of each product.
    assert len(seen) == 48 and {kernel.kernel.split("<")[0] for kernel in seen} == {
        "attention_kernel",
        "probe_scores_kernel",
        "probe_values_kernel",
    }
    assert all(kernel.products >= 2 for kernel in seen)


@with_nvcc
def test_registers_are_read_where_nvdisasm_marks_them(attention):
    (code,) = sass.functions(attention).values()
    for line in code:
        if line.address and not line.opcode.startswith("CALL"):  # for which the calling convention is marked
            named = {int(number) for number in re.findall(r"[^\w]R(\d+)", line.text)}
            marked = {match.start() for match in re.finditer("[v^x]", line.registers)}
            assert named <= marked and bool(named) == bool(marked), line


@with_nvcc
def test_a_mistake_in_a_real_kernel_is_found(attention):
    (sound,) = hazards.inspect_listing(attention)
    # Scores: 128 channels, 32 at a time. Values: 2 units of 64 keys, 32 at a time, for each half of the channels.
    assert sound.products == 4 + 2 * 2 * 2 and not sound.hazards
    waits = [i for i, line in enumerate(attention.splitlines()) if "WARPGROUP.DEPBAR" in line]
    ends = [i for i, line in enumerate(attention.splitlines()) if "GMMA" in line and "gsb0" in line]
    for mistake, lines in (("NOP", waits), ("", ends)):
        damaged = attention.splitlines()
        for i in lines:
            damaged[i] = re.sub(r"WARPGROUP\.DEPBAR\S* gsb0, \w+|, gsb0", mistake, damaged[i])
        (kernel,) = hazards.inspect_listing("\n".join(damaged))
        # Every sum is read, so every product is caught: by itself or by one that reads what it made.
        assert len({hazard.product for hazard in kernel.hazards}) == sound.products
        assert {hazard.what for hazard in kernel.hazards} >= {"reads D", "writes D"}


def test_the_command_says_what_it_looked_at(capsys, monkeypatch):
    seen = [
        hazards.KernelHazards("a", 2, ()),
        hazards.KernelHazards("b", 4, (hazards.Hazard("b", "10: P", "20: Q", "reads D", (3,)),)),
    ]
    monkeypatch.setattr(hazards, "inspect_binary", lambda binary, arch: seen if arch == "90a" else [])
    assert main(["hazards"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "    20: Q | reads D (R3) of | 10: P",
        "2 kernels, 6 asynchronous products, 1 hazards",
    ]
    del seen[1]
    assert main(["hazards", "--arch", "90a"]) == 0
    assert hazards.report().splitlines()[-1] == "1 kernels, 2 asynchronous products, 0 hazards"
    assert main(["hazards", "--arch", "80"]) == 2
    assert "the extension holds no kernels with wgmma for sm_80" in capsys.readouterr().err


def test_device_code_is_found_under_the_name_that_an_older_tool_gives_it(tmp_path, monkeypatch):
    """cuobjdump 12.8 says sm_90 of sm_90a."""
    old = tmp_path / "cuobjdump"
    old.write_text("#!/bin/sh\ntouch x.1.sm_90.cubin x.2.sm_80.cubin\n")
    old.chmod(0o755)
    monkeypatch.setattr(sass, "tool", lambda name: str(old))
    assert [cubin.name for cubin in sass.cubins(tmp_path / "binary", "90a")] == ["x.1.sm_90.cubin"]
    assert [cubin.name for cubin in sass.cubins(tmp_path / "binary", "80")] == ["x.2.sm_80.cubin"]
    assert not list(sass.cubins(tmp_path / "binary", "100"))
