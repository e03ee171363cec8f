"""Small models to quantize, and what their layers compute."""

import torch
from torch import nn

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(n=40, k=96, bias=True, dtype=torch.float32, seed=0):
    layer = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed + i) * k**-0.5)
    return layer.to(dtype).requires_grad_(False)


class Attention(nn.Module):
    """q, k and v of one input: three layers, as diffusers has them."""

    def __init__(self, width=48):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (layer_of(width, width, seed=i) for i in range(3))
        self.to_out = nn.ModuleList([layer_of(width, width, seed=3), nn.Dropout(0.0)])

    def forward(self, x, between=lambda x: None):
        q = self.to_q(x)
        between(x)
        k, v = self.to_k(x), self.to_v(x)
        y = torch.softmax(q @ k.mT / 7, -1) @ v
        for part in self.to_out:
            y = part(y)
        return y


class Block(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.attn, self.norm = Attention(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(layer_of(64, width, seed=4), nn.GELU(), layer_of(width, 64, seed=5))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.ffn(self.norm(x))


class Network(nn.Module):
    """Two blocks between a first and a last layer."""

    def __init__(self, width=48):
        super().__init__()
        self.embedding = layer_of(width, 16, seed=6)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.proj_out = layer_of(16, width, seed=7)

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def network():
    return Network().eval().requires_grad_(False)


def rounded(x, dtype, dim):
    """x as its codes have it, written down again: dim is what shares a scale, None for all of x. The division is in
    float32: half-precision weights lie on ties, which float64 would round another way."""
    y = x.float()
    amax = y.abs().amax() if dim is None else y.abs().amax(dim, keepdim=True)
    scale = amax.clamp(min=1e-12) / LARGEST[dtype]
    codes = y / scale
    return (codes.to(dtype) if dtype.is_floating_point else codes.round()).double() * scale.double()


def state_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model, state, types):
    assert [type(module) for module in model.modules()] == types
    for name, x in model.state_dict().items():
        assert x.dtype == state[name].dtype and x.is_meta == state[name].is_meta
        assert x.is_meta or torch.equal(x.nan_to_num(7e7), state[name].nan_to_num(7e7))


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
