"""Paged attention in a video transformer of your own: `python examples/attention_in_your_model.py`.

A causal video transformer attends to everything in a block, and to all blocks before it. Here one network runs twice:
with dense attention over the whole video under a block-causal mask, and block by block over a KVStore. All that the
network must do for it is to take a function `attention(layer, q, k, v)`. The results are compared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix_kernels import KVStore, Policy, paged_attention

LAYERS, HEADS, HEAD_DIM, DIM = 4, 4, 64, 256
FRAME_TOKENS, BLOCK_FRAMES, BLOCKS = 60, 3, 5  # a frame need not fill whole pages


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * HEADS * HEAD_DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, i: int, x: Tensor, attention) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)  # [T, heads, head_dim] each
        x = x + self.out(attention(i, q, k, v).flatten(-2))  # rotate q and k before, if your model does
        return x + self.mlp(x)


def run(layers: nn.ModuleList, x: Tensor, attention) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(i, x, attention)
    return x


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All blocks at once: a token sees its own block and those before it."""
    block = torch.arange(len(q)) // (BLOCK_FRAMES * FRAME_TOKENS)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=block[:, None] >= block).transpose(0, 1)


def paged(layers: nn.ModuleList, x: Tensor, format: str) -> tuple[Tensor, int]:
    """One block after the other, and the bytes that a frame of the past takes."""
    policy = Policy(format=format)  # keeps all frames; window= and sink= forget some
    store = KVStore(
        layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, frame_tokens=FRAME_TOKENS, block_frames=BLOCK_FRAMES,
        pools=policy.capacity(BLOCKS * BLOCK_FRAMES),
    )  # fmt: skip
    table = store.open(policy)
    results = []
    for tokens in x.split(BLOCK_FRAMES * FRAME_TOKENS):
        block = table.open_block(BLOCK_FRAMES)
        clean = table.plan([block], commit=block)  # a denoising step would plan without commit

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, clean=clean) -> Tensor:
            clean.append(layer, k, v)  # into pages; from there into those of the past, quantized
            return paged_attention(q, store.layers[layer], clean.plan)[0]

        results.append(run(layers, tokens, attention))
        table.seal(block)
    return torch.cat(results), store.nbytes[format] // (BLOCKS * BLOCK_FRAMES)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    x = torch.randn(BLOCKS * BLOCK_FRAMES * FRAME_TOKENS, DIM)
    want = run(layers, x, dense)
    print(f"{'format':>6}  {'bytes a frame':>13}  difference from dense attention")
    for format in ("fp32", "int8", "int4"):
        got, size = paged(layers, x, format)
        print(f"{format:>6}  {size:>13,}  {(got - want).norm() / want.norm():.1e}")


if __name__ == "__main__":
    main()
