"""Adapters of libraries that are not here, on stand-ins that take and give the layouts their documentation names."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention, kv_pages, peers
from benchmarks.harness.case import error_of
from benchmarks.shapes import SHAPES

SHAPE = SHAPES["smoke"]  # grouped heads, a last page that is partly valid
CPU = torch.device("cpu")


def exact(q, k, v):
    """[T, Hq, D], [N, H, D] -> [T, Hq, D]."""
    heads = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1).to(q.dtype)


def flash_attn_func(q, k, v, num_splits=1):
    """[B, T, H, D] each."""
    assert q.shape[0] == k.shape[0] == 1 and q.shape[3] == k.shape[3]
    return exact(q[0], k[0], v[0])[None]


def sageattn(q, k, v, tensor_layout, is_causal):
    assert tensor_layout == "NHD" and not is_causal
    return flash_attn_func(q, k, v)


def memory_efficient_attention(q, k, v):
    """[B, T, H, group, D]; K and V expanded."""
    assert q.ndim == k.ndim == 5 and q.shape[2:] == k.shape[2:]
    return exact(*(x[0].flatten(1, 2) for x in (q, k, v)))[None].unflatten(2, q.shape[2:4])


class PagedWrapper:
    """FlashInfer's: CSR pages, of which a request's last alone may be partly valid; a cache [P, H, page, D] twice."""

    def __init__(self, workspace, kv_layout, backend):
        assert workspace.dtype == torch.uint8 and kv_layout == "HND" and backend in ("fa2", "fa3")

    def plan(self, q_indptr, indptr, indices, last, q_heads, kv_heads, head_dim, page_size, **options):
        assert not options["causal"] and len(last) == len(indptr) - 1 == len(q_indptr) - 1 == 1
        assert all(x.dtype == torch.int32 for x in (q_indptr, indptr, indices, last))
        self.indices, self.last, self.page_size, self.heads = indices, int(last), page_size, (q_heads, kv_heads)
        self.dtypes = options["q_data_type"], options["kv_data_type"]

    def run(self, q, cache):
        assert (q.dtype, cache[0].dtype) == self.dtypes and (q.shape[1], cache[0].shape[1]) == self.heads
        tokens = (len(self.indices) - 1) * self.page_size + self.last
        k, v = (side[self.indices].float().transpose(1, 2).flatten(0, 1)[:tokens] for side in cache)
        return exact(q, k, v)


def append_paged_kv_cache(k, v, request, positions, cache, indices, indptr, last, kv_layout):
    assert kv_layout == "HND" and indptr.tolist() == [0, len(indices)] and not request.any()
    page = cache[0].shape[2]
    assert (len(indices) - 1) * page + int(last) == len(k)
    for side, x in zip(cache, (k, v)):
        side[indices.long()[positions // page], :, positions % page] = x


def merge_state(v_a, s_a, v_b, s_b):
    """LSEs to base 2."""
    s = torch.logaddexp2(s_a, s_b)
    weights = [torch.exp2(x - s)[..., None] for x in (s_a, s_b)]
    return (v_a * weights[0] + v_b * weights[1]).to(v_a.dtype), s


STAND_INS = {
    "flash_attn": {"flash_attn_func": flash_attn_func, "__path__": []},
    "flash_attn.cute": {"flash_attn_func": lambda q, k, v: (flash_attn_func(q, k, v), None)},
    "fa3_fwd_interface": {"flash_attn_func": flash_attn_func},
    "sageattention": {"sageattn": sageattn},
    "xformers": {"__path__": []},
    "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    "flashinfer": {
        "BatchPrefillWithPagedKVCacheWrapper": PagedWrapper,
        "append_paged_kv_cache": append_paged_kv_cache,
        "merge_state": merge_state,
    },
}


@pytest.fixture
def libraries(monkeypatch):
    for name, contents in STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(contents, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)


def adapters():
    """(family, op, name, format) of every adapter for GPUs whose library has a stand-in."""
    for family in (attention, kv_pages):
        list(family.cases(SHAPE, "cuda"))  # registers its peers
    return [
        pytest.param(peer, format, id=f"{peer.op or peer.family}-{peer.name}-{format}")
        for peer in peers.PEERS
        if set(peer.modules) & set(STAND_INS)
        for format in peer.formats
    ]


@pytest.mark.parametrize("peer, format", adapters())
def test_an_adapter_hands_over_and_reads_back_what_its_library_documents(libraries, peer, format):
    family = sys.modules[f"benchmarks.{peer.family}"]
    case = next(case for case in family.cases(SHAPE, "cuda") if case.op.startswith(peer.op))
    contender = next(c for c in case.contenders if (c.name, c.format) == (peer.name, format))
    with torch.inference_mode():
        inputs = case.inputs(CPU)
        prepared = contender.prepare(inputs)
        error = error_of(prepared.read(prepared.run()), case.reference(inputs))
    assert error.within(contender.limit), error


def test_every_peer_is_pinned_and_every_pin_is_a_peer():
    for family in ("attention", "kv_pages", "qkv", "linear"):
        peers.contenders(family, "cuda", 0.0, lambda _: 0)
    assert {peer.package for peer in peers.PEERS} == set(peers.pins())


def test_a_peer_that_is_absent_is_listed_with_the_install_that_brings_it():
    named = {c.name: c.absent for c in peers.contenders("attention", "cuda", 0.0, lambda _: 0, op="paged_attention")}
    assert named["sage"].startswith("pip install sageattention==") and named["sdpa-cudnn"] == ""
