"""Where FlashAttention's functions read and write: in the tensors they are given, also when they are compiled."""

import pytest
import torch

from inferix_kernels.integrations import flash_attn, flash_attn_interface
from tests.integrations.bytes import Allocations
from tests.integrations.flash_attn_calls import FUNCTIONS, appended, given, int32, paged


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_but_caches_may_be_strided_anyhow(name):
    arguments = given(name, **(appended(cache_seqlens=3) if "kvcache" in name else {}))
    want = FUNCTIONS[name](**arguments)
    for x in ("q", "k", "v"):
        arguments[x] = arguments[x].transpose(1, -1).contiguous().transpose(1, -1)
    assert torch.equal(FUNCTIONS[name](**arguments), want)
    if "kvcache" in name:
        with pytest.raises(ValueError, match=r"^v_cache must be contiguous in its last dimension"):
            FUNCTIONS[name](
                **arguments | {"v_cache": arguments["v_cache"].transpose(1, -1).contiguous().transpose(1, -1)}
            )


def caches(kind):
    """k_cache, v_cache of 16 sequences of 512 tokens, and the arguments that say so."""
    if kind == "dense":
        return *torch.randn(2, 16, 512, 2, 64), {}
    table = torch.randperm(48, dtype=torch.int32).view(16, 3)[:, :2]
    if kind == "paged":
        return *torch.randn(2, 48, 256, 2, 64), {"block_table": table}
    both = torch.randn(48, 2, 2, 256, 64) if kind == "heads first" else torch.randn(48, 256, 2, 2, 64)
    views = both.permute(1, 0, 3, 2, 4) if kind == "heads first" else both.permute(2, 0, 1, 3, 4)
    return *views, {"block_table": table}


@pytest.mark.parametrize("kind", ["dense", "paged", "one tensor", "heads first"])
@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface], ids=["fa2", "fa3"])
def test_a_cache_is_appended_to_and_read_where_it_lies(kind, module):
    k_cache, v_cache, options = caches(kind)
    if module is flash_attn_interface:
        options = {name.replace("block", "page"): x for name, x in options.items()}
    q, (k, v) = torch.randn(16, 4, 4, 64), torch.randn(2, 16, 4, 2, 64)
    before, places = k_cache.clone(), [x.data_ptr() for x in (k_cache, v_cache)]
    with Allocations() as made:
        module.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=254, **options)
    assert made.nbytes < before.nbytes / 4  # out, lse, indices; the cache is 4 MB
    assert places == [x.data_ptr() for x in (k_cache, v_cache)]
    for b in range(16):
        rows = k_cache[b] if kind == "dense" else k_cache[next(iter(options.values()))[b].long()].flatten(0, 1)
        assert torch.equal(rows[254:258], k[b])
    assert (k_cache != before).any(-1).any(-1).sum() == 16 * 4  # and nothing else was written


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keys_are_read_where_they_lie(name):
    """Also out of a tensor that holds queries, keys and values side by side."""
    qkv = torch.randn(2, 4096, 8, 32)
    q, k, v = qkv.split((4, 2, 2), 2)
    first = q[:, :4].contiguous()
    arguments = given(name, q=first, k=k, v=v)
    if "varlen" in name:
        ends = torch.tensor([0, 1, 2], dtype=torch.int32)
        arguments |= {"q": first.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1), "cu_seqlens_k": ends * 4096}
        arguments |= {"max_seqlen_k": 4096}
    elif "kvcache" in name:
        arguments = {"q": first, "k_cache": k, "v_cache": v}
    with Allocations() as made:
        FUNCTIONS[name](**arguments)
    assert made.nbytes < qkv.nbytes / 64


COMPILED = {
    "flash_attn.flash_attn_func": {"causal": True, "return_attn_probs": True},
    "flash_attn.flash_attn_varlen_func": {"window_size": (3, 1), "softcap": 2.0},
    "flash_attn.flash_attn_with_kvcache": appended(cache_seqlens=int32(2, 3), causal=True, return_softmax_lse=True),
    "flash_attn_interface.flash_attn_func": {"window_size": (3, 1)},
    "flash_attn_interface.flash_attn_varlen_func": {"seqused_q": int32(2, 0), "return_attn_probs": True},
    "flash_attn_interface.flash_attn_with_kvcache": appended(**paged("page_table"), cache_seqlens=3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_compile_sees_one_graph_and_gives_the_same(name):
    """Also where the keys, or the cache, are another part of a tensor than in the first call."""
    torch.manual_seed(0)
    torch.compiler.reset()
    function, arguments = FUNCTIONS[name], given(name, **COMPILED[name])
    traced = "kvcache" in name or name == "flash_attn.flash_attn_varlen_func"  # those with views and writes
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if traced else "eager")
    names = [x for x in ("k_cache", "v_cache") if x in arguments] or ["k", "v"]
    count, *shape = arguments[names[0]].shape
    for begin in (0, 5):
        wholes = torch.randn(2, count + 5, *shape)
        copies = wholes.clone()
        want, got = (
            call(**arguments | dict(zip(names, both[:, begin : begin + count], strict=True)))
            for call, both in ((function, wholes), (compiled, copies))
        )
        torch.testing.assert_close(got, want, atol=0, rtol=0)
        assert torch.equal(copies, wholes)


def test_a_compiled_call_writes_nothing_past_a_table():
    """It can not look at cache_seqlens before; the kernel does."""
    arguments = given("kvcache", **appended(rotary_cos=None, rotary_sin=None), **paged("block_table"))
    arguments |= {"cache_seqlens": int32(3, 7)}
    before = arguments["k_cache"].clone()
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"where.* must"):
        torch.compile(flash_attn.flash_attn_with_kvcache, fullgraph=True, backend="eager")(**arguments)
    assert torch.equal(arguments["k_cache"], before)


@pytest.mark.parametrize("dim", [0, 1])
def test_compiled_appends_to_caches_that_share_a_tensor(dim):
    """One after the other they are written where they lie; between one another they are refused."""
    whole = torch.randn(*((2, 4) if dim == 0 else (4, 2)), 8, 2, 32)
    copy, arguments = whole.clone(), given("kvcache", **appended(cache_seqlens=3))
    torch.compiler.reset()
    function = flash_attn.flash_attn_with_kvcache
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def call(function, both, begin):
        k_cache, v_cache = (x[begin : begin + 2] for x in both.unbind(dim))
        function(**arguments | {"k_cache": k_cache, "v_cache": v_cache})

    if dim == 1:
        with pytest.raises(RuntimeError, match=r"k_cache and v_cache must lie apart in a compiled graph"):
            call(compiled, copy, 0)
    else:
        for begin in (0, 2):
            call(compiled, copy, begin)
            call(function, whole, begin)
    assert torch.equal(copy, whole)
