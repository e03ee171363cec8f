"""flex_flash_attn_func against its definition, key by key in float64: types, overlap, both forms, one graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations.flex_flash_attn import flex_flash_attn_func, plan_ranges
from tests.integrations.bytes import Allocations
from tests.integrations.flex_ranges import HEADS, inputs, seen, told, wanted


def check(got, want, bound=1e-5):
    for x, y in zip(got, want):
        torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)


def test_the_types_are_as_documented():
    """MagiAttention's drawings of 5 queries and 2 keys, 2 and 5, 5 and 5."""
    rows = {
        (5, 2): ("11111", "00011", "10000", "00000"),  # of the first key: who sees it
        (2, 5): ("11", "11", "10", "10"),
        (5, 5): ("11111", "11111", "10000", "10000"),
    }
    for (queries, keys), firsts in rows.items():
        drawn = ["".join(str(int(x)) for x in seen(queries, keys, kind)[:, 0]) for kind in range(4)]
        assert tuple(drawn) == firsts
    assert seen(2, 5, 1)[0].tolist() == [True] * 4 + [False] and seen(2, 5, 2)[1].tolist() == [False] + [True] * 4


@st.composite
def ranges(draw, overlap):
    queries, keys, count = draw(st.integers(1, 60)), draw(st.integers(1, 300)), draw(st.integers(1, 5))
    cuts = sorted(draw(st.lists(st.integers(0, queries), min_size=2 * count, max_size=2 * count)))
    q_ranges = [[cuts[2 * i], cuts[2 * i + 1]] for i in range(count)]
    if overlap:
        pair = st.lists(st.integers(0, queries), min_size=2, max_size=2).map(sorted)
        q_ranges = draw(st.lists(st.one_of(pair, st.sampled_from(q_ranges)), min_size=count, max_size=count))
    pair = st.lists(st.integers(0, keys), min_size=2, max_size=2).map(sorted)
    k_ranges = draw(st.lists(pair, min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    kinds = draw(st.none() | st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return queries, keys, [q_ranges[i] for i in order], k_ranges, kinds


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_ranges(overlap, data):
    queries, keys, q_ranges, k_ranges, kinds = data.draw(ranges(overlap))
    q, k, v = inputs(queries, keys)
    want = wanted(q, k, v, q_ranges, k_ranges, kinds)
    tensors = told(q_ranges, k_ranges, kinds)
    out, meta = flex_flash_attn_func(q, k, v, *tensors)
    check((out, meta.lse), want)
    if not overlap:
        apart, meta = flex_flash_attn_func(q, k, v, *tensors, disable_fwd_atomic_reduction=True)
        check((apart, meta.lse), want)


PAIRS = [[0, 30], [30, 70], [80, 100]], [[0, 200], [100, 300], [0, 300]], [1, 0, 2]


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_both_forms_scale_softcap_and_dtypes(dtype, bound):
    q, k, v = inputs(100, 300, dtype)
    want = wanted(q, k, v, *PAIRS, scale=0.3, softcap=2.0)
    tensors = told(*PAIRS)
    options = {"softmax_scale": 0.3, "softcap": 2.0, "disable_fwd_atomic_reduction": True}
    new, meta = flex_flash_attn_func(q, k, v, *tensors, **options, pack_gqa=True, auto_range_merge=True)
    assert new.dtype == dtype and meta.max_logits is None
    old, lse = flex_flash_attn_func(q, k, v, *tensors, max_seqlen_q=40, max_seqlen_k=300, deterministic=True,
                                    return_dtype=torch.float32, **options)  # fmt: skip
    assert old.dtype == torch.float32 and list(lse.shape) == [HEADS, 100] and lse.is_contiguous()
    check((new, meta.lse), want, bound)
    check((old, lse.t()), want, bound)


def test_a_plan_is_made_once_and_serves_every_layer():
    q_ranges, k_ranges, kinds = [[0, 60], [20, 100], [20, 100]], [[0, 50], [40, 300], [0, 40]], [3, 1, 0]
    plan = plan_ranges(*told(q_ranges, k_ranges, kinds), queries=100, keys=300)
    for layer in range(2):
        q, k, v = (x * (layer + 1) for x in inputs(100, 300))
        out, meta = flex_flash_attn_func(q, k, v, plan=plan)
        check((out, meta.lse), wanted(q, k, v, q_ranges, k_ranges, kinds))
    with pytest.raises(ValueError, match="plan must be for 99 queries"):
        flex_flash_attn_func(q[1:], k, v, plan=plan)
    with pytest.raises(ValueError, match="must be None with a plan"):
        flex_flash_attn_func(q, k, v, torch.tensor(q_ranges), torch.tensor(k_ranges), plan=plan)


def test_keys_are_read_where_they_lie():
    """Beside their values in one buffer, as MAGI-1 keeps them."""
    q, k, v = inputs(100, 300)
    both = torch.cat((k, v), -1)
    tensors = told(*PAIRS)
    with Allocations() as made:
        out, meta = flex_flash_attn_func(q, *both.chunk(2, -1), *tensors, disable_fwd_atomic_reduction=True)
    check((out, meta.lse), wanted(q, k, v, *PAIRS))
    assert made.nbytes < out.nbytes + meta.lse.nbytes + k.nbytes / 2


def test_calls_compile_to_one_graph():
    q, k, v = inputs(100, 300)
    tensors = told(*PAIRS)
    plan = plan_ranges(*tensors, queries=100, keys=300)

    def both(q, k, v, *tensors):
        apart = flex_flash_attn_func(q, k, v, *tensors, disable_fwd_atomic_reduction=True)
        old = flex_flash_attn_func(q, k, v, plan=plan, max_seqlen_k=300)
        return apart[0], apart[1].lse, *old

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, v, *tensors), both(q, k, v, *tensors)):
        assert torch.equal(got, want)


def test_bad_ranges_are_refused():
    q, k, v = inputs(10, 20)
    good, far = torch.tensor([[0, 4], [4, 10]]), torch.tensor([[0, 4], [4, 21]])
    for said, arguments, options in [
        ("q_ranges and k_ranges must be given", (), {}),
        (r"q_ranges must be \[n, 2\]", (good[0], good), {}),
        (r"k_ranges must be \[n=2, 2\]", (good, good[:1]), {}),
        ("q_ranges must be int32 or int64", (good.float(), good), {}),
        (r"q_ranges\[1\] must rise within 0 to 10, got \[4, 21\]", (far, good), {}),
        (r"k_ranges\[1\] must rise within 0 to 20", (good, far), {"disable_fwd_atomic_reduction": True}),
        (r"k_ranges\[0\] must rise", (good, good.flip(1)), {}),
        (r"attn_type_map\[1\] must be 0, 1, 2 or 3, got 4", (good, good, torch.tensor([0, 4])), {}),
        (
            "q_ranges must not overlap with",
            (good.new_tensor([[0, 5], [4, 10]]), good),
            {"disable_fwd_atomic_reduction": True},
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            flex_flash_attn_func(q, k, v, *arguments, **options)
    with pytest.raises(ValueError, match=r"v must be torch.float32 like k"):
        flex_flash_attn_func(q, k, v.half(), good, good)
    with pytest.raises(TypeError, match="attn_type_map must be a tensor, got int"):  # positionally: give it by its name
        flex_flash_attn_func(q, k, v, good, good, 6, max_seqlen_k=20)


@pytest.mark.parametrize(
    "name, value",
    [
        ("sink", torch.ones(1, HEADS)),
        ("index_attn_indices", torch.ones(1)),
        ("sm_margin", 8),
        ("return_max_logits", True),
        ("q_block_size", 64),
        ("return_dtype", torch.float16),
    ],
)
def test_what_we_do_not_have_is_refused_by_its_name(name, value):
    with pytest.raises(Unsupported, match=name):
        flex_flash_attn_func(*inputs(10, 20), *told([[0, 10]], [[0, 20]]), **{name: value})
