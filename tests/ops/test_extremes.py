"""Numbers at the ends of what a float can hold, and those that are none: every backend and every level of instructions
gives what the reference does.
"""

import math

import pytest
import torch

from inferix_kernels import KVPages, PageList, kv_append, make_plan, merge_attention, paged_attention
from inferix_kernels.testing import attention_inputs
from tests.triton_kernels import triton_mode  # noqa: F401

# Of numpy, in which Triton's interpreter calculates.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def inputs(format):
    sizes = {"query_heads": 2, "heads": 1, "head_dim": 32, "page_size": 16}
    return attention_inputs([5, 2], [16, 9, 0, 5], formats=(format,), **sizes)


LOWEST = torch.finfo(torch.float32).min
LARGE = [-1e4, 1e7, -1e30, -2.5e38, -LOWEST, -1e9, LOWEST]


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "i8f8", "fp8", "int4"])
def test_a_bias_of_any_size_on_all_pages_changes_nothing_but_lse(format, where):
    """Softmax knows no common shift, though beside it float32 has no room for a score."""
    q, pools, plan = inputs(format)
    want, plain = paged_attention(q, pools, plan, backend=where)
    for bias in LARGE[-3:] if where == "triton" else LARGE:
        shifted = plan._replace(page_bias=torch.full(plan.page_ids.shape, bias))
        out, lse = paged_attention(q, pools, shifted, backend=where)
        assert torch.equal(out, want)
        torch.testing.assert_close(lse.double(), plain.double() + bias, rtol=3e-7, atol=0)  # two roundings


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
def test_finite_is_not_left_out_and_infinite_is(format, where):
    """The lowest finite number on all pages that are not left out is attention to those."""
    q, pools, plan = inputs(format)
    out_of_it = torch.tensor([True, False, False, True, False, False, True])
    shift = torch.where(out_of_it, -torch.inf, 0.0)
    want, plain = paged_attention(q, pools, plan._replace(page_bias=shift), backend=where)
    low = torch.where(out_of_it, -torch.inf, LOWEST)
    out, lse = paged_attention(q, pools, plan._replace(page_bias=low), backend=where)
    assert torch.equal(out, want) and (lse == LOWEST).all() and plain.isfinite().all()
    # Beside pages without a bias it is left out too, whichever comes first.
    for low in (-1e9, LOWEST):
        mixed = torch.where(out_of_it, low, 0.0)
        out, lse = paged_attention(q, pools, plan._replace(page_bias=mixed), backend=where)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, plain, rtol=1e-6, atol=1e-6)


def test_large_scores_beside_a_masked_page(where):
    """q . k of 200 on a page whose bias is -1e9: its power of two alone is no float32."""
    pool = KVPages.empty("fp32", 2, 1, 8, 16)
    k = torch.zeros(16, 1, 16)
    k[..., 0] = 20.0
    v = torch.arange(16.0)[:, None, None].expand(16, 1, 16)
    kv_append(k, v.contiguous(), pool, PageList.of([0, 1], [8, 8]))
    q = torch.zeros(1, 1, 16)
    q[..., 0] = 10.0
    for low in (-1e9, -1e30, LOWEST):
        for page_bias, mean in (([low, 0.0], 11.5), ([0.0, low], 3.5), ([low, low], 7.5)):
            plan = make_plan([(1, [0, 1], [8, 8], page_bias)])
            out, lse = paged_attention(q, [pool], plan, scale=1.0, backend=where)
            torch.testing.assert_close(out, torch.full_like(out, mean), rtol=1e-6, atol=0)
            want = max(page_bias) + 200 + math.log(8 if mean != 7.5 else 16)
            torch.testing.assert_close(lse, torch.full_like(lse, want), rtol=1e-6, atol=0)


def test_joining_results_at_any_size_of_lse(where):
    """Golden: two sets of equal weight have the mean of both, and the log of the sum, rounded."""
    ones = torch.ones(1, 1, 4)
    for size in (0.0, -1e4, 1e9, -1e30, LOWEST, -LOWEST):
        lse = torch.full((1, 1), size)
        out, joined = merge_attention(ones, lse, 3 * ones, lse, backend=where)
        assert torch.equal(out, 2 * ones)
        torch.testing.assert_close(joined, torch.full((1, 1), size + math.log(2)), rtol=1e-6, atol=0)
    low, high = torch.full((1, 1), LOWEST), torch.full((1, 1), -LOWEST)
    for a, b in ((low, high), (high, low)):
        out, joined = merge_attention(ones, a, 3 * ones, b, backend=where)
        assert torch.equal(out, (3 if b is high else 1) * ones) and torch.equal(joined, high)
    out, joined = merge_attention(ones, low, torch.nan * ones, torch.full((1, 1), -torch.inf), backend=where)
    assert torch.equal(out, ones) and torch.equal(joined, low)
