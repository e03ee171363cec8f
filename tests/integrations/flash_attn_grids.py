"""The grids of cases on which FlashAttention 2 and 3 test flash_attn_with_kvcache and flash_attn_func, and their pass
rules, over our functions of these names.

`python -m tests.integrations.flash_attn_grids --all` runs every case (days on two cores; --sample N: so many of each
grid, chosen by --seed). The tests run a sample without SLOW sizes.

Left out, as they are refused by name: dropout; in 3 also 8-bit tensors, attention_chunk, qv and values of another width
than keys.
"""

import argparse
import itertools
import math
import random

import torch

from inferix_kernels import compiled
from inferix_kernels.integrations import flash_attn, flash_attn_interface
from tests.integrations.dense import attention, rotate, visible

HEADS = 6
FLAGS = [False, True]
SIZES = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128)]
KVCACHE = {
    "kv_heads": [6, 1, 3],
    "new_kv": FLAGS,
    "causal": FLAGS,
    "local": FLAGS,
    "seqlen_new_eq_seqlen_q": FLAGS,
    "rotary_interleaved": FLAGS,
    "rotary_fraction": [0.0, 0.5, 1.0],
    "leftpad": FLAGS,
    "batch_idx": FLAGS,
}
FA2_KVCACHE = KVCACHE | {
    "library": ["fa2"],
    "alibi": FLAGS,
    "num_splits": [1, 0],
    "page": [None, 256],
    "d": [32, 59, 64, 80, 128, 256],
    "sizes": [*SIZES, (1, 131072), (16, 131072)],
}
FA3_KVCACHE = KVCACHE | {
    "library": ["fa3"],
    "num_splits": [1, 3, 0],
    "page": [None, 1, 4, 128],
    "varlen_q": FLAGS,
    "d": [128],
    "sizes": [*SIZES, (256, 512), (2048, 3577)],
}
FA2_OUTPUT = {
    "kv_heads": [6, 1, 2],
    "causal": FLAGS,
    "local": FLAGS,
    "d": [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256],
    "sizes": [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024),
              (1024, 1023), (2048, 2048)],
    "softcap": [0.0, 50.0],
    "dtype": [torch.float16, torch.bfloat16],
    "deterministic": FLAGS,
}  # fmt: skip
GRIDS = {"FA2_KVCACHE": FA2_KVCACHE, "FA3_KVCACHE": FA3_KVCACHE, "FA2_OUTPUT": FA2_OUTPUT}
# Their dense float64 takes too long for the tests.
SLOW = {(64, 2048), (16, 20000), (1, 131072), (16, 131072), (256, 512), (512, 256), (2048, 3577), (1024, 1024),
        (1023, 1024), (1024, 1023), (2048, 2048)}  # fmt: skip


def holds(case):
    """Whether the libraries' tests run such a case."""
    if "new_kv" not in case:
        return True
    (queries, keys), page = case["sizes"], case["page"]
    if case["library"] == "fa2" and page and (case["leftpad"] or case["batch_idx"]):
        return False
    if case["library"] == "fa3" and ((page and keys % page) or (case["causal"] and case["local"])):
        return False
    return not (queries > keys and case["new_kv"]) and (case["new_kv"] or not case["rotary_fraction"])


def every(grid):
    """All cases."""
    cases = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return (case for case in cases if holds(case))


def sample(grid, count, seed):
    """So many different ones, of quick sizes, with the values of each axis in turn."""
    choose, found = random.Random(seed), {}

    def in_turn(values):
        while True:
            yield from choose.sample(values, len(values))

    axes = {axis: in_turn([x for x in values if x not in SLOW]) for axis, values in grid.items()}
    while len(found) < count:
        case = {axis: next(values) for axis, values in axes.items()}
        if holds(case):
            found[str(case)] = case
    return list(found.values())


def run(name, case, seed=0):
    """Raises AssertionError unless the case passes by its library's rule."""
    torch.manual_seed(seed)
    (output if name == "FA2_OUTPUT" else kvcache)(**case)


NORMAL = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0))  # a prime: repeated, no two rows are alike


