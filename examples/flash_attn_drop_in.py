"""Code that was written for flash-attn, where flash-attn does not run: `python examples/flash_attn_drop_in.py`.

Three conversations go on token by token over a paged cache, rotated, causal, with grouped heads: a server's inner loop
as it calls flash_attn. Of that code the import below is the only line that changed. At the end each conversation is
computed once more by torch, whole and without a cache, and compared.
"""

import torch
from torch import Tensor
from torch.nn import functional

from inferix_kernels.integrations.flash_attn import flash_attn_with_kvcache  # was: from flash_attn

HEADS, KV_HEADS, HEAD_DIM, PAGE = 8, 2, 64, 256
PROMPTS, STEPS = [700, 31, 250], 20
DTYPE = torch.bfloat16


def rotary_table(positions: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(positions)[:, None] * frequencies
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D] from position 0 on, pairs side by side."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[: x.shape[1], None].float() for table in (cos, sin))
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence, [1, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    cos, sin = rotary_table(4 * PAGE)
    # What a projection would give: q, k and v of every token that will come, conversation by conversation.
    tokens = [torch.randn(1, n + STEPS, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPE) for n in PROMPTS]
    parts = [x.split((HEADS, KV_HEADS, KV_HEADS), 2) for x in tokens]

    k_cache, v_cache = torch.zeros(2, 12, PAGE, KV_HEADS, HEAD_DIM, dtype=DTYPE)  # 12 pages for all
    table = torch.randperm(12, dtype=torch.int32).view(3, 4)  # of which each conversation has four, anywhere
    cached = torch.zeros(3, dtype=torch.int32)
    rotary = {"rotary_cos": cos, "rotary_sin": sin}
    results: list[list[Tensor]] = [[], [], []]

    for i, (q, k, v) in enumerate(parts):  # prompts, of different lengths
        n, mine = PROMPTS[i], slice(i, i + 1)
        results[i].append(flash_attn_with_kvcache(
            q[:, :n], k_cache, v_cache, k[:, :n], v[:, :n], **rotary, cache_seqlens=cached[mine],
            block_table=table[mine], causal=True,
        ))  # fmt: skip
        cached[i] = n
    for _ in range(STEPS):  # then one token of each at a time
        q, k, v = (torch.cat([part[x][:, n : n + 1] for part, n in zip(parts, cached.tolist())]) for x in range(3))
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, **rotary, cache_seqlens=cached, block_table=table, causal=True
        )
        for i in range(3):
            results[i].append(out[i : i + 1])
        cached += 1

    print(f"a cache of {2 * k_cache.nbytes:,} bytes, written and read where it lies")
    print(" tokens  pages  largest difference from torch, whole")
    for i, (q, k, v) in enumerate(parts):
        whole = in_torch(rotate(q, cos, sin), rotate(k, cos, sin), v)
        difference = (torch.cat(results[i], 1).float() - whole.float()).abs().max()
        print(f"{int(cached[i]):>7}  {-(-int(cached[i]) // PAGE):>5}  {difference:.1e}")


if __name__ == "__main__":
    main()
