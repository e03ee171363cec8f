"""Instructions of hot loops, counted in listings that are written by hand."""

from inferix_kernels import sass
from inferix_kernels.sass_counts import hot_loops
from inferix_kernels.triton_kernels import aot


def listing(body, name="attention_kernel"):
    """As nvdisasm prints a function: labels, and an address before every instruction."""
    lines = [f".text.{name}:"]
    for i, line in enumerate(filter(None, map(str.strip, body.splitlines()))):
        lines.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;")
    return "\n".join(lines)


def loops(body):
    (code,) = sass.functions(listing(body)).values()
    return [[line.opcode for line in loop] for loop in hot_loops(code)]


# A loop with a branch for a special case, after one without products.
BRANCHED = """
.L_x_0:
    IADD3 R0, R0, 0x1, RZ
    @P1 BRA `(.L_x_0)
.L_x_1:
    LDSM.16.M88.4 R4, [R2]
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    @!P2 BRA `(.L_x_2)
    FSEL R8, R8, -INF, P3
    FSEL R9, R9, -INF, P3
.L_x_2:
    MUFU.EX2 R10, R8
    @P0 BRA `(.L_x_1)
    EXIT
"""


def test_a_branch_is_not_counted_and_a_loop_without_products_is_none():
    assert loops(BRANCHED) == [["LDSM.16.M88.4", "HMMA.16816.F32.BF16", "BRA", "MUFU.EX2", "BRA"]]


def test_of_nested_loops_the_inner_one_is_hot_unless_only_the_outer_has_products():
    nested = """
    .L_x_0:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
    .L_x_1:
        {}
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        EXIT
    """
    assert loops(nested.format("UTCQMMA gdesc[UR4]")) == [["UTCQMMA", "BRA"]]
    assert loops(nested.format("NOP")) == [["HGMMA.64x64x16.F32.BF16", "NOP", "BRA", "BRA"]]


def test_each_pool_has_a_loop():
    assert [len(loop) for loop in loops(BRANCHED.replace("EXIT", "NOP") + BRANCHED.replace("L_x", "L_y"))] == [5, 5]
    assert loops("HMMA.16816.F32 R8, R4, R6, R8\nEXIT") == []


def test_counts_are_of_16_rows_and_64_keys():
    for (rows, keys, warps), want in {(128, 64, 8): 5, (128, 128, 8): 2, (64, 32, 4): 10, (64, 64, 8): 10}.items():
        assert aot.per_64_keys(listing(BRANCHED), warps, {"BLOCK_M": rows, "BLOCK_N": keys}) == (want,)
