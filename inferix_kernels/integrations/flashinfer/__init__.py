"""FlashInfer's wrappers of attention over paged and ragged keys and values, with its layouts, names and conventions
(as of flashinfer-python 0.7.4), over its users' caches where they lie and over KVPages of any format.

`plan` looks at indptr and last_page_len on the host, as FlashInfer's does; `run` reads nothing from the device. The
workspace buffer is taken, and gives the device; none is needed.

Example:
    >>> from inferix_kernels.integrations import flashinfer
    >>> cache = torch.randn(8, 2, 16, 2, 64).bfloat16()  # [pages, 2, page_size, KV heads, head_dim]
    >>> wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0, dtype=torch.uint8), "NHD")
    >>> indptr, indices, last = (torch.tensor(x).int() for x in ([0, 2, 3], [5, 0, 3], [4, 16]))
    >>> wrapper.plan(torch.tensor([0, 3, 7]).int(), indptr, indices, last, 4, 2, 64, 16, causal=True,
    ...              q_data_type=torch.bfloat16)
    >>> out, lse = wrapper.run(torch.randn(7, 4, 64).bfloat16(), cache, return_lse=True)  # lse: to base 2
    >>> list(out.shape), list(lse.shape)
    ([7, 4, 64], [7, 4])
"""

from .cascade import merge_state, merge_state_in_place, merge_states
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from .prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "append_paged_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "single_prefill_with_kv_cache",
]
