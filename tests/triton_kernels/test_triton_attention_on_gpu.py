"""paged_attention in Triton on a GPU: real sizes, and a captured graph. Never run on one."""

import pytest
import torch

from inferix_kernels import PageList, kv_gather, make_plan, paged_attention
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.testing import filled_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def wan(format, queries=4680, frames=21):
    """A layer of Wan 1.3B: (q, pools, plan), 1,560 tokens a frame in pages of 64."""
    lens = ([64] * 24 + [24]) * frames
    pool, where = filled_pool(format, lens, 12, 64, 128, "cuda")
    q = torch.randn(queries, 12, 128, device="cuda", dtype=torch.bfloat16)
    return q, [pool], make_plan([(queries, where.ids.tolist(), lens)], "cuda")


@pytest.mark.parametrize("format", KV_FORMATS)
def test_real_sizes(format):
    q, pools, plan = wan(format)
    out, _ = paged_attention(q, pools, plan, backend="triton")
    k, v = kv_gather(pools, PageList(plan.page_ids, plan.page_lens), torch.bfloat16)
    q, k, v = (x.transpose(0, 1)[None].float() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    assert float((out.float() - want).norm() / want.norm()) < 0.01


def test_a_captured_graph_follows_its_plan():
    """Fixed addresses, other contents: a longer list, other pages, another length of the last."""
    q, pools, plan = wan("int8", queries=300, frames=3)
    short = plan._replace(page_indptr=torch.tensor([0, 20], dtype=torch.int32, device="cuda"))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    held = type(plan)(*(None if x is None else x.clone() for x in short))
    call = {"out": out, "lse": lse, "backend": "triton"}
    paged_attention(q, pools, held, **call)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(q, pools, held, **call)
    for now in (short, plan, plan._replace(page_ids=plan.page_ids.flip(0), page_lens=plan.page_lens.flip(0))):
        for field, content in zip(held, now):
            if field is not None:
                field.copy_(content)
        graph.replay()
        want_out, want_lse = paged_attention(q, pools, now, backend="triton")
        assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
