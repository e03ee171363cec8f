"""The model of `compile --estimate`: loops by hand whose cheapest way is known, then the kernels that are built."""

import pytest

from inferix_kernels import compiled, estimate, sass
from inferix_kernels.__main__ import main
from inferix_kernels.estimate import GPUS, KEYS, ROWS, Cycles, Estimate, hot_loops

H100, A100 = GPUS[90], GPUS[80]
QK = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"  # both operands in shared memory
PV = "HGMMA.64x64x16.F32.BF16 R56, R48, gdesc[UR8].tnspB, R56"
EXP, ADD = "MUFU.EX2 R4, R4", "FADD R3, R4, R5"


def line(text):
    return sass.Line(text, "0010")


def listing(*lines, name="_ZN7inferix4sm9016attention_kernelILNS0_4KindE0ELi64EEEvv"):
    code = [text if text.endswith(":") else f"        /*{16 * i:04x}*/   {text} ;" for i, text in enumerate(lines)]
    return "\n".join([f".text.{name}:", *code])


def loops(*lines, **options):
    (code,) = sass.functions(listing(*lines)).values()
    return [[found.text for found in loop.lines] for loop in hot_loops(code, **options)]


def test_a_loop_without_products_is_not_hot():
    copy = (".L_x_1:", "LDG.E R4, [R2.64]", "@P0 BRA `(.L_x_1)")
    assert loops(*copy, ".L_x_2:", QK, "@P0 BRA `(.L_x_2)", "EXIT") == [[QK, "@P0 BRA `(.L_x_2)"]]
    assert loops(*copy, QK, "EXIT") == []


def test_what_is_seldom_run_is_left_out():
    """A branch around the rescaling, a wait that need not be repeated, a slow path behind the loop."""
    back = "@P2 BRA `(.L_x_1)"
    code = (".L_x_1:", ".L_x_2:", "SYNCS.PHASECHK.TRYWAIT P0, [R2], R3", "@!P0 BRA `(.L_x_2)", QK, "@P1 BRA `(.L_x_9)",
            ".L_x_3:", "@P3 BRA `(.L_x_4)", *["FMUL R9, R9, R8"] * 9, ".L_x_4:", PV, back, "EXIT",
            ".L_x_9:", "MOV R24, R3", "BRA `(.L_x_3)")  # fmt: skip
    assert loops(*code) == [["SYNCS.PHASECHK.TRYWAIT P0, [R2], R3", "@!P0 BRA `(.L_x_2)", QK, "@P1 BRA `(.L_x_9)",
                             "@P3 BRA `(.L_x_4)", PV, back]]  # fmt: skip


def test_no_way_goes_around_products():
    """The cheapest way past an `if` that holds them is no way through the loop's work."""
    code = (".L_x_1:", "@P0 BRA `(.L_x_2)", QK, ADD, ".L_x_2:", "@P1 BRA `(.L_x_1)", "EXIT")
    assert loops(*code) == [["@P0 BRA `(.L_x_2)", QK, ADD, "@P1 BRA `(.L_x_1)"]]


def test_an_inner_loop_is_run_as_often_as_the_work_takes():
    inner = [".L_x_2:", QK, PV, "@P0 BRA `(.L_x_2)"]
    code = (".L_x_0:", "MOV R1, R2", ".L_x_1:", EXP, *inner, ADD, "@P1 BRA `(.L_x_1)", "@P2 BRA `(.L_x_0)", "EXIT")
    around = 2 * 64 * 64 * 16 // 4
    twice = [EXP, *inner[1:], *inner[1:], ADD, "@P1 BRA `(.L_x_1)"]
    assert twice in loops(*code, work=2 * around)
    assert min(loops(*code, work=2 * around), key=len) == twice
    assert loops(*code) == [inner[1:]]  # without being told, once around what holds the products


def test_loops_over_two_pools_are_two():
    first, second = (".L_x_1:", QK, "@P0 BRA `(.L_x_1)"), (".L_x_2:", ADD, QK, "@P0 BRA `(.L_x_2)")
    assert [len(found) for found in loops(".L_x_0:", *first, *second, "@P1 BRA `(.L_x_0)", "EXIT")] == [2, 3]


