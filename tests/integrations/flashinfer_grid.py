"""FlashInfer's grids of prefill, and what is made of a case of theirs: a paged cache, its lists, dense attention."""

import itertools
import math
from typing import NamedTuple

import torch

from tests.integrations.masked import attention, window

# Theirs, crossed. 512 tokens with 1 token a page, and so on: the sizes of a batch are the same for all its sequences.
GRID = {
    "batch": (12, 17, 128),
    "kv_len": (54, 97, 512, 2048),
    "qo_len": (37, 17, 127, 577),
    "page_size": (1, 5, 16),
    "heads": (4, 32),
    "head_dim": (64, 128, 256),
    "causal": (False, True),
    "return_lse": (False, True),
}
KV_HEADS = 4
MOST = 3e8  # multiplications of a case: what is larger is left out for its size
EVERY = 31  # of the rest every so manieth runs: prime, so that all values of all parameters come up


class Case(NamedTuple):
    batch: int
    kv_len: int
    qo_len: int
    page_size: int
    heads: int
    head_dim: int
    causal: bool
    return_lse: bool

    @property
    def size(self):
        return 2 * math.prod((self.batch, self.kv_len, self.qo_len, self.heads, self.head_dim))

    @property
    def name(self):
        return "-".join(f"{name}{int(value)}" for name, value in self._asdict().items())


def cases():
    """(all but causal ones of more queries than keys, as theirs; those that are small enough; those that run)."""
    there = [Case(*values) for values in itertools.product(*GRID.values())]
    there = [case for case in there if not (case.causal and case.qo_len > case.kv_len)]
    small = [case for case in there if case.size <= MOST]
    return there, small, small[::EVERY]


class Batch(NamedTuple):
    q: torch.Tensor  # [T, Hq, D]
    cache: torch.Tensor  # [P, 2, page_size, H, D]
    qo_indptr: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    k: list  # of each sequence, [L, H, D]
    v: list

    @property
    def pages(self):
        return self.indptr, self.indices, self.last_page_len

    def wanted(self, left=-1, right=-1, **options):
        """Dense attention of all sequences: out [T, Hq, D], natural lse [T, Hq]."""
        queries = self.q.split(self.qo_indptr.diff().tolist())
        results = [
            attention(q, k, v, window(len(q), len(k), left, right), **options)
            for q, k, v in zip(queries, self.k, self.v)
        ]
        return tuple(torch.cat(x) for x in zip(*results))


def batch(qo_lens, kv_lens, page_size, heads, head_dim, kv_heads=KV_HEADS, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = [math.ceil(length / page_size) for length in kv_lens]
    total = sum(counts) + 3  # the pages of no sequence hold NaN
    cache = torch.full((total, 2, page_size, kv_heads, head_dim), math.nan, dtype=dtype)
    order = torch.randperm(total, generator=generator)[: sum(counts)].int()
    k, v = [], []
    for length, ids in zip(kv_lens, order.split(counts)):
        tokens = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
        slots = torch.arange(length)
        for side in range(2):
            cache[ids[slots // page_size].long(), side, slots % page_size] = tokens[side]
        k.append(tokens[0])
        v.append(tokens[1])
    q = torch.randn(sum(qo_lens), heads, head_dim, generator=generator).to(dtype)
    indptr, qo_indptr = (torch.tensor([0, *itertools.accumulate(x)]).int() for x in (counts, qo_lens))
    last = torch.tensor([(length - 1) % page_size + 1 if length else 0 for length in kv_lens]).int()
    return Batch(q, cache, qo_indptr, indptr, order, last, k, v)


WORKSPACE = torch.empty(0, dtype=torch.uint8)
