"""A format is known by its name: one whose numbers are stored as another's may stand beside it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inferix_kernels import (
    FORMATS,
    PageList,
    compiled,
    kv_append,
    kv_gather,
    make_plan,
    paged_attention,
    qkv_prologue,
)
from inferix_kernels.layout import Codec, Format
from inferix_kernels.testing import assert_close, poisoned_pool

SWAPPED = Format(k=FORMATS["int4"].v, v=FORMATS["int4"].k)  # keys by token, values by channel
LENS = [16, 5]


@pytest.fixture
def swapped(monkeypatch):
    monkeypatch.setitem(FORMATS, "swapped", SWAPPED)


def filled(format, k, v, which):
    pool, where = poisoned_pool(format, 3, 2, 16, 32), PageList.of([2, 0], LENS)
    kv_append(k, v, pool, where, backend=which)
    return pool, where


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_two_formats_may_store_the_same_dtypes(swapped, which, monkeypatch):
    # Where all products are float32: a CPU with bfloat16 ones rounds queries and weights.
    monkeypatch.setattr(compiled, "ISA", min(compiled.ISA, compiled.Isa.avx512_vnni))
    k, v = torch.randn(2, sum(LENS), 2, 32, generator=torch.Generator().manual_seed(0))
    pools, read = {}, {}
    for format in ("int4", "swapped"):
        pools[format], where = filled(format, k, v, which)
        assert pools[format].format == pools[format].part(0, 2).format == format
        assert pools[format].k.dtype == pools[format].v.dtype == torch.uint8
        read[format] = kv_gather([pools[format]], where, backend=which)
        for x, y in zip(read[format], (k, v)):
            assert (x - y).norm() < 0.15 * y.norm()
    assert FORMATS["int4"] == Format(Codec(torch.uint8, "channel"), Codec(torch.uint8, "token"))
    # What the one makes of keys, the other makes of values.
    exchanged, where = filled("swapped", v, k, which)
    assert torch.equal(kv_gather([exchanged], where, backend=which)[1], read["int4"][0])
    assert not torch.equal(read["swapped"][0], read["int4"][0])

    q = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(1))
    plan = make_plan([(4, [2, 0, 3 + 2, 3 + 0], LENS * 2)])
    got = paged_attention(q, [pools["int4"], pools["swapped"]], plan, backend=which)
    exact = [torch.cat([read["int4"][side], read["swapped"][side]]) for side in (0, 1)]
    held, where = poisoned_pool("fp32", 4, 2, 16, 32), PageList.of(range(4), LENS * 2)
    kv_append(*exact, held, where, backend="reference")
    want = paged_attention(q, [held], make_plan([(4, range(4), LENS * 2)]), backend="reference")
    assert_close("out", got[0], want[0], 42 + 32)
    assert_close("lse", got[1], want[1], 42 + 32)


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_a_prologue_stores_by_the_format_of_its_pages(swapped, which):
    qkv = torch.randn(sum(LENS), 3 * 2 * 32, generator=torch.Generator().manual_seed(2))
    pool, where = poisoned_pool("swapped", 3, 2, 16, 32), PageList.of([2, 0], LENS)
    qkv_prologue(qkv, None, None, None, pool, where, backend=which)
    _, k, v = qkv.view(sum(LENS), 3, 2, 32).unbind(1)
    want, _ = filled("swapped", k.contiguous(), v.contiguous(), "reference")
    for name, x in pool.tensors.items():
        assert torch.equal(x[0].view(torch.uint8), want.tensors[name][0].view(torch.uint8)), name
        assert torch.equal(x[2].view(torch.uint8), want.tensors[name][2].view(torch.uint8)), name


def test_a_format_goes_through_torch_compile_by_its_name(swapped):
    k, v = torch.randn(2, sum(LENS), 2, 32, generator=torch.Generator().manual_seed(0))
    pool, where = poisoned_pool("swapped", 3, 2, 16, 32), PageList.of([2, 0], LENS)
    with torch.no_grad():
        torch.compile(kv_append, fullgraph=True, backend="aot_eager")(k, v, pool, where, backend="reference")
    want, _ = filled("swapped", k, v, "reference")
    for name, x in pool.tensors.items():
        assert torch.equal(x.view(torch.uint8), want.tensors[name].view(torch.uint8)), name


def test_one_more_format_is_one_more_line_of_the_table():
    """Whatever lists formats goes by the table: the tests, the proofs, the benchmarks, what a world is offered."""
    code = """
import torch
from inferix_kernels import layout
layout.FORMATS["swapped"] = layout.Format(layout.Codec(torch.uint8, "token"), layout.Codec(torch.uint8, "channel"))
layout.KV_FORMATS += ("swapped",)  # as the table's line would have it
from inferix_kernels import chosen
from inferix_kernels.proofs import prove
from benchmarks import attention, formats, kv_pages, qkv
from benchmarks.harness.plan import FORMATS
assert "swapped" in {job.format for job in prove.jobs("cpu")}
limits = attention.limits_of("cpu")
assert limits["swapped", "auto"] == limits["int4", "auto"]
assert "kv swapped" in chosen.table(chosen.target("cpu"))
for case in prove.kernels_of("swapped").values():
    case("compiled", "cpu")
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
