"""FlashInfer's calls over our kernels, on any machine: `python examples/flashinfer_drop_in.py`.

Three videos grow by a block, each at its own length, in one paged cache. New keys and values are appended to it in
place and its pages are attended to where they lie. Then the same tokens are held in 8 bits: one argument changes.
"""

import torch
import torch.nn.functional as F

from inferix_kernels import KVPages, PageList, kv_append
from inferix_kernels.integrations import flashinfer  # instead of `import flashinfer`

HEADS, KV_HEADS, WIDTH, PAGE, BLOCK = 12, 4, 128, 64, 96
LENGTHS = [700, 192, 333]  # tokens of each video, with the new block


def main() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([-(-length // PAGE) for length in LENGTHS])
    indptr = F.pad(counts.cumsum(0), (1, 0)).int()
    indices = torch.randperm(int(indptr[-1])).int()
    last_page_len = torch.tensor([(length - 1) % PAGE + 1 for length in LENGTHS]).int()
    cache = torch.zeros(int(indptr[-1]), 2, PAGE, KV_HEADS, WIDTH, dtype=torch.bfloat16)
    k, v = (torch.randn(sum(LENGTHS), KV_HEADS, WIDTH).bfloat16() for _ in range(2))

    def append(part: slice) -> None:
        """These tokens of every video."""
        rows = [torch.arange(length)[part] for length in LENGTHS]
        positions, batch = torch.cat(rows), torch.arange(3).repeat_interleave(torch.tensor([len(x) for x in rows]))
        at = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)[batch] + positions
        flashinfer.append_paged_kv_cache(
            k[at], v[at], batch, positions, cache, indices, indptr, last_page_len, kv_layout="NHD"
        )

    append(slice(None, -BLOCK))  # the past
    append(slice(-BLOCK, None))  # the new block, whose queries see all of it: nothing is causal within a block

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8), "NHD")
    shape = HEADS, KV_HEADS, WIDTH, PAGE
    qo_indptr = torch.arange(4) * BLOCK
    wrapper.plan(qo_indptr, indptr, indices, last_page_len, *shape, q_data_type=torch.bfloat16)
    q = torch.randn(3 * BLOCK, HEADS, WIDTH).bfloat16()
    out = wrapper.run(q, cache)

    dense = [
        F.scaled_dot_product_attention(*(x.float().transpose(0, 1) for x in one), enable_gqa=True).transpose(0, 1)
        for one in zip(q.split(BLOCK), k.split(LENGTHS), v.split(LENGTHS))
    ]
    exact = torch.cat(dense)

    pages = KVPages.empty("int8", len(cache), KV_HEADS, PAGE, WIDTH)
    lens = [min(PAGE, length - first) for length in LENGTHS for first in range(0, length, PAGE)]
    kv_append(k, v, pages, PageList.of(indices.tolist(), lens))
    wrapper.plan(qo_indptr, indptr, indices, last_page_len, *shape, q_data_type=torch.bfloat16, kv_data_type=torch.int8)
    small = wrapper.run(q, pages)

    for name, result, nbytes in (("bf16 cache", out, cache.nbytes), ("int8 pages", small, pages.nbytes)):
        error = ((result.float() - exact).norm() / exact.norm()).item()
        print(f"{name}: {nbytes:>9,} bytes, {error:.2%} from dense attention")


if __name__ == "__main__":
    main()
