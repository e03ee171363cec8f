"""`precision` of paged_attention: what each costs, whatever q holds, and who chooses."""

import pytest
import torch

from inferix_kernels import KVPages, KVStore, PageList, Policy, kv_append, kv_gather, make_plan, paged_attention
from inferix_kernels.store import snapshot
from inferix_kernels.store.passes import rounds_like_keys

LENS = [64] * 15 + [40]


def inputs(large, small, width=128):
    """q, k, v: one channel of q `large` times as large as the others, the same of k `small` times; float64's result."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 4, width, generator=generator) for n in (128, 1000, 1000))
    q[:, :, 3] *= large
    k[:, :, 3] *= small
    scores = torch.einsum("thd,shd->ths", q.double(), k.double()) * width**-0.5
    return q, k, v, torch.einsum("ths,shd->thd", scores.softmax(-1), v.double())


def error(q, k, v, want, precision, backend):
    pool, plan = KVPages.empty("int8", 16, 4, 64, q.shape[-1]), make_plan([(128, range(16), LENS)])
    kv_append(k, v, pool, PageList.of(range(16), LENS))
    out, _ = paged_attention(q, [pool], plan, precision=precision, backend=backend)
    return float((out - want).norm() / want.norm())


@pytest.mark.parametrize("large, small", [(1, 1), (10, 1), (20, 0.2), (50, 0.1), (100, 0.05)])
def test_auto_and_exact_stay_near_the_reference_whatever_q_holds(isa, large, small):
    case = inputs(large, small)
    reference = error(*case, "exact", "reference")
    assert error(*case, "auto", "compiled") <= 1.5 * reference
    operands = in_bfloat16(*case) if isa in ("avx512_bf16", "amx") else reference
    assert error(*case, "exact", "compiled") <= 1.02 * operands


def in_bfloat16(q, k, v, want):
    """The error that is left if the products take bfloat16 operands, and all else is float64."""
    pool, where = KVPages.empty("int8", 16, 4, 64, q.shape[-1]), PageList.of(range(16), LENS)
    kv_append(k, v, pool, where)
    keys, values = kv_gather([pool], where)
    q, keys, values = (x.bfloat16().double() for x in (q * q.shape[-1] ** -0.5, keys, values))
    scores = torch.einsum("thd,shd->ths", q, keys)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("ths,shd->thd", weights.bfloat16().double(), values) / weights.sum(-1, keepdim=True)
    return float((out - want).norm() / want.norm())


def test_8_bits_are_taken_only_if_they_are_asked_for(isa):
    """One scale for a row of q costs the small channels their bits: where the CPU has such products, it shows."""
    case = inputs(100, 0.05)
    rounded, reference = error(*case, "8bit", "compiled"), error(*case, "exact", "reference")
    if isa == "amx":  # products of bfloat16 numbers take no longer there than the exponentials between them
        assert rounded <= 1.02 * in_bfloat16(*case)
    else:
        assert rounded > 3 * reference if isa.startswith("avx512_") else rounded <= 1.01 * reference


@pytest.mark.parametrize("width", [8, 20, 512, 516])
def test_two_terms_of_q_are_exact_at_every_width(isa, width):
    """Sums of products stay within 32 bits up to 512 channels; beyond, products are those of "exact"."""
    case = inputs(1, 1, width)
    assert error(*case, "auto", "compiled") <= 1.5 * error(*case, "exact", "reference")


def test_largest_codes_do_not_overflow(isa):
    """Every code at its largest, in the widest heads: scores are sums of 512 times 127 * 127 * 255 steps."""
    q, k, v = torch.full((4, 1, 512), 3.0), torch.full((8, 1, 512), 2.0), torch.randn(8, 1, 512)
    pool, plan = KVPages.empty("int8", 1, 1, 8, 512), make_plan([(4, [0], [8])])
    kv_append(k, v, pool, PageList.of([0], [8]))
    want = paged_attention(q, [pool], plan, backend="reference")
    got = paged_attention(q, [pool], plan, backend="compiled")
    # In bfloat16 all of a query is rounded the same way here, by 2^-9 of it at most.
    torch.testing.assert_close(got[1], want[1], rtol=2**-9 if isa == "amx" else 1e-4, atol=1e-4)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-2)


def test_an_unknown_precision_is_refused():
    pool, plan = KVPages.empty("int8", 1, 1, 8, 16), make_plan([(1, [0], [1])])
    with pytest.raises(ValueError, match="precision must be one of auto, exact, 8bit, got 'int8'"):
        paged_attention(torch.randn(1, 1, 16), [pool], plan, precision="int8")
    with pytest.raises(ValueError, match="precision must be one of auto, exact, 8bit, got None"):
        open_store(precision=None)


def open_store(**options):
    return KVStore(
        layers=2, heads=2, head_dim=32, frame_tokens=40, block_frames=1, page_size=16, pools={"int8": 8}, **options
    )


def make_block(table, large):
    """In layer 1 a channel of q is `large` times as large as the others."""
    generator = torch.Generator().manual_seed(table.next_frame)
    block = table.open_block(1)
    clean = table.plan([block], commit=block)
    for layer in range(2):
        qkv = torch.randn(40, 3 * 2 * 32, generator=generator)
        qkv[:, 3] *= large if layer else 1
        clean.attend(layer, qkv, None, None)
    table.seal(block)


def test_a_worlds_first_block_says_in_which_layers_q_may_be_rounded(tmp_path):
    store = open_store()
    table, other = (store.open(Policy(window=4)) for _ in range(2))
    make_block(table, large=20)
    make_block(other, large=1)
    assert table.state.eight_bit == (True, False) and other.state.eight_bit == (True, True)
    make_block(table, large=1)  # later blocks change nothing
    assert table.fork().state.eight_bit == (True, False)
    path = tmp_path / "world.safetensors"
    snapshot.save(table, path)
    assert snapshot.load(open_store(), path).state.eight_bit == (True, False)
    table.rewind(2)
    assert table.state.eight_bit == (False, False)


@pytest.mark.parametrize(
    "precision, wanted", [("auto", ["auto", "8bit"]), ("exact", ["exact"] * 2), ("8bit", ["8bit"] * 2)]
)
def test_a_pass_attends_in_the_precision_of_its_store(monkeypatch, precision, wanted):
    from inferix_kernels.store import attention

    seen, real = [], attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *x, **named: seen.append(named["precision"]) or real(*x, **named)
    )
    table = open_store(precision=precision).open(Policy(window=4))
    make_block(table, large=1)
    make_block(table, large=1)
    assert [seen[0], seen[2]] == wanted  # of layer 0: before its first block was committed, and after


def test_rounding_is_compared_with_the_keys():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(100, 2, 64, generator=generator) for _ in range(2))
    assert rounds_like_keys(q, k) and rounds_like_keys(1000 * q, k)
    q[..., 0] *= 10
    assert not rounds_like_keys(q, k) and rounds_like_keys(k, q)
