"""Ragged segments with page lists of their own mean what flex_flash_attn means by q_ranges and k_ranges.

Its documentation: out[q] is the softmax over the keys of all k_ranges[i] whose q_ranges[i] holds q; here q ranges do
not overlap, and a q range may have several k ranges that do not overlap either (github.com/SandAI-org/MagiAttention).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inferix_kernels import KVStore, Policy

D, H, PAGE = 16, 2, 8


def flex(q, k, v, q_ranges, k_ranges):
    """float64, key by key: q [T, Hq, D], k and v [S, H, D]; ranges [n, 2]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for (a, b), spans in zip(q_ranges, k_ranges):
        rows = torch.cat([torch.arange(*span) for span in spans])
        keys, values = (x[rows].double().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), keys) * D**-0.5
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


@st.composite
def cases(draw):
    past, blocks = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    size, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    see = []
    for i in range(blocks):
        before = size * (past + i)
        first = draw(st.integers(0, before))
        gap = draw(st.lists(st.integers(first, max(first, before - 1)), max_size=2)) if draw(st.booleans()) else []
        see.append([frame for frame in range(first, before) if frame not in gap])
    return past, blocks, size, tokens, see, draw(st.sampled_from([3, 6])), draw(st.integers(0, 99))


def spans(frames, tokens):
    """Runs of frames as ranges of rows."""
    found = []
    for frame in frames:
        if found and found[-1][1] == frame * tokens:
            found[-1][1] += tokens
        else:
            found.append([frame * tokens, (frame + 1) * tokens])
    return found


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_random_ranges(backend, case):
    past, blocks, size, tokens, see, grouped, seed = case
    generator = torch.Generator().manual_seed(seed)
    store = KVStore(
        layers=1,
        heads=H,
        head_dim=D,
        frame_tokens=tokens,
        block_frames=size,
        scratch_blocks=blocks,
        pools={"fp32": max(1, past * size)},
        page_size=PAGE,
        backend=backend,
    )
    table = store.open(Policy())
    per_block = size * tokens
    k, v = (torch.randn((past + blocks) * per_block, H, D, generator=generator) for _ in range(2))
    for i in range(past):
        block, rows = table.open_block(size), slice(i * per_block, (i + 1) * per_block)
        table.plan([block], commit=block).append(0, k[rows], v[rows])
        table.seal(block)
    q = torch.randn(blocks * per_block, grouped * H, D, generator=generator)
    opened = [table.open_block(size) for _ in range(blocks)]
    new = slice(past * per_block, None)
    qkv = torch.cat([q, k[new], v[new]], 1).flatten(1)
    got = table.plan(opened, see=see).attend(0, qkv, None, None)
    q_ranges = [[i * per_block, (i + 1) * per_block] for i in range(blocks)]
    k_ranges = [spans([*seen, *block.frames], tokens) for seen, block in zip(see, opened)]
    wanted = flex(q, k, v, q_ranges, k_ranges)
    assert (got.view_as(wanted).double() - wanted).abs().max() < 1e-5
