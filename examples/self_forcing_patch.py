"""A Wan-family repository over pages, its code unchanged: `python examples/self_forcing_patch.py`.

In a checkout of Self-Forcing the module is wan.modules.causal_model. Here a few lines with its contract stand for it.
"""

import types

import torch
from torch import nn

from inferix_kernels.integrations import self_forcing

LAYERS, HEADS, WIDTH, FRAME, WINDOW, SINK = 2, 4, 64, 64, 12, 3  # a frame is 64 tokens; the window, 12 frames


def causal_rope_apply(x, grid_sizes, freqs, start_frame=0):
    return x  # the real one turns each pair of channels by the token's place


class CausalWanSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.local_attn_size, self.sink_size = HEADS, WIDTH, WINDOW, SINK
        for name in "qkvo":
            setattr(self, name, nn.Linear(HEADS * WIDTH, HEADS * WIDTH))
        self.norm_q, self.norm_k = nn.RMSNorm(HEADS * WIDTH), nn.RMSNorm(HEADS * WIDTH)

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (each.unflatten(-1, (HEADS, WIDTH)) for each in (q, k, v))
        end = current_start + x.shape[1]
        made, held = kv_cache["global_end_index"].item(), kv_cache["local_end_index"].item()
        if end > made and held + x.shape[1] > WINDOW * FRAME:  # roll what is behind the sink
            sink, over = SINK * FRAME, held + x.shape[1] - WINDOW * FRAME
            for name in "kv":
                kv_cache[name][:, sink : held - over] = kv_cache[name][:, sink + over : held].clone()
            held -= over
        last = held + end - made
        new = slice(last - x.shape[1], last)
        kv_cache["k"][:, new], kv_cache["v"][:, new] = k, v
        kv_cache["global_end_index"].fill_(end), kv_cache["local_end_index"].fill_(last)
        q, k, v = (each.transpose(1, 2) for each in (q, kv_cache["k"][:, :last], kv_cache["v"][:, :last]))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CausalWanModel(nn.ModuleList):
    def _forward_inference(self, x, kv_cache, current_start):
        for block, cache in zip(self, kv_cache):
            x = x + block(x, None, torch.tensor([[3, 8, 8]]), None, None, cache, current_start)
        return x


def rollout(model):
    """Six blocks of three frames, each in two noisy passes and a clean one."""
    ends, shape = ("global_end_index", "local_end_index"), (1, WINDOW * FRAME, HEADS, WIDTH)
    cache = [{k: torch.zeros(shape) for k in "kv"} | {k: torch.tensor([0]) for k in ends} for _ in range(LAYERS)]
    noise = torch.randn(6, 3, 1, 3 * FRAME, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    made = [model._forward_inference(x, cache, 3 * FRAME * i) for i, block in enumerate(noise) for x in block]
    return torch.stack(made), cache


@torch.no_grad()
def main():
    module = types.ModuleType("causal_model")
    vars(module).update({kind.__name__: kind for kind in (CausalWanSelfAttention, CausalWanModel, causal_rope_apply)})
    torch.manual_seed(0)
    model = CausalWanModel(CausalWanSelfAttention() for _ in range(LAYERS))
    dense, cache = rollout(model)
    print(f"dense fp32:  {sum(x[side].nbytes for x in cache for side in 'kv'):>10,} bytes")
    for format in ("fp32", "bf16", "int8"):
        patched = self_forcing.patch(module, format)
        paged, cache = rollout(model)
        size = sum(x[side].nbytes for x in cache for side in "kv")
        print(f"{format} pages:  {size:>10,} bytes, {(paged - dense).abs().max():.1e} away at most")
        self_forcing.unpatch()
    print(f"patched was {patched}")


if __name__ == "__main__":
    main()
