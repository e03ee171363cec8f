"""The public surface: torch.library registration, tracing, error texts, dispatch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import inferix_kernels as ik
from inferix_kernels import KVPages, PageList, Plan, Quantized, Unsupported, _library
from inferix_kernels.__main__ import OPS
from inferix_kernels.testing import attention_inputs, filled_pool, mixed_pools, rope_table


def add_norm_call(modulate: dict) -> tuple:
    added = {"gate": torch.randn(3, 16), "residual": torch.randn(6, 16), "summed": torch.empty(6, 16)}
    order = ("gate", "residual", *modulate, "eps", "activation", "summed", "out")
    given = {**added, **modulate, "eps": 1e-6, "activation": None, "out": torch.empty(6, 16)}
    return (torch.randn(6, 16),), {name: given[name] for name in order}


def come(plan: Plan) -> dict[str, torch.Tensor]:
    """Arrivals of pages that are there."""
    arrivals = torch.stack((plan.page_ids % 2, plan.page_ids), 1)
    return {"arrivals": arrivals, "counters": torch.full((2,), 9, dtype=torch.int32)}


def calls() -> dict[str, tuple]:
    """op -> (args, kwargs) of a call in which every output is passed in."""
    lens = [8, 3]
    pools, ids, page_lens = mixed_pools(lens, 2, 8, 16, ("fp32", "int8"))
    source, source_list = filled_pool("fp32", lens, 2, 8, 16)
    target, target_list = filled_pool("int8", lens, 2, 8, 16, seed=1)
    k, v = torch.randn(2, 11, 2, 16)
    gathered = tuple(torch.empty(2, sum(page_lens), 2, 16))
    q, attention_pools, plan = attention_inputs([3, 2], lens, query_heads=4, heads=2, head_dim=16, page_size=8)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    limits = {"softcap": 2.0, "alibi_slopes": None, "precision": "exact", "deadline": 1.0}
    latent_pool, latents = filled_pool("latent8", lens, 1, 8, (16, 8))
    latent_plan = ik.make_plan([(5, latents.ids.tolist(), lens)])
    others = [torch.randn(5, 4, 16), torch.randn(5, 4), torch.randn(5, 4, 16), torch.randn(5, 4)]
    rope = rope_table(11, 16)
    prologue = [torch.randn(11, 8 * 16), torch.rand(4 * 16), torch.rand(16), rope, target, target_list]
    norms = {"norm_q_bias": torch.randn(4 * 16), "norm_k_bias": torch.randn(16)}
    options = {**norms, "bias": torch.randn(8 * 16), "k_mean": torch.randn(2, 16), "eps": 1e-6, "interleaved": True}
    biased = plan._replace(page_bias=torch.randn(plan.page_ids.shape), page_variants=plan.page_ids % 2, **come(plan))
    x = Quantized(torch.randint(-127, 128, (6, 16), dtype=torch.int8), torch.rand(6))
    weight = Quantized(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8))
    modulate = {"norm": "layer", "weight": None, "bias": None, "scale": torch.randn(2, 16), "shift": torch.randn(2, 16)}
    epilogue = {"bias": torch.randn(8), "activation": "gelu", "gate": torch.randn(3, 8), "residual": torch.randn(6, 8)}
    quantized = Quantized(torch.empty(6, 16, dtype=torch.int8), torch.empty(6))
    return {
        "kv_append": ((k, v, target, target_list), {}),
        "kv_commit": ((source, source_list, target, target_list, torch.randn(2, 16)), {}),
        "kv_gather": ((pools, PageList.of(ids, page_lens), torch.float32), {"out": gathered}),
        "paged_attention": (
            (torch.stack((q, -q)), attention_pools, biased),
            {"scale": 0.25, "out": out, "lse": lse, "accumulate": False, **limits},
        ),
        "latent_attention": (
            (torch.randn(5, 4, 24), [latent_pool], latent_plan),
            {"scale": 0.25, "out": torch.empty(5, 4, 16), "lse": torch.empty(5, 4), "accumulate": False},
        ),
        "merge_attention": (others, {"out": torch.empty(5, 4, 16), "lse": torch.empty(5, 4)}),
        "qkv_prologue": (prologue, {**options, "out": torch.empty(11, 4, 16)}),
        "quantize_rows": (
            (torch.randn(6, 16), torch.int8),
            {**modulate, "eps": 1e-6, "activation": None, "out": quantized},
        ),
        "add_norm": add_norm_call(modulate),
        "page_summaries": (
            (attention_pools, PageList(plan.page_ids[:2], plan.page_lens[:2]), True),
            {"out": torch.zeros(sum(pool.pages for pool in attention_pools), 2, 2, 16)},
        ),
        "page_scores": (
            (q, plan.q_indptr, torch.randn(4, 2, 1, 16), PageList.of([3, 0], [8, 0])),
            {"scale": 0.25, "out": torch.empty(2, 2, 2)},
        ),
        "select_pages": (
            (torch.randn(2, 2, 6), PageList.of(range(6), [8] * 6), 3),
            {"keep": torch.arange(6) == 4, "frames": 2, "pages_per_frame": 2, "out": PageList.of([7] * 12, [7] * 12)},
        ),
        "linear": ((x, weight), {**epilogue, "dtype": torch.float32, "out": torch.empty(6, 8)}),
    }


def tensors(tree) -> list[torch.Tensor]:
    """Every tensor of a call's arguments, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def flat_arguments(op: str) -> tuple:
    """What the public op hands to torch.library when it is traced."""
    args, kwargs = calls()[op]
    return *_library.OPS[op].flatten(args, kwargs), "reference"


