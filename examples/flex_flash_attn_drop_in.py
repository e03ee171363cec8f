"""MAGI-1's attention call without MagiAttention, on any machine: `python examples/flex_flash_attn_drop_in.py`.

MAGI-1 denoises four chunks of video at once, each at its own noise level. A chunk sees itself and some before it: a
range of rows of a buffer that holds keys and values side by side. Its code calls flex_flash_attn_func with arguments
that MagiAttention has dropped since (its issue 193); here both forms of the call are taken.
"""

import torch
import torch.nn.functional as F

from inferix_kernels.integrations.flex_flash_attn import flex_flash_attn_func  # instead of from magi_attention...

CHUNK, PAST, FLYING = 240, 3, 4  # tokens of a chunk; chunks that are clean, and that are being denoised
HEADS, KV_HEADS, WIDTH = 6, 2, 128  # 24, 8 and 128 in the 4.5B model


def main() -> None:
    torch.manual_seed(0)
    buffer = torch.randn((PAST + FLYING) * CHUNK, KV_HEADS, 2 * WIDTH).bfloat16()
    key, value = buffer.chunk(2, -1)  # views; MAGI-1 copies them here with .contiguous(), which is not needed
    query = torch.randn(FLYING * CHUNK, HEADS, WIDTH).bfloat16()

    # The cleanest chunk sees 2 chunks, with itself, the noisiest 5.
    q_ranges = [[CHUNK * i, CHUNK * (i + 1)] for i in range(FLYING)]
    k_ranges = [[CHUNK * (PAST + i + 1 - seen), CHUNK * (PAST + i + 1)] for i, seen in enumerate((2, 3, 4, 5))]

    out, _ = flex_flash_attn_func(
        query,
        key,
        value,
        torch.tensor(q_ranges, dtype=torch.int32),
        torch.tensor(k_ranges, dtype=torch.int32),
        max_seqlen_q=CHUNK,
        max_seqlen_k=5 * CHUNK,
        softmax_scale=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        disable_fwd_atomic_reduction=True,
    )

    dense = [
        F.scaled_dot_product_attention(*(x.float().transpose(0, 1) for x in one), enable_gqa=True).transpose(0, 1)
        for one in ((query[a:b], key[c:d], value[c:d]) for (a, b), (c, d) in zip(q_ranges, k_ranges))
    ]
    error = ((out.float() - torch.cat(dense)).norm() / torch.cat(dense).norm()).item()
    print(f"{FLYING} chunks over {buffer.nbytes:,} bytes of keys and values that stay where they lie")
    print(f"one call is {error:.2%} from a loop of dense attention over the ranges")


if __name__ == "__main__":
    main()
