"""FlashAttention's kernels under our op, over our pages: `python examples/flash_attn_backend.py`.

A backend that is asked for by name runs or says why not; "auto" never takes this one. Where it runs, its result is
compared with ours.
"""

import torch

from inferix_kernels import KVPages, PageList, Unsupported, kv_append, make_plan, paged_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE, TOKENS = 8, 2, 64, 256, 700


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = KVPages.empty("bf16", pages=4, heads=KV_HEADS, page_size=PAGE, head_dim=HEAD_DIM, device=device)
    ids, lens = [3, 0, 2], [PAGE, PAGE, TOKENS - 2 * PAGE]
    k, v = torch.randn(2, TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    kv_append(k, v, pages, PageList.of(ids, lens, device))
    q = torch.randn(100, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    plan = make_plan([(100, ids, lens)], device)
    ours, _ = paged_attention(q, [pages], plan)
    try:
        theirs, _ = paged_attention(q, [pages], plan, backend="flash-attn")
    except Unsupported as error:
        print(f"flash-attn does not run here: {error}")
    else:
        print(f"largest difference from flash-attn: {(ours.float() - theirs.float()).abs().max():.1e}")


if __name__ == "__main__":
    main()
