"""sdpa against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations.sdpa import sdpa
from tests.integrations.bytes import Allocations


def inputs(batch, heads, kv_heads, queries, keys, width, dtype=torch.float32, order="BHLD"):
    generator = torch.Generator().manual_seed(0)

    def one(heads, tokens):
        shape = {"BHLD": (batch, heads, tokens), "BLHD": (batch, tokens, heads), "LBHD": (tokens, batch, heads)}[order]
        x = torch.randn(*shape, width, generator=generator).to(dtype)
        return x.permute(*(order.index(letter) for letter in "BHLD"))

    return one(heads, queries), one(kv_heads, keys), one(kv_heads, keys)


def wanted(q, k, v, **options):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


@pytest.mark.parametrize("order", ["BHLD", "BLHD", "LBHD"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 5), (3, 200), (150, 40), (130, 300)])
@pytest.mark.parametrize("batch, heads, kv_heads, width", [(1, 4, 4, 64), (2, 6, 2, 40)])
def test_shapes_layouts_and_causality(order, is_causal, queries, keys, batch, heads, kv_heads, width):
    """Causal is aligned top-left: torch's query 0 sees key 0 alone."""
    q, k, v = inputs(batch, heads, kv_heads, queries, keys, width, order=order)
    options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": heads != kv_heads}
    torch.testing.assert_close(sdpa(q, k, v, **options).double(), wanted(q, k, v, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precisions(dtype, bound):
    q, k, v = inputs(2, 4, 4, 30, 300, 64, dtype)
    out = sdpa(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    torch.testing.assert_close(out.double(), wanted(q, k, v), rtol=bound, atol=bound)


@pytest.mark.parametrize("batch", [1, 3])
def test_keys_are_read_where_they_lie(batch):
    q, k, v = inputs(batch, 4, 4, 2, 1000, 64)
    with Allocations() as made:
        sdpa(q, k, v)
    assert made.nbytes < k.nbytes / 20


def test_it_compiles_to_one_graph_that_serves_every_layer():
    """Also where layers are one tensor, at offsets of which the first call knows nothing."""
    q, *sides = inputs(2, 4, 4, 30, 300, 64)
    k, v = (torch.stack((side, -side)) for side in sides)
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    for key, value in zip(k, v):
        assert torch.equal(compiled(q, key, value, is_causal=True), sdpa(q, key, value, is_causal=True))


def test_no_keys_give_zeros():
    q, k, v = inputs(1, 4, 4, 5, 0, 64)
    assert not sdpa(q, k, v).any()


def test_what_we_do_not_have_is_refused():
    q, k, v = inputs(1, 4, 2, 5, 6, 64)
    for said, options in [("attn_mask", {"attn_mask": torch.ones(5, 6)}), ("dropout_p", {"dropout_p": 0.1})]:
        with pytest.raises(Unsupported, match=said):
            sdpa(q, k, v, enable_gqa=True, **options)
    with pytest.raises(Unsupported, match="key must be float32, bfloat16 or float16"):
        sdpa(q.double(), k.double(), v.double(), enable_gqa=True)
    for said, arguments in [
        ("key must have query's 4 heads", (q, k, v)),
        (r"query must be \[B, H, L, D\]", (q[0], k, v)),
        ("value must be torch.float32 like query", (q, k, v.half())),
        (r"key and value must be \[1, H, S, 64\] alike", (q, k, v[..., :32])),
    ]:
        with pytest.raises(ValueError, match=said):
            sdpa(*arguments)
