"""A NaN or an infinity among what is stored shows when it is read, in every format and on every backend."""

import pytest
import torch

from inferix_kernels import (
    KVPages,
    PageList,
    kv_append,
    kv_commit,
    kv_gather,
    make_plan,
    merge_attention,
    paged_attention,
    quantize_rows,
)
from inferix_kernels.layout import FORMATS, KV_FORMATS
from tests.triton_kernels import triton_mode  # noqa: F401

# Of numpy, in which the interpreter of Triton calculates.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
L, H, D, PAGE = 21, 2, 32, 16
LENS = [16, 5]
# One with a payload: its bits may not end up in the neighbour's half of a byte.
PAYLOAD = torch.tensor(0x7F8FFFFF, dtype=torch.int32).view(torch.float32).item()
STRANGE = {"nan": torch.nan, "-nan": -torch.nan, "payload": PAYLOAD, "inf": torch.inf, "-inf": -torch.inf}
QUANTIZED = [format for format in FORMATS if FORMATS[format].quantized]


def numbers(side, strange, at=(17, 1, 5)):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(L, H, D, generator=generator) for _ in range(2))
    (k if side == "k" else v)[at] = strange
    return k, v


def stored(format, k, v, backend):
    pool = KVPages.empty(format, 2, H, PAGE, (D, v.shape[2]))
    kv_append(k, v, pool, PageList.of([1, 0], LENS), backend=backend)
    return pool


def read(pool):
    return kv_gather([pool], PageList.of([1, 0], LENS), backend="reference")


def same(got, want):
    """Equal, NaN where the other is."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_the_reference_shows_it_in_all_that_shares_a_scale_and_nowhere_else(format, side):
    for strange in STRANGE.values():
        k, v = numbers(side, strange)
        good = read(stored(format, *numbers(side, 0.0), "reference"))
        got = read(stored(format, k, v, "reference"))
        codec = FORMATS[format][0 if side == "k" else 1]
        bad = torch.zeros(L, H, D, dtype=torch.bool)
        bad[17, 1, 5] = True
        if codec.scaled_by == "token":
            bad[17, 1] = True
        elif codec.scaled_by == "channel":
            bad[16:, 1, 5] = True  # of its page
        mine, other = (got[0], got[1]) if side == "k" else (got[1], got[0])
        assert torch.equal(~mine.isfinite(), bad) and other.isfinite().all()
        assert not codec.scaled_by or mine[bad].isnan().all()
        same([mine[~bad]], [good[side == "v"][~bad]])


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_every_backend_stores_what_reads_as_the_references(format, side, where):
    for strange in STRANGE.values():
        k, v = numbers(side, strange)
        same(read(stored(format, k, v, where)), read(stored(format, k, v, "reference")))


@pytest.mark.parametrize("width", [20, 32, 48, 112])
def test_it_shows_wherever_it_lies(width, where):
    """Each channel and token of a tile by itself: vectors, their tails, first and last tokens."""
    if where == "triton":
        pytest.skip("one token and channel stand for all: nothing there goes by vectors")
    for at in [(t, d) for t in (0, 1, 7) for d in range(0, width, 3)] + [(3, width - 1)]:
        for strange in (torch.nan, torch.inf):
            x = torch.randn(8, 1, width, generator=torch.Generator().manual_seed(1))
            x[at[0], 0, at[1]] = strange
            pool = KVPages.empty("int4", 1, 1, 8, width)
            kv_append(x, x, pool, PageList.of([0], [8]), backend=where)
            k, v = kv_gather([pool], PageList.of([0], [8]), backend="reference")
            bad = torch.zeros(8, width, dtype=torch.bool)
            bad[:, at[1]] = True  # keys have a scale for each channel
            assert torch.equal(k[:, 0].isnan(), bad)
            assert torch.equal(v[:, 0].isnan(), (torch.arange(8) == at[0])[:, None].expand(8, width))


@pytest.mark.parametrize("target", QUANTIZED)
def test_a_commit_carries_it_on(target, where):
    for source in ("fp32", "bf16", "int8", "int4"):
        for side, strange in (("k", torch.nan), ("v", -torch.inf)):
            pages = []
            for backend in (where, "reference"):
                pool = stored(source, *numbers(side, strange), "reference")
                to = KVPages.empty(target, 2, H, PAGE, D)
                where_all = PageList.of([1, 0], LENS)
                kv_commit(pool, where_all, to, where_all, backend=backend)
                pages.append(read(to))
            same(*pages)
            assert not pages[0][side == "v"].isfinite().all()


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("format", KV_FORMATS)
def test_attention_shows_it(format, side, where):
    """A key that is no number leaves no output of its head; a value none of its channel."""
    q = torch.randn(3, H, D, generator=torch.Generator().manual_seed(2)).abs()
    plan = make_plan([(3, [1, 0], LENS)])
    for strange in (torch.nan, torch.inf):
        out, lse = paged_attention(q, [stored(format, *numbers(side, strange), where)], plan, backend=where)
        assert out[:, 0].isfinite().all() and lse[:, 0].isfinite().all()
        if side == "k":
            assert (~out[:, 1].isfinite()).all() and (~lse[:, 1].isfinite()).all()
        else:
            assert not out[:, 1, 5].isfinite().any()


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_results_over_other_keys_do_not_hide_it(strange, where):
    """In whichever order they come: ranks attend to the past first, then to what they make."""
    q = torch.randn(3, H, D, generator=torch.Generator().manual_seed(2)).abs()
    plan, made = make_plan([(3, [1, 0], LENS)]), []
    for value in (strange, 0.0):
        pools = [stored("fp32", *numbers("k", value), where)]
        made.append((pools, *paged_attention(q, pools, plan, backend=where)))
    (bad, *bad_parts), (good, *good_parts) = made
    for pools, before in ((bad, good_parts), (good, bad_parts)):
        out, lse = (x.clone() for x in before)
        paged_attention(q, pools, plan, out=out, lse=lse, accumulate=True, backend=where)
        merged = merge_attention(*before, *(bad_parts if pools is bad else good_parts), backend=where)
        for x in (out, lse, *merged):
            assert x[:, 0].isfinite().all() and not x[:, 1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_of_a_linear_layer_show_it(dtype, where):
    for strange in STRANGE.values():
        x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
        x[3, 7] = strange
        got = quantize_rows(x, dtype, backend=where)
        assert torch.equal(got.scales.isnan(), torch.tensor([False, False, False, True, False]))
        x[3, 7] = 0.0
        good = quantize_rows(x, dtype, backend=where)
        others = torch.tensor([0, 1, 2, 4])
        assert torch.equal(got.scales[others], good.scales[others])
        assert torch.equal(got.codes[others].view(torch.uint8), good.codes[others].view(torch.uint8))