@pytest.mark.parametrize("op", OPS)
def test_registration_is_sound(op):
    torch.library.opcheck(getattr(torch.ops.inferix_kernels, op).default, flat_arguments(op))


def test_a_signature_that_cannot_be_flattened_is_named():
    def made(x: torch.Tensor, table: dict[str, int], *, backend: str = "auto") -> None: ...

    with pytest.raises(TypeError, match=r"table must be of a type that torch.library knows or of layout's, got dict"):
        _library.op(writes=["x"])(made)
    with pytest.raises(ValueError, match="writes must name arguments of made, got y"):
        _library.op(writes=["y"])(made)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_run_no_kernel(op):
    arguments = flat_arguments(op)
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        assert getattr(torch.ops.inferix_kernels, op).default(*fake) is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph_with_the_same_result(op, dynamic):
    torch.manual_seed(0)
    args, kwargs = calls()[op]
    torch.manual_seed(0)
    traced_args, traced_kwargs = calls()[op]
    torch._dynamo.reset()
    function = getattr(ik, op)
    function(*args, **kwargs, backend="reference")
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        compiled(*traced_args, **traced_kwargs, backend="reference")
    for want, got in zip(tensors([args, kwargs]), tensors([traced_args, traced_kwargs])):
        assert torch.equal(want.view(torch.uint8), got.view(torch.uint8))  # poisoned slots hold NaN


def page(format="fp32", **kwargs) -> KVPages:
    sizes = {"pages": 2, "heads": 2, "page_size": 8, "head_dim": 16}
    return KVPages.empty(format, **{**sizes, **kwargs})


