"""FlashInfer's append to pages, and its states of attention joined."""

import itertools
import math

import pytest
import torch

from inferix_kernels import KVPages
from inferix_kernels._dispatch import Unsupported
from inferix_kernels.integrations import flashinfer
from tests.integrations.bytes import Allocations

HEADS, WIDTH, PAGE = 3, 40, 5
LENS, NEW = [7, 13, 5, 0], [7, 4, 1, 0]  # tokens of each sequence, and of them the new ones


def lists(page=PAGE):
    counts = [math.ceil(length / page) for length in LENS]
    indptr = torch.tensor([0, *itertools.accumulate(counts)]).int()
    indices = torch.randperm(sum(counts) + 4, generator=torch.Generator().manual_seed(1))[: sum(counts)].int()
    return indices, indptr, torch.tensor([(length - 1) % page + 1 if length else 0 for length in LENS]).int()


def new_tokens(dtype):
    x = torch.randn(2, sum(NEW), HEADS, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    indptr = torch.tensor([0, *itertools.accumulate(NEW)]).int()
    where = flashinfer.get_batch_indices_positions(indptr, torch.tensor(LENS), sum(NEW))
    return *x.unbind(), *where


def empty_cache(kind, dtype, pages, page=PAGE):
    """(cache, its kv_layout, its keys and values as [P, page, H, D] views)."""
    generator = torch.Generator().manual_seed(3)
    shape = (pages, 2, page, HEADS, WIDTH) if kind.startswith("NHD") else (pages, 2, HEADS, page, WIDTH)
    cache = torch.randn(shape, generator=generator).to(dtype)
    views = [side if kind.startswith("NHD") else side.transpose(1, 2) for side in cache.unbind(1)]
    return tuple(cache.unbind(1)) if kind.endswith("two") else cache, kind[:3], views


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["NHD", "HND", "NHD, two", "HND, two"])
def test_tokens_are_appended_in_place_bit_for_bit(kind, dtype):
    indices, indptr, last = lists()
    key, value, batch, positions = new_tokens(dtype)
    cache, kv_layout, views = empty_cache(kind, dtype, len(indices) + 100)
    wanted = [view.clone() for view in views]
    for t, (b, at) in enumerate(zip(batch.tolist(), positions.tolist())):
        page = indices[indptr[b] + at // PAGE]
        wanted[0][page, at % PAGE], wanted[1][page, at % PAGE] = key[t], value[t]
    order = torch.randperm(len(batch))  # tokens may come in any order
    given = [x[order] for x in (key, value, batch, positions)]
    with Allocations() as made:
        flashinfer.append_paged_kv_cache(*given, cache, indices, indptr, last, kv_layout)
    assert all(torch.equal(*pair) for pair in zip(views, wanted))
    assert made.nbytes < views[0].nbytes / 4


def test_pages_of_one_token_may_have_no_dimension_of_their_own():
    indices, indptr, last = lists(page=1)
    key, value, batch, positions = new_tokens(torch.float16)
    cache = torch.zeros(len(indices) + 4, 2, HEADS, WIDTH, dtype=torch.float16)
    flashinfer.append_paged_kv_cache(key, value, batch, positions, cache, indices, indptr, last)
    rows = indices[(indptr[batch.long()] + positions).long()].long()
    assert torch.equal(cache[rows], torch.stack((key, value), 1))


def test_a_page_of_padded_rows_is_a_cache_too():
    """Pages that begin at no multiple of a token's stride."""
    indices, indptr, last = lists()
    key, value, batch, positions = new_tokens(torch.float32)
    room = torch.zeros(2, len(indices) + 4, PAGE * HEADS * WIDTH + 7)
    cache = tuple(side[:, : PAGE * HEADS * WIDTH].unflatten(1, (PAGE, HEADS, WIDTH)) for side in room)
    flashinfer.append_paged_kv_cache(key, value, batch, positions, cache, indices, indptr, last)
    at = indices[(indptr[batch.long()] + positions // PAGE).long()].long(), positions.long() % PAGE
    assert torch.equal(cache[0][at], key) and torch.equal(cache[1][at], value)
    assert room.count_nonzero() == key.count_nonzero() + value.count_nonzero()


@pytest.mark.parametrize("batch, position", [(-1, 0), (4, 0), (0, -1), (0, 10), (3, 0)])
def test_a_token_that_is_in_no_page_is_an_error_and_nothing_is_written(batch, position):
    indices, indptr, last = lists()
    key, value, batches, positions = new_tokens(torch.float16)
    batches[3], positions[3] = batch, position
    cache, kv_layout, _ = empty_cache("NHD", torch.float16, len(indices) + 4)
    before = cache.clone()
    with pytest.raises(ValueError, match=r"must name tokens of the listed pages, got token -?\d+ of sequence"):
        flashinfer.append_paged_kv_cache(key, value, batches, positions, cache, indices, indptr, last, kv_layout)
    assert torch.equal(cache, before)


def test_pages_with_scales_are_written_whole():
    pages = KVPages.empty("int8", 8, HEADS, 8, WIDTH)
    key, value, batch, positions = new_tokens(torch.float16)
    with pytest.raises(Unsupported, match="paged_kv_cache must hold floats, got int8"):
        flashinfer.append_paged_kv_cache(key, value, batch, positions, pages, *lists())


@pytest.mark.parametrize("two", [False, True])
def test_an_append_compiles_to_one_graph_that_serves_every_layer(two):
    """Also where layers are one tensor, at offsets of which the first call knows nothing. A token that has no page is
    left out."""
    indices, indptr, last = lists()
    key, value, batch, positions = new_tokens(torch.float16)
    one = torch.stack([empty_cache("NHD", torch.float16, len(indices) + 4)[0]] * 3)  # [layer, page, 2, ...]
    sides = one.transpose(0, 2).contiguous().transpose(1, 2)  # [2, layer, page, ...]

    def append(cache, key, value, lens):
        ends = torch.tensor(NEW).cumsum(0)
        where = flashinfer.get_batch_indices_positions(torch.cat((ends[:1] * 0, ends)), lens, len(key))
        flashinfer.append_paged_kv_cache(key, value, *where, cache, indices, indptr, last)

    compiled = torch.compile(append, fullgraph=True, backend="aot_eager")
    more = [torch.cat((x, x[:1])) for x in (key, value)]
    for layer in range(3):
        pair = sides[0][layer].clone(), sides[1][layer].clone()
        compiled(pair if two else one[layer], *more, torch.tensor(LENS))
        flashinfer.append_paged_kv_cache(key, value, batch, positions, tuple(sides[:, layer]), indices, indptr, last)
        got = pair if two else one[layer].unbind(1)
        assert all(torch.equal(*x) for x in zip(got, sides[:, layer]))
    with pytest.raises(Exception, match=r"must be one tensor \[pages, 2, ...\] in a compiled graph"):
        compiled(tuple(one[0].unbind(1)), *more, torch.tensor(LENS))


def test_where_new_tokens_go():
    """FlashInfer's documented example, two tokens past the end, and its lengths."""
    given = torch.full((12,), 9, dtype=torch.int32)
    batch, positions = flashinfer.get_batch_indices_positions(
        torch.tensor([0, 1, 3, 6, 10]).int(), torch.tensor([5, 5, 5, 5]), 12, positions=given
    )
    assert batch.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, -1, -1] and positions is given
    assert positions.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4, 0, 0]
    _, indptr, last = lists()
    assert flashinfer.get_seq_lens(indptr, last, PAGE).tolist() == LENS


def states(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    v = torch.randn(6, count, HEADS, WIDTH, generator=generator).to(dtype)
    s = 5 * torch.randn(6, count, HEADS, generator=generator)
    if count:
        s[0, 0], s[1] = -math.inf, -math.inf  # one set is empty, or all are
    return v, s


def joined(v, s):
    """By the formula, to base 2, in float64."""
    s, weights = s.double(), torch.exp2(s.double())
    total = weights.sum(1)
    out = (v.double() * weights[..., None]).sum(1) / total.where(total > 0, 1.0)[..., None]
    return out, total.log2()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_states_are_joined_to_base_2(count, dtype, bound):
    v, s = states(count, dtype)
    wanted = joined(v, s)
    results = [flashinfer.merge_states(v, s)]
    if count == 2:
        results.append(flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]))
    for out, total in results:
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wanted[0], rtol=bound, atol=bound)
        torch.testing.assert_close(total.double(), wanted[1], rtol=1e-5, atol=1e-5)


def test_a_state_is_joined_in_place_where_a_mask_says_so():
    v, s = states(2)
    a, sa, b, sb = v[:, 0].clone(), s[:, 0].clone(), v[:, 1], s[:, 1]
    mask = torch.tensor([True, False, True, False, False, True])
    flashinfer.merge_state_in_place(a, sa, b, sb, mask)
    wanted, total = joined(v, s)
    assert torch.equal(a[~mask], v[~mask, 0]) and torch.equal(sa[~mask], s[~mask, 0])
    torch.testing.assert_close(a[mask].double(), wanted[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sa[mask].double(), total[mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="s must be float32"):
        flashinfer.merge_state_in_place(a, sa.double(), b, sb)
    with pytest.raises(ValueError, match="mask must be"):
        flashinfer.merge_state_in_place(a, sa, b, sb, mask[:2])
