"""The tiny world model: a diffusion transformer in the manner of Wan, small enough for two CPU cores.

It predicts the clean block from a noisy one (x0 prediction of flow matching, x_t = (1 - t) x_0 + t noise),
given the blocks before it through the KV cache, one action per frame, and a prompt of three tokens.
A block is 3 frames of 8 x 8 tokens; a token is one 12 x 12 patch of pixels: there is no VAE.

The model does not know how attention is carried out: `forward` is handed an `attend` function. Training gives
one that is dense over a doubled sequence, the decode loop one that writes pages and reads a page list.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix_kernels import profile
from inferix_kernels.distributed.tokens import WholeFrames
from inferix_kernels.quantize import Residual, linear_input, linear_output

from .simulator import ACTIONS, GRID, PLACES, TILE, TIMES

# (layer index, packed q|k|v [B, S, L, 3 * heads * head_dim], norm_q, norm_k) -> [B, S, L, heads * head_dim], or
# None when the keys and values were all that was wanted: nothing after them is computed.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes of the model; saved next to its weights."""

    dim: int = 128
    layers: int = 6
    heads: int = 4
    head_dim: int = 64
    ffn: int = 512
    block_frames: int = 3
    eps: float = 1e-6

    patch: int = TILE * TILE * 3  # values per token
    grid: int = GRID  # tokens along a side of a frame

    @property
    def frame_tokens(self) -> int:
        return self.grid * self.grid

    @property
    def block_tokens(self) -> int:
        return self.block_frames * self.frame_tokens


def patchify(frames: Tensor, grid: int = GRID) -> Tensor:
    """[..., F, side, side, 3] -> [..., F * grid * grid, patch], rows before columns."""
    *lead, n, side, _, channels = frames.shape
    tile = side // grid
    x = frames.reshape(*lead, n, grid, tile, grid, tile, channels).transpose(-4, -3)
    return x.reshape(*lead, n * grid * grid, tile * tile * channels)


