"""The Wan2.1 transformer, made causal: what Self Forcing, CausVid and their relatives run.

    x ── patches ──┐                     (per layer)
    t ── modulation ├─ self-attention over pages ─ cross-attention to the prompt ─ feed-forward ── head ── flow
    prompt ─────────┘

It denoises blocks of latent frames. It does not know how self-attention is carried out: `forward` is handed an `attend`
that takes the packed projection and does norm, rotation, cache and softmax (inferix_kernels.Pass.attend, or
anything of that signature). Every size comes from a WanConfig; resolutions and frame counts are free.

Source: formulas and key names of Wan2.1 (github.com/Wan-Video/Wan2.1) as Self Forcing and CausVid use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix_kernels import profile
from inferix_kernels.distributed.tokens import WholeFrames
from inferix_kernels.quantize import Residual, linear_input, linear_output
from inferix_kernels.uploads import upload

from ..rope import spread

ROPE_BASE = TIME_BASE = 10_000.0
IMAGE_HIDDEN = 1280  # width of CLIP's image tokens where a checkpoint does not say

# (layer, packed q|k|v [T, 3 * dim], norm_q [dim], norm_k [dim], eps) -> [T, dim], or None: nothing more is wanted.
Attend = Callable[..., "Tensor | None"]


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, as `checkpoint.config_of` reads them off the tensors of a checkpoint.

    Attributes:
        dim, layers, heads, ffn: width, depth, attention heads, hidden width of the feed-forward.
        channels_in, channels_out: of the latents; an image-to-video model takes more in than it gives out.
        patch: pixels of the latent per token, (rows, columns).
        freq_dim: sinusoids of the timestep.
        text_dim, text_len: of the prompt embedding; shorter prompts are padded with zeros, which are attended
            to. text_dim 0: a network without words.
        image_dim: width of the image tokens of an image-to-video model; 0: a text-to-video model.
        eps: of every norm.
    """

    dim: int
    layers: int
    heads: int
    ffn: int
    channels_in: int = 16
    channels_out: int = 16
    patch: tuple[int, int] = (2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int = 0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"heads must divide dim={self.dim} into even parts, got {self.heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class CrossCache:
    """Keys and values of a prompt for every layer, computed once: cross-attention's cache.

    Attributes:
        text: per layer (k, v), each [1, heads, text_len, head_dim].
        image: the same for the image tokens of an image-to-video model, or None.
        begins_shot: a block under it begins another shot (decode.contract.Shots).
    """

    text: list[tuple[Tensor, Tensor]]
    image: list[tuple[Tensor, Tensor]] | None = None
    begins_shot: bool = False


def rope_table(
    frames: Sequence[int],
    grid: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(cos, sin) of every token of these frames: [len(frames) * rows * columns, head_dim / 2, 2].

    The channel pairs of a head are split over time, row and column, 2 * (head_dim // 6) channels for each of the last
    two. Angles are computed in float64 from the frame's global index, so there is no table to run off the end of. An
    angle depends on the place along one axis alone: the host takes sine and cosine once for each place and rate, the
    same on every machine, and the table of all tokens is put together on the device.
    """
    spatial = 2 * (head_dim // 6)
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    axes = []
    for places, n in zip((torch.tensor(frames), torch.arange(grid[0]), torch.arange(grid[1])), sizes):
        angles = places.double()[:, None] * ROPE_BASE ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
        axes.append(torch.stack([angles.cos(), angles.sin()], -1).to(dtype))
    return spread(axes, device)


class SelfAttention(nn.Module):
    """Projections around `attend`. q, k and v are one matrix: one product, and the packing that the kernel takes."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, config.eps) for _ in range(2))


class CrossAttention(nn.Module):
    """Attention to the prompt and, in an image-to-video model, to the image; both through one output projection."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, config.eps) for _ in range(2))
        if config.image_dim and config.text_dim:
            self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[..., dim], L rows in all -> [1, heads, L, head_dim]."""
        return x.view(1, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def text_cache(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(context))), self.split(self.v(context))

    def image_cache(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k_img(self.k_img(context))), self.split(self.v_img(context))

    def forward(
        self, x: Residual, norm: nn.LayerNorm, layer: int, segments: Sequence[tuple[slice, CrossCache]]
    ) -> Residual:
        """x [F, n, dim] -> x + attention; each segment of its rows attends to the prompt of its block."""
        x, y = x.before(self.q, norm="layer", weight=norm.weight, bias=norm.bias, eps=norm.eps)
        q = linear_output(self.q, y, dtype=x.dtype)
        _, q = Residual(q).before(None, norm="rms", weight=self.norm_q.weight, eps=norm.eps)
        q = self.split(q)
        if len(segments) == 1:
            joined = _attended(q, segments[0][1], layer)
        else:
            joined = torch.cat([_attended(q[:, :, rows], cross, layer) for rows, cross in segments], 1)
        return x.plus(self.o, joined.reshape_as(x.x))


def _attended(q: Tensor, cross: CrossCache, layer: int) -> Tensor:
    """q [1, heads, L, head_dim] -> [1, L, heads, head_dim], as it lies in memory."""
    out = F.scaled_dot_product_attention(q, *cross.text[layer])
    if cross.image is not None:
        out = out + F.scaled_dot_product_attention(q, *cross.image[layer])
    return out.transpose(1, 2)


class FeedForward(nn.Sequential):
    """Two layers and GELU between them."""

    def __init__(self, config: WanConfig):
        super().__init__(
            nn.Linear(config.dim, config.ffn), nn.GELU(approximate="tanh"), nn.Linear(config.ffn, config.dim)
        )
        self.eps = config.eps

    def forward(self, x: Residual, shift: Tensor, scale: Tensor, gate: Tensor) -> Residual:  # type: ignore[override]
        """x [F, n, dim] -> x + gate * what the layers make of it, normed and modulated; the others [F, 1, dim]."""
        up, _, down = self
        x, y = x.before(up, norm="layer", scale=scale, shift=shift, eps=self.eps)
        hidden = linear_output(up, y, activation="gelu_tanh", dtype=x.dtype)
        return x.plus(down, hidden, gate=gate)


class WanBlock(nn.Module):
    """One layer. The six rows of the modulation are shift, scale and gate of attention, then of the feed-forward."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn, self.cross_attn = SelfAttention(config), CrossAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) * config.dim**-0.5)

    def forward(
        self,
        layer: int,
        x: Residual,
        modulation: Sequence[Tensor],
        segments: Sequence[tuple[slice, CrossCache]],
        attend: Attend,
    ) -> Residual | None:
        """x [F, n, dim]: F frames of n tokens; modulation 6 x [F, 1, dim], of this layer and the frames' noise."""
        shift, scale, gate, *for_ffn = modulation
        attention = self.self_attn
        x, y = x.before(attention.qkv, norm="layer", scale=scale, shift=shift, eps=self.eps)
        qkv = linear_output(attention.qkv, y, dtype=x.dtype).flatten(0, 1)
        attended = attend(layer, qkv, attention.norm_q.weight, attention.norm_k.weight, self.eps)
        if attended is None:
            return None
        x = x.plus(attention.o, attended.view_as(x.x), gate=gate)
        made: Residual = self.ffn(self.conditioned(layer, x, segments), *for_ffn)
        return made

    @profile.profiled("cross-attention")
    def conditioned(self, layer: int, x: Residual, segments: Sequence[tuple[slice, CrossCache]]) -> Residual:
        """x [F, n, dim] with what its conditioning adds."""
        return self.cross_attn(x, self.norm3, layer, segments)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.channels_out)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) * config.dim**-0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [F, n, dim], e [F, dim] -> [F, n, patch * channels]."""
        shift, scale = (self.modulation + e[:, None]).unsqueeze(2).unbind(1)
        y = linear_input(self.head, x, norm="layer", scale=scale, shift=shift, eps=self.eps)
        return linear_output(self.head, y, dtype=x.dtype)


class ImageEmbedding(nn.Module):
    """Image tokens of the CLIP tower, made as wide as the text's."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width, dim = config.image_dim, config.dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class WanNetwork(nn.Module):
    """See the module's docstring. Parameters bear the published names, but q, k and v of self-attention are packed.

    Attributes:
        FULL_PRECISION: submodules whose linear layers stay as they are where the others are in 8 bits.
    """

    FULL_PRECISION: tuple[str, ...] = ("text_embedding", "img_emb", "time_embedding", "time_projection", "head")

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config, dim = config, config.dim
        kernel = (1, *config.patch)
        self.patch_embedding = nn.Conv3d(config.channels_in, dim, kernel, kernel)  # for its parameters; see _patches
        if config.text_dim:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.layers))
        self.head = Head(config)
        self._time_rates: dict[torch.device, Tensor] = {}  # no buffer: they stay float64
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.modulation.dtype

    def cross_cache(self, text: Tensor, image: Tensor | None = None) -> CrossCache:
        """The cross-attention cache of a prompt.

        Args:
            text: [L, text_dim] prompt embedding of at most text_len tokens; padded with zeros, which take part.
            image: [tokens, image_dim] of the conditioning image; an image-to-video model needs it.

        Raises:
            ValueError: the embedding is too long or of another width, or an image is missing or not expected.
        """
        config = self.config
        if text.ndim != 2 or len(text) > config.text_len or text.shape[1] != config.text_dim:
            raise ValueError(f"text must be [<= {config.text_len}, {config.text_dim}], got {list(text.shape)}")
        if (image is not None) != bool(config.image_dim):
            wanted = f"[tokens, {config.image_dim}]" if config.image_dim else "None: this is a text-to-video model"
            raise ValueError(f"image must be {wanted}, got {None if image is None else list(image.shape)}")
        text = F.pad(text.to(self.head.modulation), (0, 0, 0, config.text_len - len(text)))
        context = self.text_embedding(text)
        layers = [block.cross_attn for block in self.blocks]
        cache = CrossCache([layer.text_cache(context) for layer in layers])  # type: ignore[operator, union-attr]
        if image is None:
            return cache
        tokens = self.img_emb(image.to(self.head.modulation))
        return CrossCache(cache.text, [layer.image_cache(tokens) for layer in layers])  # type: ignore[operator, union-attr]

    def forward(
        self,
        blocks: Sequence[Tensor],
        timesteps: Tensor,
        crosses: Sequence[CrossCache],
        attend: Attend,
        first: int = -1,
        shard: WholeFrames = WholeFrames(),
    ) -> Tensor | None:
        """Flow (noise minus clean latent) of the blocks from `first` on, the last one alone by default; the blocks
        before them only leave their keys and values.

        Args:
            blocks: [frames, channels_in, height, width] each; frames may differ.
            timesteps: [frames of all blocks], 0 (clean) to 1000 (noise).
            crosses: the conditioning of each block, from `cross_cache`.
            attend: carries out self-attention over these blocks and whatever came before them.
            shard: whose tokens this process computes: all, or one rank's; `attend` is given those.

        Returns:
            [frames of these blocks, channels_out, height, width] in the network's dtype, or None if attend was.
        """
        x = torch.cat([block.to(self.dtype) for block in blocks])
        grid = x.shape[2] // self.config.patch[0], x.shape[3] // self.config.patch[1]
        h = Residual(shard.own(self._patches(x, grid)))
        e = self._time(timesteps.to(x.device))
        modulation = self._modulation(self.time_projection(e))
        segments = _segments([len(block) * h.shape[1] for block in blocks], crosses)
        for i, layer in enumerate(self.blocks):
            with profile.span("layer", layer=i):
                h = layer(i, h, modulation[6 * i : 6 * i + 6], segments, attend)
            if h is None:
                return None
        last = sum(len(block) for block in blocks[first:])
        flow = shard.whole(self.head(h.sum()[-last:], e[-last:]), grid[0] * grid[1])
        return self._unpatch(flow, grid)

    def _modulation(self, e: Tensor) -> Sequence[Tensor]:
        """What every layer makes of e [F, 6 * dim], at once: six [F, 1, dim] for each, in float32 or better."""
        own = torch.cat([block.modulation for block in self.blocks])  # type: ignore[misc]
        frames = e.unflatten(1, (6, 1, -1)).transpose(0, 1).contiguous()  # [6, F, 1, dim]
        made = own.to(torch.promote_types(e.dtype, torch.float32))[:, :, None, None] + frames
        return made.flatten(0, 1).unbind()

    def _patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, C, height, width] -> [F, rows * columns, dim]: the convolution, as the matrix product that it is."""
        rows, columns = self.config.patch
        if x.shape[1] != self.config.channels_in or x.shape[2] % rows or x.shape[3] % columns:
            raise ValueError(
                f"blocks must be [frames, {self.config.channels_in}, multiple of {rows}, multiple of {columns}], "
                f"got {list(x.shape)}"
            )
        tiles = x.unflatten(3, (grid[1], columns)).unflatten(2, (grid[0], rows))  # [F, C, gh, rows, gw, columns]
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(tiles, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _time(self, timesteps: Tensor) -> Tensor:
        """[F] -> [F, dim]. The sinusoids are computed in float64: at t = 1000 a float32 angle is off by 3e-5."""
        if timesteps.device not in self._time_rates:
            half = self.config.freq_dim // 2
            rates = TIME_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
            self._time_rates[timesteps.device] = upload(rates, timesteps.device)
        angles = timesteps.double()[:, None] * self._time_rates[timesteps.device]
        return self.time_embedding(torch.cat([angles.cos(), angles.sin()], 1).to(self.dtype))

    def _unpatch(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, rows * columns, patch row * patch column * channel] -> [F, channels, height, width]."""
        rows, columns = self.config.patch
        tiles = x.unflatten(2, (rows, columns, -1)).unflatten(1, grid)  # [F, gh, gw, rows, columns, C]
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _segments(lengths: Sequence[int], crosses: Sequence[CrossCache]) -> list[tuple[slice, CrossCache]]:
    """Which rows attend to which prompt; blocks of one prompt are one segment."""
    if all(cross is crosses[0] for cross in crosses):
        return [(slice(0, sum(lengths)), crosses[0])]
    ends = accumulate(lengths, initial=0)
    return [(slice(start, end), cross) for (start, end), cross in zip(pairwise(ends), crosses)]
