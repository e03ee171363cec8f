"""FlashAttention's functions as they are called: signatures, caches in their own memory, what is refused."""

import doctest
import inspect

import pytest
import torch

from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations import flash_attn, flash_attn_interface
from tests.integrations.bytes import Allocations
from tests.integrations.dense import attention, rotate, visible

SIGNATURES = {
    "flash_attn.flash_attn_func": "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0"
    " alibi_slopes=None deterministic=False return_attn_probs=False",
    "flash_attn.flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0"
    " softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False"
    " return_attn_probs=False block_table=None",
    "flash_attn.flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None"
    " cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False"
    " window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
    "flash_attn_interface.flash_attn_func": "q k v softmax_scale=None causal=False qv=None q_descale=None"
    " k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None"
    " deterministic=False sm_margin=0 return_attn_probs=False",
    "flash_attn_interface.flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    " seqused_q=None seqused_k=None softmax_scale=None causal=False qv=None q_descale=None k_descale=None"
    " v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None deterministic=False"
    " sm_margin=0 return_attn_probs=False",
    "flash_attn_interface.flash_attn_with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None"
    " rotary_sin=None cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None"
    " cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None q_descale=None k_descale=None v_descale=None"
    " softmax_scale=None causal=False window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True"
    " scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False",
}
FUNCTIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (flash_attn, flash_attn_interface)
    for name in module.__all__
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature_is_the_librarys(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(", ", ",") for p in parameters]
    assert " ".join(shown) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_its_example_runs(name):
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(FUNCTIONS[name]), {"torch": torch}, name, None, 0)
    assert test.examples and not doctest.DocTestRunner().run(test).failed


def given(name, **changes):
    """Good arguments of a function, with changes."""
    q, (k, v) = torch.randn(2, 4, 4, 32), torch.randn(2, 2, 8, 2, 32)
    arguments = {"q": q, "k": k, "v": v}
    if "varlen" in name:
        arguments = {key: x.flatten(0, 1) for key, x in arguments.items()}
        ends = torch.tensor([0, 1, 2], dtype=torch.int32)
        arguments |= {"cu_seqlens_q": ends * 4, "cu_seqlens_k": ends * 8, "max_seqlen_q": 4, "max_seqlen_k": 8}
    elif "kvcache" in name:
        arguments = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": int32(5, 6)}
    return arguments | changes


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def appended(**changes):
    table = torch.rand(8, 16)
    return {"k": torch.randn(2, 2, 2, 32), "v": torch.randn(2, 2, 2, 32), "rotary_cos": table, "rotary_sin": table,
            } | changes  # fmt: skip


def paged(table, **changes):
    return {"k_cache": torch.randn(6, 4, 2, 32), "v_cache": torch.randn(6, 4, 2, 32), table: int32([0, 1], [2, 3]),
            } | changes  # fmt: skip