def normal(*shape):
    """Normal numbers from a random place in NORMAL on: new ones would take most of a case's time."""
    count, begin = math.prod(shape), int(torch.randint(len(NORMAL), ()))
    return NORMAL.roll(-begin).repeat(count // len(NORMAL) + 1)[:count].view(shape)


def window_of(local, keys):
    return tuple(torch.randint(0, keys, (2,)).tolist()) if local else (-1, -1)


def output(kv_heads, causal, local, d, sizes, softcap, dtype, deterministic):
    (queries, keys), batch, heads = sizes, 4, 6 if softcap == 0 else 4
    kv_heads = heads if kv_heads == 6 else kv_heads
    window = window_of(local, keys)
    q = (normal(batch, queries, heads, d) * (softcap or 1)).to(dtype)  # scores reach the cap
    k, v = normal(2, batch, keys, kv_heads, d).to(dtype)
    options = {"causal": causal, "window_size": window, "softcap": softcap, "deterministic": deterministic}
    out, lse, dropped = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    ends, lengths = torch.tensor([keys] * batch), torch.tensor([queries] * batch)
    mask = visible(queries, keys, ends * 0, ends, lengths, (window[0], 0) if causal else window)
    want, want_lse = attention(q, k, v, mask, softcap=softcap)
    plain, _ = attention(q, k, v, mask, softcap=softcap, rounded=dtype)
    close(out, want, plain, 2)
    seen = want_lse > -torch.inf
    assert dropped.numel() == 0 and (lse[~seen] == torch.inf).all()
    # Where products have bfloat16 operands q is rounded once more, after it was scaled: 2^-9 of a score.
    step, share = (4e-3, 2**-9) if compiled.Isa.avx512_bf16 <= compiled.ISA else (1e-3, 1e-5)
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=step, rtol=share)