def x(tokens=3, heads=2, head_dim=16, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(tokens, heads, head_dim, dtype=dtype)


ONE = PageList.of([0], [3])

# What is wrong -> (call, error, the message: which argument, what it must be, what it got).
MISTAKES = {
    "heads of v": (lambda: ik.kv_append(x(), x(heads=1), page(), ONE), ValueError,
                   r"v must be \[T=3, H=2, Dv\], got \[3, 1, 16\]"),
    "dtype of k": (lambda: ik.kv_append(x(dtype=torch.float64), x(), page(), ONE), TypeError,
                   "k must be float32 or bfloat16 or float16, got float64"),
    "two dtypes": (lambda: ik.kv_append(x(), x(dtype=torch.bfloat16), page(), ONE), TypeError,
                   "v must be float32, got bfloat16"),
    "head_dim of the pages": (lambda: ik.kv_append(x(), x(), page(head_dim=32), ONE), ValueError,
                              r"pages.k must be \[P, H=2, page_size, D=16\], got \[2, 2, 8, 32\]"),
    "a gradient": (lambda: ik.kv_append(x().requires_grad_(), x(), page(), ONE), RuntimeError,
                   r"k requires a gradient, and there is no backward: call it under torch.no_grad\(\)"),
    "ids as int64": (lambda: ik.kv_append(x(), x(), page(), PageList(ONE.ids.long(), ONE.lens)), TypeError,
                     "where.ids must be int32, got int64"),
    "scales of fp32 pages": (lambda: ik.kv_append(x(), x(), page()._replace(k_scales=torch.ones(2, 2, 8)), ONE),
                             ValueError, "pages.k_scales must be None for fp32 pages, got a tensor"),
    "no scales of int8 pages": (lambda: ik.kv_append(x(), x(), page("int8")._replace(v_scales=None), ONE), ValueError,
                                "pages.v_scales must be given for int8 pages, got None"),
    "strided pages": (lambda: ik.kv_append(x(), x(), page().map(lambda _: torch.zeros(2, 2, 8, 32)[..., ::2]), ONE),
                      ValueError, "pages.k must be contiguous in its last dimension, got strides"),
    "int8 twice": (lambda: ik.kv_commit(page("int8"), ONE, page("int8"), ONE, torch.zeros(2, 16)), ValueError,
                   "k_mean must be None for int8 source pages"),
    "a mean for 4-bit pages": (lambda: ik.kv_commit(page("int4"), ONE, page(), ONE, torch.zeros(2, 16)), ValueError,
                               "k_mean must be None for int4 source pages"),
    "no offsets of int4 pages": (lambda: ik.kv_append(x(), x(), page("int4")._replace(k_offsets=None), ONE), ValueError,
                                 "pages.k_offsets must be given for int4 pages, got None"),
    "dtypes of no format": (lambda: ik.kv_append(x(), x(), page()._replace(v=page("int8").v), ONE), TypeError,
                            "pages.v must be float32, got int8"),
    "an unknown format": (lambda: ik.kv_append(x(), x(), page()._replace(format="fp4"), ONE), ValueError,
                          "pages.format must be one of fp32, fp16, .* got 'fp4'"),
    "no format": (lambda: ik.kv_append(x(), x(), KVPages(*page()[1:3], None), ONE), ValueError,
                  "pages.format must be one of fp32, fp16, .* got a Tensor"),
    "odd 4-bit width": (lambda: page("int4", head_dim=15), ValueError, "head_dim must be even for int4 pages, got 15"),
    "width of packed pages": (lambda: ik.kv_append(x(), x(), page("int4", head_dim=32), ONE), ValueError,
                              r"pages.k must be \[P, H=2, page_size, D/2=8\], got \[2, 2, 8, 16\]"),
    "values narrower than keys": (lambda: ik.paged_attention(x(), [page(head_dim=(16, 8))],
                                                             ik.make_plan([(3, [0], [3])])), ValueError,
                                  "pools must have values as wide as keys here, got D=16 and Dv=8"),
    "scales by token": (lambda: ik.kv_append(x(), x(), page("fp8")._replace(v_scales=torch.ones(2, 2, 8)), ONE),
                        ValueError, r"pages.v_scales must be \[P=2, H=2, Dv=16\], got \[2, 2, 8\]"),
    "long scales of int4 pages": (lambda: ik.kv_append(x(), x(), page("int4")._replace(v_scales=torch.ones(2, 2, 8)),
                                                       ONE), TypeError, "pages.v_scales must be float16, got float32"),
    "codes not transposed": (lambda: ik.kv_append(x(), x(), page("fp8")._replace(v=page("fp8").k), ONE), ValueError,
                             r"pages.v must be \[P=2, H=2, Dv=16, page_size=8\], got \[2, 2, 8, 16\]"),
    "values of another width": (lambda: ik.kv_append(x(), x(), page("latent8", head_dim=(16, 8)), ONE), ValueError,
                                r"pages.v must be \[P=2, H=2, page_size=8, Dv=16\], got \[2, 2, 8, 8\]"),
    "odd second width": (lambda: page("int4", head_dim=(16, 7)), ValueError,
                         "head_dim must be even for int4 pages, got 7"),
    "widths of a commit": (lambda: ik.kv_commit(page(), ONE, page("latent8", head_dim=(16, 8)), ONE), ValueError,
                           r"target.v must be \[P=2, H=2, page_size=8, Dv=16\], got \[2, 2, 8, 8\]"),
    "narrow values in a prologue": (lambda: ik.qkv_prologue(torch.zeros(3, 96), None, None, None,
                                                            page(head_dim=(16, 8)), ONE), ValueError,
                                    "pages must have values as wide as keys here, got D=16 and Dv=8"),
    "the width of a latent query": (lambda: ik.latent_attention(x(heads=4), [page("latent8", head_dim=(16, 8))],
                                                                ik.make_plan([(3, [0], [3])]), scale=1.0), ValueError,
                                    r"q must be \[T, Hq, D\+Dv=24\], got \[3, 4, 16\]"),
    "page sizes": (lambda: ik.kv_commit(page(), ONE, page(page_size=16), ONE), ValueError,
                   r"target.k must be \[P, H=2, page_size=8, D=16\], got \[2, 2, 16, 16\]"),
    "one pool": (lambda: ik.kv_gather(page(), ONE), ValueError,
                 "pools must be a list of one or more KVPages, got a single KVPages"),
    "no pool": (lambda: ik.kv_gather([], ONE), ValueError, "got an empty list"),
    "gather dtype": (lambda: ik.kv_gather([page()], ONE, torch.int8), TypeError, "dtype must be .* got torch.int8"),
    "query heads": (lambda: ik.paged_attention(x(heads=3), [page()], ik.make_plan([(3, [0], [3])])), ValueError,
                    "q must have a multiple of the pools' H=2 heads, got 3"),
    "accumulate into nothing": (lambda: ik.paged_attention(x(), [page()], ik.make_plan([(3, [0], [3])]),
                                                           accumulate=True), ValueError, "out and lse must be given"),
    "lse dtype": (lambda: ik.merge_attention(x(), x()[..., 0], x(), x()[..., 0].double()), TypeError,
                  "lse_b must be float32, got float64"),
    "qkv width": (lambda: ik.qkv_prologue(torch.zeros(3, 100), None, None, None, page(), ONE), ValueError,
                  r"qkv must be \(Hq \+ 2H\) \* D wide with the pages' H=2, D=16 .* got 100"),
    "norm size": (lambda: ik.qkv_prologue(torch.zeros(3, 96), torch.ones(8), None, None, page(), ONE), ValueError,
                  r"norm_q must be \[32\] \(all heads together\) or \[16\] \(each head\), got \[8\]"),
    "rope channels": (lambda: ik.qkv_prologue(torch.zeros(3, 96), None, None, torch.zeros(3, 9, 2), page(), ONE),
                      ValueError, "rope must turn at most D=16 channels, got 18"),
    "rope tokens": (lambda: ik.qkv_prologue(torch.zeros(3, 96), None, None, torch.zeros(4, 8, 2), page(), ONE),
                    ValueError, r"rope must be \[T=3, R/2, 2\], got \[4, 8, 2\]"),
    "format": (lambda: page("fp4"), ValueError, "format must be one of fp32, fp16, bf16, int8, .* got 'fp4'"),
    "empty pool": (lambda: page(pages=0), ValueError, "pages must be positive, got 0"),
    "negative queries": (lambda: ik.make_plan([(-1, [], [])]), ValueError,
                         r"segments\[0\]: the number of queries must not be negative, got -1"),
    "ids without lens": (lambda: ik.make_plan([(1, [0], [])]), ValueError, "got 1 ids and 0 lens"),
    "queries of one segment": (lambda: ik.make_plan([(1, [], []), (2, [], [])], lists_per_segment=2), ValueError,
                               r"segments\[1\]: queries must be 1 in all lists of one segment, got 2"),
    "half a segment": (lambda: ik.make_plan([(1, [], [])], lists_per_segment=2), ValueError,
                       "segments must be a multiple of 2 page lists, got 1"),
    "bias of some": (lambda: ik.make_plan([(1, [0], [3], [0.5]), (1, [0], [3])]), ValueError,
                     r"segments\[1\]: bias must be given for all segments or for none"),
    "bias of one page": (lambda: ik.make_plan([(1, [0, 1], [3, 3], [0.5])]), ValueError,
                         r"segments\[0\]: bias must be 2 numbers, got 1"),
    "lists": (lambda: ik.paged_attention(x(), [page()], ik.make_plan([(3, [0], [3])] * 3, lists_per_segment=3)),
              ValueError, r"plan.page_indptr must be \[2\] \(a list per segment\) or \[3\] .* got \[4\]"),
    "variants of one q": (lambda: ik.paged_attention(x(), [page()], ik.make_plan([(3, [0], [3], None, [0])])),
                          ValueError, r"plan.page_variants must be given for q \[V, T, Hq, D\] and None for"),
    "a bias without a norm": (lambda: ik.qkv_prologue(torch.zeros(3, 96), None, None, None, page(), ONE,
                                                      norm_q_bias=torch.zeros(16)), ValueError,
                              "norm_q_bias must be None without norm_q, got a tensor"),
    "rows of a modulation": (lambda: ik.quantize_rows(torch.zeros(4, 16), scale=torch.zeros(3, 16)), ValueError,
                             "scale must have a number of rows that divides M=4, got 3"),
    "dtype of codes": (lambda: ik.quantize_rows(torch.zeros(4, 16), torch.int16), TypeError,
                       "out.codes must be int8 or float8_e4m3fn, got int16"),
    "activation": (lambda: ik.quantize_rows(torch.zeros(4, 16), activation="relu"), ValueError,
                   "activation must be 'gelu', 'gelu_tanh' or None, got 'relu'"),
    "K of a weight": (lambda: ik.linear(torch.zeros(4, 16), ik.quantize_rows(torch.zeros(2, 8))), ValueError,
                      r"weight.codes must be \[N, K=16\], got \[2, 8\]"),
    "codes of two kinds": (lambda: ik.linear(ik.quantize_rows(torch.zeros(4, 16)),
                                             ik.quantize_rows(torch.zeros(2, 16), torch.float8_e4m3fn)), TypeError,
                           "weight.codes must be int8, got float8_e4m3fn"),
    "a weight in floats": (lambda: ik.linear(torch.zeros(4, 16), torch.zeros(2, 16)), TypeError,
                           "weight must be a Quantized, got Tensor"),
    "rows of a summary": (lambda: ik.page_scores(x(), ik.make_plan([(3, [0], [3])]).q_indptr, torch.zeros(2, 2, 3, 16),
                                                 ONE), ValueError,
                          r"summaries must be contiguous \[P, H, 1 or 2, D\], got \[2, 2, 3, 16\]"),
    "summaries of bounds": (lambda: ik.page_summaries([page()], ONE, True, out=torch.zeros(2, 2, 1, 16)), ValueError,
                            r"out must be \[P=2, H=2, 2, D=16\], got \[2, 2, 1, 16\]"),
    "scores of other pages": (lambda: ik.select_pages(torch.zeros(1, 2, 4), ONE, 2), ValueError,
                              r"where.ids must be \[len\(where\)=4\], got \[1\]"),
    "no pages": (lambda: ik.select_pages(torch.zeros(1, 2, 1), ONE, 0), ValueError, "k must be at least 1, got 0"),
    "parts of a frame": (lambda: ik.select_pages(torch.zeros(1, 2, 1), ONE, 1, frames=1, pages_per_frame=2), ValueError,
                         "pages_per_frame must divide n=1, got 2"),
    "lists of a plan": (lambda: ik.even_plan(torch.zeros(2), ONE, 2), ValueError,
                        "lists must be a divisor of the 1 pages, got 2"),
    "negative len": (lambda: PageList.of([0], [-2]), ValueError, "got page 0 with -2 tokens"),
    "backend": (lambda: ik.kv_append(x(), x(), page(), ONE, backend="cudnn"), ValueError,
                "backend must be auto or one of compiled, triton, reference, flash-attn, torch, got 'cudnn'"),
}  # fmt: skip

# The same, of numbers that only a backend looks at: every CPU backend says the same, before it writes.
WRONG_NUMBERS = {
    "id": (PageList.of([2], [3]), r"where.ids\[0\] must be in \[0, 2\), got 2"),
    "len": (PageList.of([0], [9]), r"where.lens\[0\] must be in \[0, 8\], got 9"),
    "sum": (PageList.of([0], [4]), "where.lens must sum to T=3, got 4"),
    "page twice": (PageList.of([1, 1], [2, 1]), "where.ids must name each written page once, got 1 twice"),
}
WRONG_PLANS = {
    "variant": (ik.make_plan([(3, [0], [3], None, [2])]), r"plan.page_variants\[0\] must be in \[0, 2\), got 2"),
    "id": (ik.make_plan([(3, [7], [1])]), r"plan.page_ids\[0\] must be in \[0, 2\), got 7"),
    "len": (ik.make_plan([(3, [0], [9])]), r"plan.page_lens\[0\] must be in \[0, 8\], got 9"),
    "queries": (ik.make_plan([(2, [0], [3])]), "plan.q_indptr must rise from 0 to 3, got"),
    "pages": (ik.make_plan([(3, [0], [3])])._replace(page_indptr=torch.tensor([0, 2], dtype=torch.int32)),
              "plan.page_indptr must rise from 0 to 1, got"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("which", ["reference", "compiled"])
@pytest.mark.parametrize("mistake", WRONG_NUMBERS)
def test_a_wrong_page_list_is_named_before_anything_is_written(mistake, which):
    where, message = WRONG_NUMBERS[mistake]
    pool = page()
    pool.k.fill_(7.0)
    with pytest.raises(ValueError, match=message):
        ik.kv_append(x(), x(), pool, where, backend=which)
    with pytest.raises(ValueError, match=message):
        ik.qkv_prologue(torch.zeros(3, 96), None, None, None, pool, where, backend=which)
    if "twice" not in message:
        with pytest.raises(ValueError, match=message):
            ik.kv_gather([pool], where, out=(x(), x()), backend=which)
    assert (pool.k == 7).all()


@pytest.mark.parametrize("which", ["reference", "compiled"])
def test_lists_of_a_commit_must_agree(which):
    with pytest.raises(ValueError, match=r"target_list.lens must equal source_list.lens, got"):
        ik.kv_commit(page(), ONE, page(), PageList.of([0], [4]), backend=which)


@pytest.mark.parametrize("which", ["reference", "compiled"])
@pytest.mark.parametrize("mistake", WRONG_PLANS)
def test_a_wrong_plan_is_named(mistake, which):
    plan, message = WRONG_PLANS[mistake]
    q = x() if plan.page_variants is None else torch.stack((x(), x()))
    with pytest.raises(ValueError, match=message):
        ik.paged_attention(q, [page()], plan, backend=which)


def test_a_named_backend_never_falls_back():
    q, pools, plan = attention_inputs([2], [3], query_heads=1, heads=1, head_dim=16)
    with pytest.raises(Unsupported, match="page_scores: no Compiled kernel yet"):
        ik.page_scores(q, plan.q_indptr, torch.zeros(3, 1, 1, 16), PageList.of([0], [3]), backend="compiled")
    strided = torch.zeros(2, 1, 32)[..., ::2]
    with pytest.raises(Unsupported, match="out must be contiguous in its last dimension, got strides"):
        ik.paged_attention(q, pools, plan, out=strided, backend="compiled")
    ik.paged_attention(q, pools, plan, out=strided)  # auto goes on to the reference
    with pytest.raises(Unsupported, match="pools must be at most 8, got 9"):
        ik.paged_attention(q, pools * 9, plan, backend="compiled")


def test_sizes_of_a_pool():
    pool = page("int8", pages=3)
    assert (pool.format, pool.pages, pool.heads, pool.page_size, pool.head_dim) == ("int8", 3, 2, 8, 16)
    assert pool.nbytes == 2 * 3 * 2 * 8 * 16 + 4 * (3 * 2 * 8 + 3 * 2 * 16)
    assert page().nbytes == 4 * page("bf16").nbytes // 2 == 4 * page("fp16").nbytes // 2
    latent = page("latent8", pages=3, heads=1, head_dim=(32, 6))
    assert (latent.head_dim, latent.value_dim, latent.page_size) == (32, 6, 8)
    assert latent.nbytes == 3 * 8 * (32 + 4 + 2 * 6)
    packed = page("int4", pages=3, head_dim=(16, 12))
    assert (packed.head_dim, packed.value_dim) == (16, 12)
    assert packed.nbytes == 3 * 2 * (8 * (8 + 6) + 2 * 2 * (16 + 8))
    part = packed.part(1, 3)
    assert (part.pages, part.format, part.value_dim) == (2, "int4", 12) and part.k.data_ptr() == packed.k[1].data_ptr()


def test_a_plan_lists_its_segments():
    plan = ik.make_plan([(2, [4, 1], [8, 3]), (0, [], []), (5, [2], [1])])
    assert isinstance(plan, Plan)
    want = ([0, 2, 2, 7], [0, 2, 2, 3], [4, 1, 2], [8, 3, 1])
    assert tuple(t.tolist() for t in plan[:4]) == want and all(t.dtype == torch.int32 for t in plan[:4])
    assert plan.page_bias is None and plan.page_variants is None


def test_a_plan_may_list_pages_for_each_head():
    plan = ik.make_plan([(2, [4], [8], [0.5], [1]), (2, [], [], [], []), (5, [2], [1], [-1], [0]),
                         (5, [0, 4], [8, 8], [0, 2], [3, 0])], lists_per_segment=2)  # fmt: skip
    assert (plan.q_indptr.tolist(), plan.page_indptr.tolist()) == ([0, 2, 7], [0, 1, 1, 2, 4])
    assert (plan.page_ids.tolist(), plan.page_variants.tolist()) == ([4, 2, 0, 4], [1, 0, 3, 0])
    assert plan.page_bias.dtype == torch.float32 and plan.page_bias.tolist() == [0.5, -1, 0, 2]
