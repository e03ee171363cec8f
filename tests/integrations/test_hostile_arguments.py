"""What a hostile hand found: nothing is written where an error is raised, and errors name the caller's own argument."""

import pytest
import torch

from inferix_kernels import KVPages, PageList, Unsupported, kv_append, make_plan, paged_attention
from inferix_kernels.integrations import flashinfer, hf_kernel
from inferix_kernels.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache
from inferix_kernels.integrations.flex_flash_attn import flex_flash_attn_func
from inferix_kernels.integrations.sdpa import sdpa
from inferix_kernels.integrations.self_forcing import attention, patch, unpatch
from tests.integrations.flash_attn_calls import int32


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("right", [2**30, 2**31 - 1, 2**31, 2**40])
def test_a_window_beyond_everything_is_no_limit(right):
    q, k = tokens(1, 9, 2, 8), tokens(1, 20, 2, 8)
    assert torch.equal(flash_attn_func(q, k, k, window_size=(5, right)), flash_attn_func(q, k, k, window_size=(5, -1)))
    assert torch.equal(
        attention(q.half(), k.half(), k.half(), window_size=(5, right)),
        attention(q.half(), k.half(), k.half(), window_size=(5, -1)),
    )


WRONG = {
    "softmax_scale": ["x", [1], torch.ones(2), float("inf"), float("nan")],
    "window_size": [("a", 1), (None, None), (1.7, 2), 5, None, (1, 2, 3)],
    "softcap": [-1.0, 1e39, None, "1"],
}


@pytest.mark.parametrize("argument, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_nothing_is_appended_where_an_argument_is_wrong(argument, value):
    cache, x = torch.zeros(2, 1, 16, 2, 8), tokens(1, 3, 2, 8)
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        flash_attn_with_kvcache(x, cache[0], cache[1], x, x, cache_seqlens=0, **{argument: value})
    assert not cache.any()


def test_two_sequences_may_not_be_appended_to_one_page():
    cache, x = torch.zeros(2, 4, 16, 2, 8), tokens(2, 3, 2, 8)
    options = {"cache_seqlens": int32(16, 2), "block_table": int32([0, 2], [2, 3])}
    with pytest.raises(
        ValueError, match=r"^block_table must name no page twice that k and v are appended to, got 2 twice"
    ):
        flash_attn_with_kvcache(x, cache[0], cache[1], x, x, **options)
    assert not cache.any()


def test_a_table_without_pages_and_queries_without_ranges():
    cache, x = torch.zeros(2, 4, 16, 2, 8), tokens(2, 3, 2, 8)
    table = torch.zeros(2, 0, dtype=torch.int32)
    out = flash_attn_with_kvcache(x, cache[0], cache[1], cache_seqlens=int32(0, 0), block_table=table, causal=True)
    assert out.shape == x.shape and not out.any()
    ranges = torch.tensor([[0, 0], [0, 0]])
    q, k, types = torch.zeros(0, 2, 8), tokens(5, 2, 8), torch.tensor([1, 0])
    assert flex_flash_attn_func(q, k, k, ranges, torch.tensor([[0, 3], [2, 5]]), types)[0].shape == q.shape


def test_a_strided_query_runs_in_the_same_backend():
    k = tokens(1, 2, 20, 8)
    q = tokens(1, 2, 8, 5).transpose(2, 3)
    assert torch.equal(sdpa(q, k, k), sdpa(q.contiguous(), k, k))
    pool = KVPages.empty("fp32", 2, 2, 16, 8)
    kv_append(k[0].transpose(0, 1), k[0].transpose(0, 1), pool, PageList.of([0, 1], [16, 4]))
    plan = make_plan([(5, [0, 1], [16, 4])])
    found = paged_attention(q[0].transpose(0, 1), [pool], plan, backend="compiled")
    want = paged_attention(q[0].transpose(0, 1).contiguous(), [pool], plan, backend="compiled")
    assert all(torch.equal(a, b) for a, b in zip(found, want))


def test_what_is_appended_to_flashinfers_pages():
    cache, x, one = torch.zeros(4, 2, 16, 2, 8), tokens(3, 2, 8), torch.tensor([0, 0, 0])
    where = {"kv_indices": int32(1), "kv_indptr": int32(0, 1), "kv_last_page_len": int32(3)}
    places = {"batch_indices": one, "positions": torch.arange(3)}

    def append(key=x, value=x, cache=cache, **changed):
        flashinfer.append_paged_kv_cache(key, value, paged_kv_cache=cache, **places | where | changed)

    for changed, error, message in (
        ({"key": x.clone().requires_grad_()}, RuntimeError, "append_key requires a gradient"),
        ({"key": x.double()}, TypeError, "append_key must be float32 or bfloat16 or float16, got float64"),
        ({"value": x.to_sparse()}, ValueError, "append_value must be a dense tensor in memory"),
        ({"positions": torch.arange(3.0)}, TypeError, "positions must be int32 or int64, got float32"),
        (
            {"cache": torch.zeros(1, 2, 16, 2, 8).expand(4, 2, 16, 2, 8)},
            ValueError,
            "paged_kv_cache.k must have a place",
        ),
    ):
        with pytest.raises(error, match=message):
            append(**changed)
    assert not cache.any()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8))
    wrapper.plan(int32(0, 3), int32(0, 1), int32(8), int32(3), 2, 2, 8, 16, q_data_type="float32")
    with pytest.raises(ValueError, match=r"^paged_kv_indices must be from 0 to 3, the room in paged_kv_cache, got 8"):
        wrapper.run(x, cache)


