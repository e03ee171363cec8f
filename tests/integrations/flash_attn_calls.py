"""FlashAttention's functions of both versions, and good arguments for each."""

import torch

from inferix_kernels.integrations import flash_attn, flash_attn_interface

FUNCTIONS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (flash_attn, flash_attn_interface)
    for name in module.__all__
}


def given(name, **changes):
    """Good arguments of a function, with changes."""
    q, (k, v) = torch.randn(2, 4, 4, 32), torch.randn(2, 2, 8, 2, 32)
    arguments = {"q": q, "k": k, "v": v}
    if "varlen" in name:
        arguments = {key: x.flatten(0, 1) for key, x in arguments.items()}
        ends = torch.tensor([0, 1, 2], dtype=torch.int32)
        arguments |= {"cu_seqlens_q": ends * 4, "cu_seqlens_k": ends * 8, "max_seqlen_q": 4, "max_seqlen_k": 8}
    elif "kvcache" in name:
        arguments = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": int32(5, 6)}
    return arguments | changes


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def appended(**changes):
    table = torch.rand(8, 16)
    return {"k": torch.randn(2, 2, 2, 32), "v": torch.randn(2, 2, 2, 32), "rotary_cos": table, "rotary_sin": table,
            } | changes  # fmt: skip


def paged(table, **changes):
    return {"k_cache": torch.randn(6, 4, 2, 32), "v_cache": torch.randn(6, 4, 2, 32), table: int32([0, 1], [2, 3]),
            } | changes  # fmt: skip