def unpatchify(tokens: Tensor, grid: int = GRID) -> Tensor:
    """[..., F * grid * grid, patch] -> [..., F, side, side, 3]."""
    *lead, length, patch = tokens.shape
    tile = math.isqrt(patch // 3)
    x = tokens.reshape(*lead, length // grid**2, grid, grid, tile, tile, 3).transpose(-4, -3)
    return x.reshape(*lead, length // grid**2, grid * tile, grid * tile, 3)


def rope_angles(config: TinyConfig, frames: Tensor) -> Tensor:
    """Angle of each channel pair: frames [...] (global frame indices) -> [..., frame_tokens, head_dim / 2] float64.

    Pairs are split over (time, row, column) as Wan splits them. The bases fit a grid of 8 x 8 and a window of a
    few blocks: Wan's base of 10,000 would leave neighbouring tiles almost the same angle.
    """
    pairs = config.head_dim // 2
    spatial = pairs // 3
    temporal = pairs - 2 * spatial
    time = 1.5 * 100.0 ** (-torch.arange(temporal, dtype=torch.float64) / temporal)
    place = 2.5 * 16.0 ** (-torch.arange(spatial, dtype=torch.float64) / spatial)
    side = torch.arange(config.grid, dtype=torch.float64)[:, None] * place
    shape = (*frames.shape, config.grid, config.grid)
    angles = [
        (frames.double()[..., None] * time)[..., None, None, :].expand(*shape, temporal),
        side[:, None].expand(*shape, spatial),
        side.expand(*shape, spatial),
    ]
    return torch.cat(angles, -1).flatten(-3, -2)


def few_step_times(steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels of a few-step sampler: t = s u / (1 + (s - 1) u) for u = 1, 1 - 1/steps, ..., 1/steps."""
    levels = (1 - i / steps for i in range(steps))
    return tuple(shift * u / (1 + (shift - 1) * u) for u in levels)


class CrossCache(NamedTuple):
    """What a layer's cross-attention needs of the prompts of B x S blocks, computed once per prompt.

    Attributes:
        keys, values: [B, S, words, heads, dim], with the projections of q and of the output multiplied into them.
        biases: [B, S, words, heads], of the scores.
    """

    keys: Tensor
    biases: Tensor
    values: Tensor


def affine(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [K, N], bias [N]) of a layer y = x @ weight + bias for x [..., K] like this one, whatever it keeps."""
    width = like.shape[-1]
    made = layer(torch.cat([torch.eye(width), torch.zeros(1, width)]).to(like))
    return made[:-1] - made[-1], made[-1]


class Layer(nn.Module):
    """Self-attention over the cache, cross-attention to the prompt, feed-forward; adaLN per frame."""

    def __init__(self, config: TinyConfig):
        super().__init__()
        dim, inner = config.dim, config.heads * config.head_dim
        self.heads, self.eps = config.heads, config.eps
        self.qkv = nn.Linear(dim, 3 * inner)
        self.norm_q = nn.Parameter(torch.full((inner,), 1.4))  # RMS norm over all heads, as in Wan
        self.norm_k = nn.Parameter(torch.full((inner,), 1.4))
        self.out = nn.Linear(inner, dim)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_q = nn.Linear(dim, dim)
        self.cross_kv = nn.Linear(dim, 2 * dim)
        self.cross_out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, config.ffn), nn.Linear(config.ffn, dim)
        self.modulation = nn.Parameter(torch.randn(6, dim) * 0.02)

    def cross_cache(self, context: Tensor) -> CrossCache:
        """Cross-attention to prompts [B, S, words, dim], absorbed: once per prompt, W_q goes into its keys and W_out
        into its values. Over a few words that leaves two narrow products.
        """
        k, v = self.cross_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # [B, S, words, heads, d]
        q_weight, q_bias = affine(self.cross_q, context)  # q_weight [dim, heads * d] multiplies from the right
        out_weight, out_bias = affine(self.cross_out, context)
        k = k * k.shape[-1] ** -0.5
        keys = torch.einsum("...whd,chd->...whc", k, q_weight.unflatten(1, (self.heads, -1)))
        biases = torch.einsum("...whd,hd->...wh", k, q_bias.unflatten(0, (self.heads, -1)))
        values = torch.einsum("...whd,hdc->...whc", v, out_weight.unflatten(0, (self.heads, -1)))
        values = values + out_bias / self.heads  # a head's weights sum to 1
        return CrossCache(keys, biases, values)

    @profile.profiled("cross-attention")
    def cross_attention(self, x: Residual, cross: CrossCache) -> Residual:
        """x [B, S, frames, n, dim] -> x + attention of its normed rows to their block's words."""
        norm = self.norm_cross
        x, y = x.before(None, norm="layer", weight=norm.weight, bias=norm.bias, eps=norm.eps)
        rows, y = (part.flatten(2, 3).flatten(0, 1) for part in (x.x, y))  # [B * S, L, dim]
        keys, biases, values = (part.to(y.dtype).flatten(0, 1) for part in cross)
        scores = torch.baddbmm(biases.flatten(1)[..., None], keys.flatten(1, 2), y.mT)  # [B * S, words * heads, L]
        weights = scores.unflatten(1, biases.shape[1:]).softmax(1).flatten(1, 2)
        return Residual(torch.baddbmm(rows, weights.mT, values.flatten(1, 2)).view(x.shape))

    def forward(self, i: int, x: Residual, modulation: Tensor, cross: CrossCache, attend: Attend) -> Residual | None:
        """x [B, S, frames, n, dim]; modulation [6, B, S, frames, 1, dim]; cross from `cross_cache`."""
        own = self.modulation.view(6, 1, 1, 1, 1, -1)
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (modulation + own).unbind()
        x, y = x.before(self.qkv, norm="layer", scale=scale, shift=shift, eps=self.eps)
        qkv = linear_output(self.qkv, y, dtype=x.dtype).flatten(2, 3)
        attended = attend(i, qkv, self.norm_q, self.norm_k)
        if attended is None:
            return None
        x = x.plus(self.out, attended.unflatten(2, x.shape[2:4]), gate=gate)

        x = self.cross_attention(x, cross)
        x, y = x.before(self.up, norm="layer", scale=scale_ffn, shift=shift_ffn, eps=self.eps)
        hidden = linear_output(self.up, y, activation="gelu_tanh", dtype=x.dtype)
        return x.plus(self.down, hidden, gate=gate_ffn)


class TinyWorldModel(nn.Module):
    """See the module's docstring. B videos, S blocks of each, L tokens per block.

    Attributes:
        FULL_PRECISION: submodules whose linear layers stay as they are where the others are in 8 bits: the first, the
            last, and those of cross-attention, which are multiplied into keys and values.
    """

    FULL_PRECISION = (
        *("patch_embedding", "time_in", "time_out", "time_projection", "text", "head_up", "head"),
        *("cross_q", "cross_kv", "cross_out"),
    )

    def __init__(self, config: TinyConfig = TinyConfig()):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.patch, dim)
        self.position = nn.Parameter(torch.randn(config.frame_tokens, dim) * 0.8)
        self.time_in, self.time_out = nn.Linear(128, dim), nn.Linear(dim, dim)
        self.time_projection = nn.Linear(dim, 6 * dim)
        # One table per action since the block began: a frame knows the moves that led to it from the block's start.
        self.action = nn.Embedding(config.block_frames * (len(ACTIONS) + 1), dim)
        self.action_token = nn.Embedding(config.block_frames * (len(ACTIONS) + 1), dim)
        self.words = nn.Embedding(1 + len(PLACES) + len(TIMES), dim)
        self.text = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.head_modulation = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.head_up, self.head = nn.Linear(dim, config.ffn), nn.Linear(config.ffn, config.patch)
        self._made: dict[torch.device, Tensor] = {}

    def prompt_cache(self, themes: Tensor) -> list[CrossCache]:
        """What cross-attention needs in every layer for themes [B, S, 2] (place, time)."""
        start = torch.zeros_like(themes[..., :1])
        words = torch.cat([start, themes[..., :1] + 1, themes[..., 1:] + 1 + len(PLACES)], -1)
        context = self.text(self.words(words))
        return [layer.cross_cache(context) for layer in self.layers]  # type: ignore[operator]

    def _frequencies(self, device: torch.device) -> Tensor:
        """[64] float32, of the noise level's sinusoids; made once for a device."""
        if device not in self._made:
            self._made[device] = torch.exp(-math.log(1000) * torch.arange(64, device=device) / 64)
        return self._made[device]

    def action_history(self, actions: Tensor) -> Tensor:
        """[..., frames] actions -> [..., frames, lags] rows of the action tables; before the block's start: empty."""
        frames, kinds = actions.shape[-1], len(ACTIONS) + 1
        lags = [F.pad(actions[..., : frames - lag], (lag, 0), value=kinds - 1) + lag * kinds for lag in range(frames)]
        return torch.stack(lags, -1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        actions: Tensor,
        cross: Sequence[CrossCache],
        attend: Attend,
        predict: slice = slice(None),
        shard: WholeFrames = WholeFrames(),
    ) -> Tensor | None:
        """Clean prediction of the blocks in `predict`; None if `attend` ends the pass early.

        Args:
            x: [B, S, L, patch] blocks at noise level t.
            t: [B, S] float32 in [0, 1]; 0 is clean.
            actions: [B, S, block_frames] int64.
            cross: prompt_cache of [B, S, 2] themes.
            attend: carries out self-attention over these blocks and whatever came before them.
            predict: which of the S blocks need a prediction; the others only leave their keys and values.
            shard: whose tokens this process computes: all, or one rank's; `attend` is given those.

        Returns:
            [B, len(predict), L, patch].
        """
        history = self.action_history(actions)
        angles = t.float()[..., None] * 1000 * self._frequencies(x.device)
        time = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))))
        condition = time.unsqueeze(-2) + self.action(history).sum(-2)  # [B, S, frames, dim]
        modulation = self.time_projection(F.silu(condition)).unflatten(-1, (6, 1, -1)).movedim(-3, 0).contiguous()
        h = self.patch_embedding(x).unflatten(-2, (actions.shape[-1], -1))
        h = h + self.action_token(history).sum(-2).unsqueeze(-2) + self.position  # [B, S, frames, n, dim]
        stream = Residual(shard.own(h))
        for i, layer in enumerate(self.layers):
            with profile.span("layer", layer=i):
                made = layer(i, stream, modulation, cross[i], attend)
            if made is None:
                return None
            stream = made
        h, condition = stream.sum()[:, predict], condition[:, predict]
        scale, shift = (condition.unsqueeze(-2) + self.head_modulation).unsqueeze(-3).unbind(-2)
        y: Any = linear_input(self.head_up, h, norm="layer", scale=scale, shift=shift, eps=self.config.eps)
        made = self.head(linear_output(self.head_up, y, activation="gelu_tanh"))
        return shard.whole(made, self.config.frame_tokens).flatten(-3, -2)