def kvcache(library, sizes, d, page, kv_heads, new_kv, causal, local, seqlen_new_eq_seqlen_q, rotary_interleaved,
            rotary_fraction, leftpad, batch_idx, num_splits, varlen_q=False, alibi=False):  # fmt: skip
    fa2 = library == "fa2"
    (queries, keys), batch, dtype = sizes, 2 if fa2 else 5, torch.float16 if fa2 else torch.bfloat16
    rows, rotary = batch * (1 + batch_idx), int(rotary_fraction * d) // 16 * 16
    window = window_of(local, keys)
    q = normal(batch, queries, HEADS, d).to(dtype)
    count = queries if seqlen_new_eq_seqlen_q else int(torch.randint(1, queries + 1, ()))
    k_cache, v_cache, table, read = make_cache(rows, keys, kv_heads, d, page, dtype)
    least = queries if (causal or local) and rotary else count
    seqlens = torch.randint(*((0, keys - least + 1) if new_kv else (1, keys + 1)), (batch,), dtype=torch.int32)
    begins = (torch.rand(batch) * seqlens * leftpad).int()
    index = torch.randperm(rows, dtype=torch.int32)[:batch] if batch_idx else torch.arange(batch, dtype=torch.int32)
    q_lens, new_lens = (some_of(most, batch, varlen_q) for most in (queries, count))
    options = {"cache_seqlens": seqlens, "causal": causal, "window_size": window, "num_splits": num_splits,
               "cache_leftpad": begins if leftpad else None, "cache_batch_idx": index if batch_idx else None,
               "rotary_interleaved": rotary_interleaved,
               "block_table" if fa2 else "page_table": table}  # fmt: skip
    slopes = torch.rand(*((batch,) if int(seqlens[0]) % 2 else ()), HEADS) * 0.3
    if alibi:
        options["alibi_slopes"] = slopes
    k_want, v_want = (x[index.long()] for x in read())
    turned, ends = q, seqlens
    if new_kv:
        k, v = normal(2, batch, count, kv_heads, d).to(dtype)
        ends = seqlens + new_lens
        turned, turned_k = q, k
        if rotary:
            angles = torch.rand(max(keys, k_cache.shape[0] * (page or 0)), rotary // 2) * 2 * torch.pi
            cos, sin = options["rotary_cos"], options["rotary_sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
            at = seqlens[:, None] + torch.arange(queries) * (causal or local)
            turned = rotate(q, cos, sin, at.clamp(max=len(cos) - 1), rotary_interleaved)
            turned_k = rotate(k, cos, sin, seqlens[:, None] + torch.arange(count), rotary_interleaved)
        for b in range(batch):
            put = slice(int(seqlens[b]), int(ends[b]))
            k_want[b, put], v_want[b, put] = turned_k[b, : new_lens[b]], v[b, : new_lens[b]]
        options |= {"k": k, "v": v}
    if varlen_q:
        options |= pack(options, q_lens, new_lens, queries)
        q = packed(q, q_lens)
    function = (flash_attn if fa2 else flash_attn_interface).flash_attn_with_kvcache
    out = function(q, k_cache, v_cache, **options)
    if varlen_q:
        out = unpacked(out, q_lens, queries)
    k_got, v_got = (x[index.long()] for x in read())
    torch.testing.assert_close(k_got, k_want, atol=1e-3, rtol=1e-3 if rotary else 0)
    assert torch.equal(v_got, v_want)
    mask = visible(queries, keys, begins, ends, q_lens, (window[0], 0) if causal else window)
    bias = -slopes.double().view(-1, HEADS, 1, 1) * away(queries, keys, ends)[:, None] if alibi else 0.0
    want, _ = attention(turned, k_want, v_want, mask, bias=bias)
    plain, _ = attention(turned, k_want, v_want, mask, rounded=dtype, bias=bias)
    close(out, want, plain, (5 if alibi else 3) if fa2 else 2, None if fa2 else 1.5)


def away(queries, keys, ends):
    """[B, Sq, Sk]: the distance of each key from each query, the last one at the last key."""
    return (torch.arange(keys) - (torch.arange(queries)[:, None] + ends.view(-1, 1, 1) - queries)).abs()


def make_cache(rows, keys, kv_heads, d, page, dtype):
    """k_cache, v_cache, the table or None, and a function that reads them as copies [rows, keys, H, D]."""
    if page is None:
        k, v = normal(2, rows, keys, kv_heads, d).to(dtype)
        return k, v, None, lambda: (k.clone(), v.clone())
    each = -(-keys // page)
    k, v = torch.full((2, 3 * rows * each, page, kv_heads, d), torch.nan, dtype=dtype)  # who reads another page sees it
    table = torch.randperm(len(k), dtype=torch.int32)[: rows * each].view(rows, each)
    for x in (k, v):
        x[table.flatten().long()] = normal(rows * each, page, kv_heads, d).to(dtype)
    return k, v, table, lambda: tuple(x[table.long()].flatten(1, 2)[:, :keys] for x in (k, v))


def some_of(most, batch, any_length):
    return torch.randint(1, most + 1, (batch,)) if any_length else torch.full((batch,), most)


def packed(x, lens):
    return torch.cat([row[:length] for row, length in zip(x, lens, strict=True)])


def unpacked(x, lens, longest):
    rows = x.split(lens.tolist())
    return torch.stack([torch.cat((row, row.new_zeros(longest - len(row), *row.shape[1:]))) for row in rows])


def pack(options, q_lens, new_lens, queries):
    ends = [torch.cat((lens[:0].new_zeros(1), lens.cumsum(0))).int() for lens in (q_lens, new_lens)]
    given = {name: packed(options[name], new_lens) for name in ("k", "v") if name in options}
    given |= {"cu_seqlens_k_new": ends[1]} if given else {}
    return given | {"cu_seqlens_q": ends[0], "max_seqlen_q": queries}


def close(out, want, plain, largest, mean=None):
    """Errors at most so many times those of plain torch in the same precision."""
    errors, fair = ((x.double() - want).abs() for x in (out, plain))
    assert errors.max() <= largest * fair.max() + 1e-5, (errors.max().item(), fair.max().item())
    assert mean is None or errors.mean() <= mean * fair.mean(), (errors.mean().item(), fair.mean().item())


def main():
    parser = argparse.ArgumentParser("python -m tests.integrations.flash_attn_grids")
    parser.add_argument("--all", action="store_true", help="every case of every grid")
    parser.add_argument("--sample", type=int, default=150, metavar="N", help="so many cases of each grid")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for name, grid in GRIDS.items():
        done = 0
        for case in every(grid) if chosen.all else sample(grid, chosen.sample, chosen.seed):
            try:
                run(name, case, chosen.seed)
            except Exception as error:
                raise SystemExit(f"{name}: {case}: {error}") from error
            done += 1
        print(f"{name}: {done} cases passed", flush=True)


if __name__ == "__main__":
    main()
