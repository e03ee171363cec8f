"""The bytes that a rank sends: counted number by number from who has what before and after, and by the formulas."""

import itertools

import pytest

from inferix_kernels.distributed import wire
from inferix_kernels.layout import FORMATS, KV_FORMATS
from inferix_kernels.store import memory

HEADS, KV_HEADS, D, ITEM = 24, 12, 16, 2
CUTS = [(13, 4), (12, 3), (2, 4), (1, 2), (48, 6), (7, 1)]  # ragged, even, empty shards, one token, six ranks, alone


def rows(tokens, ranks):
    return [wire.rows_of(tokens, ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("heads, page_size, head_dim", [(1, 64, 128), (3, 8, 64), (2, 40, 96)])
def test_a_page_travels_as_it_is_stored(format, heads, page_size, head_dim):
    stored = memory.page_bytes(format, heads, page_size, head_dim)
    assert wire.page_bytes(format, heads, page_size, head_dim) == stored


def test_every_format_of_pages_is_known_here():
    assert set(wire.FORMATS) == set(KV_FORMATS)
    floats = {name: FORMATS[name].k.dtype.itemsize for name in KV_FORMATS if not FORMATS[name].quantized}
    assert floats == wire.ITEMSIZE


def test_pages_in_8_bits_send_a_little_more_than_half():
    eight, sixteen = (wire.page_bytes(format, 12, 64, 128) for format in ("int8", "bf16"))
    assert eight <= 0.53 * sixteen


@pytest.mark.parametrize("tokens, ranks", CUTS)
def test_rows_are_cut_evenly_and_none_is_left_out(tokens, ranks):
    cut = rows(tokens, ranks)
    assert list(itertools.chain(*cut)) == list(range(tokens))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def moved(before, after, ranks):
    """Numbers that each rank sends, if item -> rank (or ranks) changes so."""
    sent = [0] * ranks
    for item, owner in before.items():
        sent[owner] += len(set(after[item]) - {owner})
    return sent


@pytest.mark.parametrize("tokens, ranks", CUTS)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_new_keys_go_to_everybody_who_holds_their_heads(tokens, ranks, parts):
    if ranks % parts:
        return
    items = {
        (row, h, kv): rank
        for rank, own in enumerate(rows(tokens, ranks))
        for row in own
        for h in range(KV_HEADS)
        for kv in (0, 1)
    }
    holders = {item: [r for r in range(ranks) if item[1] * parts // KV_HEADS == r % parts] for item in items}
    sent = [n * D * ITEM for n in moved(items, holders, ranks)]
    # Each head is sent to all of its holders but the rank itself: own heads to those alike, other heads to others.
    assert sent == [wire.keys(len(own), ranks, KV_HEADS // parts, 2 * D, ITEM) for own in rows(tokens, ranks)]


@pytest.mark.parametrize("tokens, ranks", CUTS)
def test_ulysses_sends_each_query_to_its_heads_rank_and_the_output_back(tokens, ranks):
    cut = rows(tokens, ranks)
    owner = {row: rank for rank, own in enumerate(cut) for row in own}
    there = {(row, head): owner[row] for row in range(tokens) for head in range(HEADS)}
    sent = moved(there, {(row, head): [head * ranks // HEADS] for row, head in there}, ranks)
    assert [n * D * ITEM for n in sent] == [wire.queries(len(own), ranks, HEADS // ranks, D, ITEM) for own in cut]
    back = moved({key: key[1] * ranks // HEADS for key in there}, {key: [owner[key[0]]] for key in there}, ranks)
    assert [n * D * ITEM for n in back] == [wire.outputs(tokens - len(own), HEADS // ranks, D, ITEM) for own in cut]


@pytest.mark.parametrize("shards", [[5, 7, 11, 13], [3, 0, 9], [4], [0, 0, 8, 1, 1]])
def test_a_ring_sends_on_what_came_until_everybody_had_it(shards):
    ranks = len(shards)
    holds, sent = list(range(ranks)), [0] * ranks  # whose shard a rank sends next
    for _ in range(ranks - 1):
        for rank in range(ranks):
            sent[rank] += shards[holds[rank]]
        holds = holds[-1:] + holds[:-1]
    assert sent == [wire.round_the_ring(shards, rank) for rank in range(ranks)]
    assert sum(sent) == (ranks - 1) * sum(shards)


@pytest.mark.parametrize("tokens, ranks", CUTS)
def test_pass_q_sends_queries_to_everybody_and_gets_outputs_and_lse_back(tokens, ranks):
    cut = rows(tokens, ranks)
    items = {(row, head): rank for rank, own in enumerate(cut) for row in own for head in range(HEADS)}
    sent = [n * D * ITEM for n in moved(items, dict.fromkeys(items, range(ranks)), ranks)]
    assert sent == [wire.queries(len(own), ranks, HEADS, D, ITEM) for own in cut]
    # A rank answers each row that is not its own.
    answers = {(row, head, rank): rank for row, head in items for rank in range(ranks)}
    back = moved(answers, {key: [items[key[:2]]] for key in answers}, ranks)
    own = [n * (D * ITEM + 4) for n in back]
    assert own == [wire.outputs(tokens - len(mine), HEADS, D, ITEM, lse=True) for mine in cut]