REFUSED = {
    "flash_attn": {"dropout_p": 0.1, "alibi_slopes": torch.ones(4)},
    "flash_attn_interface": {
        "qv": torch.ones(1), "q_descale": torch.ones(1), "k_descale": torch.ones(1), "v_descale": torch.ones(1),
        "attention_chunk": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_there_is_not_is_refused_by_its_name(name):
    function = FUNCTIONS[name]
    for argument, value in REFUSED[name.partition(".")[0]].items():
        if argument in inspect.signature(function).parameters:
            with pytest.raises(Unsupported, match=rf"^{argument} is not supported"):
                function(**given(name, **{argument: value}))
    v = "v_cache" if "kvcache" in name else "v"
    with pytest.raises(Unsupported, match=rf"^{v} must be as wide as {v.replace('v', 'k', 1)}"):
        function(**given(name, **{v: given(name)[v][..., :16]}))
    with pytest.raises(Unsupported, match=rf"^{v.replace('v', 'k', 1)} must be float32, bfloat16 or float16"):
        function(**given(name, **{v.replace("v", "k", 1): given(name)[v].to(torch.float8_e4m3fn)}))
    with pytest.raises(RuntimeError, match=r"^q requires a gradient"):
        function(**given(name, q=given(name)["q"].requires_grad_()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hints_change_no_bit(name):
    function, parameters = FUNCTIONS[name], inspect.signature(FUNCTIONS[name]).parameters
    arguments = given(name)
    hints = {"num_splits": 3, "deterministic": True, "pack_gqa": True, "sm_margin": 2, "scheduler_metadata": int32(1)}
    want = function(**arguments)
    assert torch.equal(function(**arguments, **{x: hints[x] for x in hints if x in parameters}), want)


WRONG = [  # function's end, changed arguments, what the message begins with
    ("_func", {"softcap": -1.0}, "softcap must be 0"),
    ("_func", {"window_size": (1,)}, "window_size must be two numbers"),
    (".flash_attn_func", {"q": torch.randn(2, 4, 3, 32)}, "q must have a multiple of the keys' H=2 heads"),
    (".flash_attn_func", {"q": torch.randn(3, 4, 4, 32)}, r"q must be \[B=2, Sq, Hq, D=32\]"),
    ("_varlen_func", {"cu_seqlens_q": int32(0, 4, 7)}, r"cu_seqlens_q must rise from 0 to 8, got \[0, 4, 7\]"),
    ("_varlen_func", {"cu_seqlens_k": int32(0, 17, 16)}, "cu_seqlens_k must rise from 0 to 16"),
    ("_varlen_func", {"max_seqlen_k": 7}, "the lengths in cu_seqlens_k must be from 0 to 7, the room in max_seqlen_k"),
    ("interface.flash_attn_varlen_func", {"seqused_q": int32(4, 5)}, "seqused_q must be from 0 to 4, got 5"),
    ("interface.flash_attn_varlen_func", {"seqused_k": int32(-1, 5)}, "seqused_k must be from 0 to 8, got -1"),
    ("kvcache", {"cache_seqlens": int32(5, 9)}, "cache_seqlens must be from 0 to 8, the room in k_cache"),
    ("kvcache", {"cache_seqlens": 9}, "cache_seqlens must be from 0 to 8"),
    ("kvcache", {"cache_leftpad": int32(6, 0)}, "cache_leftpad must be from 0 to 5, the room in cache_seqlens, got 6"),
    ("kvcache", {"cache_batch_idx": int32(0, 2)}, "cache_batch_idx must be from 0 to 1, got 2"),
    ("kvcache", {"q": torch.randn(3, 4, 4, 32), "cache_seqlens": 5}, "k_cache must have the B=3 rows of q"),
    ("kvcache", appended(cache_seqlens=None), "cache_seqlens must be given with k and v"),
    ("kvcache", appended(v=None), "k and v must be given together"),
    ("kvcache", appended(k=None, v=None), "k and v must be given with rotary_cos"),
    ("kvcache", appended(rotary_sin=None), "rotary_cos and rotary_sin must be given together"),
    ("kvcache", appended(rotary_cos=torch.rand(8, 17), rotary_sin=torch.rand(8, 17)), "rotary_cos must turn at most"),
    ("kvcache", appended(cache_seqlens=7), "cache_seqlens must be from 0 to 6, the room in k_cache with what"),
    ("kvcache", appended(cache_seqlens=6, causal=True), "positions of q must be from 0 to 7, the room in rotary_cos"),
    ("kvcache", appended(cache_batch_idx=int32(1, 1)), "cache_batch_idx must name no row twice"),
    ("interface.flash_attn_with_kvcache", {"rotary_seqlens": int32(1, 1)}, "k and v must be given with rotary_cos"),
    ("interface.flash_attn_with_kvcache", {"q": torch.randn(8, 4, 32), "cu_seqlens_q": int32(0, 4, 8)},
     "max_seqlen_q must be given with cu_seqlens_q"),
    ("interface.flash_attn_with_kvcache", paged("page_table", cache_seqlens=9), "cache_seqlens .* of page_table"),
    ("n.flash_attn_with_kvcache", paged("block_table", cache_seqlens=9), "cache_seqlens .* of block_table"),
    ("n.flash_attn_with_kvcache", appended(**paged("block_table"), cache_seqlens=7), "cache_seqlens .* of block_table"),
    ("n.flash_attn_with_kvcache", paged("block_table", block_table=int32([0, 1], [2, 6])),
     r"block_table must hold pages from 0 to 5, got 6 at \[1, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize("end, changes, message", WRONG, ids=[row[2] for row in WRONG])
def test_bad_input_is_an_error_that_names_it_and_writes_nothing(end, changes, message):
    tried = 0
    for name, function in FUNCTIONS.items():
        if name.endswith(end):
            arguments = given(name, **changes)
            before = {x: arguments[x].clone() for x in ("k_cache", "v_cache") if x in arguments}
            with pytest.raises(ValueError, match=f"^{message}") as error:
                function(**arguments)
            assert "\n" not in str(error.value)
            assert all(torch.equal(arguments[x], before[x]) for x in before)
            tried += 1
    assert tried


def test_table_entries_past_a_length_are_not_read():
    table = int32([0, 1], [2, -7])
    arguments = given("kvcache", **paged("block_table", block_table=table, cache_seqlens=int32(5, 4)))
    assert flash_attn.flash_attn_with_kvcache(**arguments).isfinite().all()


@pytest.mark.parametrize("width", [*range(8, 257, 8), 20, 59, 111])
def test_head_widths(width):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 3, 2, width), torch.randn(2, 1, 140, 1, width)
    want, _ = attention(q, k, v, torch.ones(1, 3, 140, dtype=torch.bool), softcap=2.0, scale=0.25)
    for module in (flash_attn, flash_attn_interface):
        out = module.flash_attn_func(q, k, v, softmax_scale=0.25, softcap=2.0)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


def rotated_by(function, options, q, lens, causal, **more):
    """What a call returns and what it should, with keys appended at lens and rotated from more's positions on."""
    k_cache, v_cache, k, v, table = options
    at = more.get("rotary_seqlens", lens)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for b in range(len(q)):
        put = slice(int(lens[b]), int(lens[b]) + k.shape[1])
        want_k[b, put] = rotate(k, table, table, at[:, None] + torch.arange(k.shape[1]), True)[b]
        want_v[b, put] = v[b]
    positions = at[:, None] + torch.arange(q.shape[1]) * causal
    ends, lengths = lens + k.shape[1], torch.tensor([q.shape[1]] * len(q))
    mask = visible(q.shape[1], k_cache.shape[1], ends * 0, ends, lengths, (-1, 0) if causal else (-1, -1))
    want, _ = attention(rotate(q, table, table, positions, True), want_k, want_v, mask)
    out = function(q, k_cache, v_cache, k, v, rotary_cos=table, rotary_sin=table, cache_seqlens=lens, causal=causal,
                   **more)  # fmt: skip
    return out, want


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_seqlens_move_the_angles_and_not_the_place(causal):
    torch.manual_seed(0)
    caches = (*torch.randn(2, 2, 20, 2, 32), *torch.randn(2, 2, 3, 2, 32), torch.rand(32, 8))
    function = flash_attn_interface.flash_attn_with_kvcache
    more = {"rotary_seqlens": int32(2, 29)}
    out, want = rotated_by(function, caches, torch.randn(2, 3, 4, 32), int32(4, 17), causal, **more)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


def test_a_window_that_reaches_everything_is_none_where_queries_are_rotated():
    """All queries stand at cache_seqlens then, as without a window."""
    torch.manual_seed(0)
    caches = (*torch.randn(2, 2, 20, 2, 32), *torch.randn(2, 2, 3, 2, 32), torch.rand(32, 8))
    q = torch.randn(2, 3, 4, 32)
    for module, window in ((flash_attn, (20, 20)), (flash_attn_interface, (19, 2))):
        function = module.flash_attn_with_kvcache
        out, want = rotated_by(function, caches, q, int32(4, 17), False, window_size=window)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
        nearly = (window[0] - 1, window[1])
        other, _ = rotated_by(function, caches, q, int32(4, 17), False, window_size=nearly)
        assert not torch.allclose(other, out)


def test_only_the_used_queries_and_keys_count():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 4, 32), torch.randn(2, 2, 8, 2, 32)
    used_q, used_k = int32(2, 0), int32(5, 8)
    mask = visible(4, 8, used_k * 0, used_k, used_q, (-1, 0))
    want, want_lse = attention(q, k, v, mask)
    arguments = given("varlen", q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1))
    options = {"seqused_q": used_q, "seqused_k": used_k, "causal": True, "return_attn_probs": True}
    out, lse = flash_attn_interface.flash_attn_varlen_func(**arguments, **options)
    torch.testing.assert_close(out.view(q.shape).double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse.transpose(0, 1).flatten(1), atol=1e-6, rtol=1e-5)


def test_packed_sequences_read_pages_by_a_block_table():
    torch.manual_seed(0)
    k_cache, v_cache, table = torch.randn(6, 4, 2, 32), torch.randn(6, 4, 2, 32), int32([5, 1], [2, 3])
    q, lens = torch.randn(2, 4, 4, 32), int32(5, 8)
    k, v = (x[table.long()].flatten(1, 2) for x in (k_cache, v_cache))
    want, _ = attention(q, k, v, visible(4, 8, lens * 0, lens, int32(4, 4), (2, 0)))
    arguments = given("varlen", q=q.flatten(0, 1), k=k_cache, v=v_cache, cu_seqlens_k=int32(0, 5, 13))
    out = flash_attn.flash_attn_varlen_func(**arguments, block_table=table, causal=True, window_size=(2, 9))
    torch.testing.assert_close(out.view(q.shape).double(), want, atol=1e-6, rtol=1e-5)


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
    torch.manual_seed(0)
    function, arguments = FUNCTIONS[name], given(name, **COMPILED[name])
    copies = {x: y.clone() if isinstance(y, torch.Tensor) else y for x, y in arguments.items()}
    want = function(**arguments)
    torch.compiler.reset()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(**copies)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    for x in ("k_cache", "v_cache"):
        assert x not in arguments or torch.equal(copies[x], arguments[x])


def test_a_compiled_call_reads_other_parts_of_a_tensor_than_the_first():
    both = torch.randn(40, 2, 2, 32)
    arguments = given("varlen")
    function = flash_attn.flash_attn_varlen_func
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for begin in (0, 5, 24):
        arguments |= dict(zip("kv", both[begin : begin + 16].unbind(1), strict=True))
        assert torch.equal(compiled(**arguments), function(**arguments))
