"""What FlashAttention's functions take: signatures, hints, what is refused, and errors that name what is wrong."""

import doctest
import inspect

import pytest
import torch

from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations import flash_attn
from tests.integrations.flash_attn_calls import FUNCTIONS, appended, given, int32, paged

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
    ("kvcache", {"cache_seqlens": 2.5}, "cache_seqlens must be a whole number, got 2.5"),
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