@pytest.mark.parametrize(
    "text, macs, shared, cycles",
    [
        (QK, 64 * 64 * 16 // 4, (64 + 64) * 16 * 2 // 4, 64 * 64 * 16 / 2048),
        (PV, 64 * 64 * 16 // 4, 64 * 16 * 2 // 4, 64 * 64 * 16 / 2048),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R60, gdesc[UR4], R24, gsb0", 64 * 128 * 32 // 4, 1024, 64),
        ("IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], RZ, !UPT", 64 * 128 * 32 // 4, 1536, 64),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", 2048, 0, 4),
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4", 1024, 0, 4),
        ("@P0 IMMA.16832.S8.S8 R4, R8.ROW, R10.COL, R4", 4096, 0, 4),
        ("LDS.U16 R4, [R2]", 0, 64, 0),
        ("LDS R4, [R2]", 0, 128, 0),
        ("STS.128 [R2], R4", 0, 512, 0),
        ("LDSM.16.MT88.4 R4, [R2]", 0, 512, 0),
        ("LDSM.16.M88 R4, [R2]", 0, 128, 0),
        ("LDGSTS.E.BYPASS.128 [R2], [R4.64]", 0, 512, 0),
        ("FFMA R4, R5, R6, R7", 0, 0, 0),
    ],
)
def test_what_an_instruction_takes(text, macs, shared, cycles):
    assert (estimate.macs(line(text)), estimate.shared_bytes(line(text))) == (macs, shared)
    assert estimate.tensor_cycles(line(text), H100) == cycles


def test_the_largest_of_the_cycles_bounds():
    exps, sums = [line(EXP)] * 10, [line(ADD)] * 70
    cycles = estimate.cycles_of([line(PV), *exps, *sums], H100)
    assert cycles == Cycles(tensor=32, issue=81, mufu=80, shared=16) and cycles.largest == "issue"
    assert estimate.cycles_of([line(PV), *exps], H100).largest == "mufu"
    assert estimate.cycles_of([line(PV), *[line("LDS.128 R4, [R2]")] * 2], H100).largest == "shared"
    assert estimate.cycles_of([line(PV)], H100).largest == "tensor"


def test_nothing_but_products_runs_at_the_data_sheets_rate():
    def bound(text, gpu):
        lines = [line(text)] * 4
        return Estimate("", "", gpu, estimate.cycles_of(lines, gpu), sum(map(estimate.macs, lines))).bound

    assert bound(PV, H100) == pytest.approx(989.4, rel=1e-3)
    assert bound("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R60, gdesc[UR4], R24", H100) == pytest.approx(1978.9, rel=1e-3)
    assert bound("HMMA.16816.F32.BF16 R4, R8, R10, R4", A100) == pytest.approx(312, rel=1e-3)
    assert bound("IMMA.16832.S8.S8 R4, R8, R10, R4", A100) == pytest.approx(624, rel=1e-3)


def test_instructions_are_counted_for_the_same_queries_and_keys_whatever_the_tile():
    def per_keys(rows, keys, instructions):  # of a warp
        return Estimate("", "", H100, Cycles(1, instructions, 0, 0), 2 * rows * keys * 128, 128).instructions_per_keys

    assert per_keys(ROWS, KEYS, 300) == per_keys(ROWS, 2 * KEYS, 600) == per_keys(2 * ROWS, KEYS, 600) == 300
    assert Estimate("", "", H100, Cycles(1, 300, 0, 0), 1).instructions_per_keys is None


def test_public_kernels_reach_less_than_their_bound_and_differ_by_a_third_at_most():
    low, high = estimate.reached()
    assert 0.5 < low < high < 1
    one = Estimate("", "", H100, Cycles(tensor=1000, issue=1000, mufu=0, shared=0), 1000 * H100.macs)
    assert one.bound == pytest.approx(989.4, rel=1e-3)
    assert one.expected == pytest.approx((one.bound / 2 * low, one.bound / 2 * high))


def test_a_listing_gives_an_estimate_for_each_of_its_kernels():
    text = listing(".L_x_1:", QK, EXP, "@P0 BRA `(.L_x_1)", "EXIT") + "\n" + listing(ADD, "EXIT", name="_Z5otherv")
    (one,) = estimate.of_listing(text, "bf16 q", 90, head_dim=64)
    assert (one.kernel, one.what, one.cycles.issue, one.macs) == ("attention_kernel<bf16, 64>", "bf16 q", 3, 16384)
    assert estimate.of_listing(text, "", 80)[0].cycles.tensor == 2 * one.cycles.tensor
    header, names, row = estimate.table([one])
    assert "modelled" in header and "as public kernels" in names
    assert row.split()[-5:-3] == [f"{one.bound:.0f}", "tensor"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--arch", "100"], "an estimate is made for sm_80 and sm_90, got sm_100"),
        (["--arch", "90a", "80"], "--estimate takes --arch 80, 90 or, alone, 90a, got 90a"),
        (["linear", "--arch", "90a"], "--arch 90a takes no cases: it is an estimate of the CUDA kernels"),
        (["--json"], "--estimate has no --json"),
        (["no such op"], "no case with products begins with 'no such op'"),
    ],
)
def test_the_command_refuses(arguments, said, capsys):
    assert main(["compile", "--estimate", *arguments]) == 2
    assert said in capsys.readouterr().err


# The kernels that are built

with_nvcc = pytest.mark.skipif(not compiled.HAS_CUDA, reason="the extension was built without nvcc")


@pytest.fixture(scope="module")
def built():
    try:
        return {(one.what, one.head_dim): one for one in estimate.of_extension()}
    except sass.MissingTool as error:
        pytest.skip(str(error))


@with_nvcc
def test_the_hopper_kernels_keep_within_their_instructions(built):
    """Of a warp and 64 keys: half of what a key tile takes, its waits and barriers included."""
    assert built.keys() == {(kind, D) for kind in sass.KINDS for D in (64, 128)}
    for (kind, D), one in built.items():
        assert one.macs == 2 * ROWS * estimate.KEY_TILE * D
        assert one.cycles.tensor == ROWS * KEYS * 4 * D / (1024 if kind in ("i8f8", "fp8") else 512)
    most = {"bf16": 200, "f16": 200, "i8f8": 342, "fp8": 310}
    assert {kind: count for kind in most if (count := built[kind, 128].instructions_per_keys) > most[kind]} == {}
