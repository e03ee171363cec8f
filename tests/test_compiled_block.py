"""A DiT block made of our ops, in one graph: torch.compile(fullgraph=True), with any number of tokens."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from inferix_kernels import (
    KVPages,
    PageList,
    linear,
    make_plan,
    merge_attention,
    paged_attention,
    qkv_prologue,
    quantize_rows,
)
from inferix_kernels.testing import filled_pool, rope_table

HEADS, D, PAGE = 2, 16, 8
WIDTH = HEADS * D
BACKEND = "reference"


class Block(torch.nn.Module):
    """Self-attention over pages, cross-attention to a prompt's pages, feed-forward; modulated; 8-bit linears."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int):
            return quantize_rows(torch.randn(rows, columns, generator=generator) * columns**-0.5, backend=BACKEND)

        self.qkv, self.out = weight(3 * WIDTH, WIDTH), weight(WIDTH, WIDTH)
        self.up, self.down = weight(4 * WIDTH, WIDTH), weight(WIDTH, 4 * WIDTH)
        self.norm_q, self.norm_k = torch.rand(WIDTH, generator=generator), torch.rand(WIDTH, generator=generator)

    def forward(self, x, modulation, rope, scratch, where, pools, plan, prompt, prompt_plan):
        shift, scale, gate, shift2, scale2, gate2 = modulation.unbind(1)
        codes = quantize_rows(x, norm="layer", scale=scale, shift=shift, backend=BACKEND)
        qkv = linear(codes, self.qkv, dtype=x.dtype, backend=BACKEND)
        q = qkv_prologue(qkv, self.norm_q, self.norm_k, rope, scratch, where, backend=BACKEND)
        past, lse = paged_attention(q, [scratch, *pools], plan, backend=BACKEND)
        cross, cross_lse = paged_attention(q, [prompt], prompt_plan, backend=BACKEND)
        y, _ = merge_attention(past, lse, cross, cross_lse, backend=BACKEND)
        x = linear(y.flatten(1), self.out, gate=gate, residual=x, dtype=x.dtype, backend=BACKEND)
        codes = quantize_rows(x, norm="layer", scale=scale2, shift=shift2, backend=BACKEND)
        hidden = linear(codes, self.up, activation="gelu_tanh", dtype=x.dtype, backend=BACKEND)
        return linear(hidden, self.down, gate=gate2, residual=x, dtype=x.dtype, backend=BACKEND)


def inputs(frames: int) -> tuple:
    """frames of 10 tokens, each in a full page and one of 2 tokens, behind a past in two formats."""
    tokens, generator = 10 * frames, torch.Generator().manual_seed(frames)
    scratch = KVPages.empty("bf16", 2 * frames, HEADS, PAGE, D)
    where = PageList.of(range(2 * frames), [8, 2] * frames)
    pools, ids, lens = [], where.ids.tolist(), where.lens.tolist()
    for format in ("int8", "int4"):
        base = scratch.pages + sum(pool.pages for pool in pools)
        pool, past = filled_pool(format, [8, 2], HEADS, PAGE, D)
        ids, lens = [*ids, *(base + past.ids).tolist()], [*lens, 8, 2]
        pools.append(pool)
    prompt, words = filled_pool("bf16", [7], HEADS, PAGE, D)
    x, modulation = torch.randn(tokens, WIDTH, generator=generator), torch.randn(1, 6, WIDTH, generator=generator)
    plans = make_plan([(tokens, ids, lens)]), make_plan([(tokens, words.ids.tolist(), [7])])
    return x, modulation, rope_table(tokens, D), scratch, where, pools, plans[0], prompt, plans[1]


def test_a_block_is_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block = Block()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend=counter)
        for frames in (2, 3, 5, 7):
            plain, traced = inputs(frames), inputs(frames)
            want, got = block(*plain), compiled(*traced)
            assert torch.equal(got, want)
            assert torch.equal(traced[3].k, plain[3].k)  # written through the graph
    assert counter.frame_count == 2  # the second sizes are met with a graph for all