@pytest.mark.parametrize("name", ["q_lens", "k_lens"])
def test_lengths_of_the_research_repositories(name):
    q = tokens(2, 6, 2, 8)
    for lens, message in (
        (torch.tensor([9, 1]), f"{name} must be from 0 to 6, the room in {name[0]}, got 9"),
        (torch.tensor([-1, 1]), f"{name} must be from 0 to 6"),
        (torch.tensor([1]), rf"{name} must be \[2\] integers, got \[1\] torch.int64"),
        (torch.tensor([1.5, 2.0]), rf"{name} must be \[2\] integers, got \[2\] torch.float32"),
        ([1, 2], rf"{name} must be \[2\] integers, got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, **{name: lens})
    assert attention(q[:0], q[:0], q[:0]).shape == (0, 6, 2, 8)


def test_a_module_that_shares_what_another_ones_patch_replaced():
    import types

    from tests.integrations.test_self_forcing import RELATIVES

    module = RELATIVES["self_forcing"]
    other = types.ModuleType("another")
    other.__dict__.update({name: x for name, x in vars(module).items() if not name.startswith("__")})
    with pytest.raises(ValueError, match="backend must be auto or one of"):
        patch(module, backend="nope")
    patch(module)
    try:
        with pytest.raises(
            ValueError, match=r"must not be patched already, got CausalWanSelfAttention.forward that another"
        ):
            patch(other)
    finally:
        unpatch()


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(file, data, path):
        if file.name == "ops.py":
            raise ValueError("no room")
        write(file, data, path)

    write = hf_kernel._write
    monkeypatch.setattr(hf_kernel, "_write", full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(ValueError, match="no room"):
            hf_kernel.export(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("a:b", "path must be without ':'"), ("x" * 300, "can be made"), ("link", "holds something")):
        with pytest.raises(ValueError, match=message):
            hf_kernel.export(tmp_path / name)


def views_in_a_graph():
    pool = KVPages.empty("fp32", 2, 2, 8, 8).map(torch.zero_)
    plan, x, q = make_plan([(6, [0, 1], [8, 8])]), tokens(2, 3, 2, 8), tokens(6, 4, 8)
    return {
        "flash_attn": (lambda c: flash_attn_with_kvcache(x, c[0], c[1], x, x, cache_seqlens=0), (2, 2, 16, 2, 8)),
        "out": (lambda o: paged_attention(q, [pool], plan, out=o[1])[0], (3, 6, 4, 8)),
        "kv_append": (
            lambda c: kv_append(x[0], x[0], KVPages("fp32", c[0], c[1]), PageList.of([1], [3])),
            (2, 4, 2, 8, 8),
        ),
    }


@pytest.mark.parametrize("what", views_in_a_graph())
def test_a_view_that_a_graph_makes_is_not_written_to_where_sizes_vary(what):
    """torch would write to where it lay for other sizes. The same views, made outside, are right."""
    function, shape = views_in_a_graph()[what]
    graph = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    with pytest.raises(Exception, match="must not be a view that is made in the graph") as error:
        graph(torch.zeros(shape))
    assert isinstance(error.value, Unsupported) or "Unsupported" in str(error.value)
