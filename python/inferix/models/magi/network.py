"""The MAGI-1 transformer: denoises chunks of latent frames, each under its own noise level and its own caption.
Long because most of it declares layers under the names of checkpoints.

    x ── patches ──┐                              (per layer)
    t, stride ─────┴─ gate       ┌─ self-attention over pages ─┐
    caption ─────────────────────┴─ cross-attention ───────────┴─ projection ─ gated MLP ── final linear ── velocity

Both attentions start from the same normed input and share one projection. There is no scale and shift before a layer:
a chunk's noise level only gates what a layer adds. As in Wan's network here, `attend` is handed in.

Source: formulas and key names of github.com/SandAI-org/MAGI-1 (6ff822e), inference/model/dit; arXiv:2505.13211.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix_kernels import Quantized, profile
from inferix_kernels.distributed.tokens import WholeFrames
from inferix_kernels.quantize import Residual, linear_output

from ..rope import spread

FREQ_DIM = 256  # sinusoids of t
TIME_BASE, TIME_SCALE = 10_000.0, 1000.0
BASE_GRID = 16 * 16  # patches of the resolution that positions are counted in
GROUPS = 8  # in which the two attentions lie interleaved before their projection
NULL_ROWS = 50  # of the null caption, those that are attended to

# (layer, packed q|k|v [T, (Hq + 2 H) D], norm_q [D], norm_k [D], eps, ...) -> [T, Hq D], or None: no more is wanted.
Attend = Callable[..., "Tensor | None"]


@dataclasses.dataclass(frozen=True)
class MagiConfig:
    """Sizes of a MAGI-1 transformer.

    Attributes:
        dim, layers, heads, ffn: width, depth, query heads, hidden width of the MLP.
        kv_heads, head_dim: of keys and values; `heads` is a multiple of kv_heads.
        gated: SwiGLU instead of GELU.
        cond_dim: width of the embedding of a chunk's noise level.
        caption_dim, caption_len: of the text embedding.
        channels: of the latents; halved: the network takes and gives them twice, side by side.
        x_scale: of the latents as the network sees them.
        patch: pixels of the latent per token, in each direction.
        eps: of every norm.
    """

    dim: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int = 8
    head_dim: int = 128
    gated: bool = False
    cond_dim: int = 768
    caption_dim: int = 4096
    caption_len: int = 800
    channels: int = 16
    halved: bool = False
    x_scale: float = 1.0
    patch: int = 2
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """Channels that the network takes and gives."""
        return self.channels * (2 if self.halved else 1)


@dataclasses.dataclass(frozen=True)
class CrossCache:
    """Keys and values of a caption for every layer, computed once: the conditioning of a segment.

    Attributes:
        text: per layer (k, v), each [1, kv_heads, rows, head_dim].
        dropped: the network knows that there is no caption.
    """

    text: list[tuple[Tensor, Tensor]]
    dropped: bool = False


Segments = Sequence[tuple[slice, CrossCache]]  # rows of the packed tokens, and what they attend to


def rope_table(
    frames: Sequence[int], grid: tuple[int, int], bands: Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """(cos, sin) of every token: [len(frames) * rows * columns, 3 * len(bands), 2] float32.

    Time is the frame's index; row and column are counted from the middle, in units of a grid of 16 x 16. Places are
    float32 and in the order of the source, which rescales time as well, if only by rounding: with these and the bands
    that it learned, the network has seen nothing else. Angles are computed from them in float64, on the host, and the
    table is put together on the device.

    Args:
        bands: [pairs of an axis], on the host.
    """
    shrink = math.sqrt(grid[0] * grid[1] / BASE_GRID)
    total = frames[-1] + 1
    axes = [torch.tensor(frames, dtype=torch.float32)]
    axes += [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in grid]
    lengths = [(total, total), *((n, n / shrink) for n in grid)]
    places = [x / (n - 1) * (reference - 1) if n > 1 else x for x, (n, reference) in zip(axes, lengths)]
    angles = [x.double()[:, None] * bands.double() for x in places]
    tables = [torch.stack([angle.cos(), angle.sin()], -1).float() for angle in angles]
    return spread(tables, device)


class LayerNorm1p(nn.Module):
    """A layer norm whose weight is stored as its distance from 1."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    @property
    def scale(self) -> Tensor:
        return self.weight + 1

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.scale, self.bias, self.eps)


class Projections(nn.Module):
    """Norm and projections of both attentions. q, k and v of self-attention are one matrix, packed for the kernel."""

    def __init__(self, config: MagiConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.dim, config.eps)
        self.qkv = nn.Linear(config.dim, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.qx = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)


class Attentions(nn.Module):
    """Self-attention, cross-attention to the caption, and the projection that they share."""

    def __init__(self, config: MagiConfig):
        super().__init__()
        self.config, width = config, config.heads * config.head_dim
        self.linear_qkv = Projections(config)
        self.linear_kv_xattn = nn.Linear(config.dim, 2 * config.kv_heads * config.head_dim, bias=False)
        self.linear_proj = nn.Linear(2 * width, config.dim, bias=False)
        self.q_layernorm, self.k_layernorm, self.q_layernorm_xattn, self.k_layernorm_xattn = (
            LayerNorm1p(config.head_dim, config.eps) for _ in range(4)
        )

    def text_cache(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of caption rows [n, dim]: each [1, kv_heads, n, head_dim]."""
        both = self.linear_kv_xattn(rows).unflatten(1, (self.config.kv_heads, 2, -1))
        k, v = self.k_layernorm_xattn(both[:, :, 0]).to(both.dtype), both[:, :, 1]
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def forward(self, layer: int, y: Tensor, segments: Segments, attend: Attend) -> Tensor | None:
        """Normed y [T, dim] -> what both give, before their projection, [T, 2 * heads * head_dim]."""
        config, norms = self.config, (self.q_layernorm, self.k_layernorm)
        attended = attend(
            layer,
            self.linear_qkv.qkv(y),
            *(norm.scale for norm in norms),
            config.eps,
            norm_q_bias=norms[0].bias,
            norm_k_bias=norms[1].bias,
            interleaved=False,
        )
        if attended is None:
            return None
        crossed = self._cross(layer, self.linear_qkv.qx(y), segments)
        parts = [part.unflatten(1, (GROUPS, -1)) for part in (attended, crossed)]
        return torch.stack(parts, 2).flatten(1)

    @profile.profiled("cross-attention")
    def _cross(self, layer: int, qx: Tensor, segments: Segments) -> Tensor:
        """Each segment of the rows attends to its own caption alone."""
        config = self.config
        q = self.q_layernorm_xattn(qx.unflatten(1, (config.heads, -1))).to(qx.dtype).transpose(0, 1)[None]
        grouped = config.heads > config.kv_heads
        parts = [
            F.scaled_dot_product_attention(q[:, :, rows], *cross.text[layer], enable_gqa=grouped)
            for rows, cross in segments
        ]
        return torch.cat([part[0].transpose(0, 1) for part in parts]).flatten(1)


class MLP(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.gated = config.gated
        self.layer_norm = nn.LayerNorm(config.dim, config.eps)
        self.linear_fc1 = nn.Linear(config.dim, config.ffn * (2 if config.gated else 1), bias=False)
        self.linear_fc2 = nn.Linear(config.ffn, config.dim, bias=False)

    def forward(self, y: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        """Of normed y, as linear_fc1 takes it: the input of linear_fc2, in this dtype."""
        if not self.gated:
            return linear_output(self.linear_fc1, y, activation="gelu", dtype=dtype)
        gate, value = linear_output(self.linear_fc1, y, dtype=dtype).chunk(2, -1)
        return F.silu(gate) * value


class Gates(nn.Module):
    """The embedding of a chunk's noise level -> its gates of attention and MLP, between -1 and 1."""

    def __init__(self, config: MagiConfig):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(config.cond_dim, 2 * config.dim))

    def forward(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """[..., cond_dim] -> two of [..., dim]."""
        attention, mlp = self.proj(F.silu(cond)).tanh().chunk(2, -1)
        return attention, mlp


class MagiLayer(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.ada_modulate_layer = Gates(config)
        self.self_attention, self.mlp = Attentions(config), MLP(config)
        self.self_attn_post_norm, self.mlp_post_norm = (LayerNorm1p(config.dim, config.eps) for _ in range(2))

    def forward(self, layer: int, x: Residual, cond: Tensor, segments: Segments, attend: Attend) -> Residual | None:
        """x [S, n, dim]; cond [S, 1, cond_dim], of the rows at its place; segments of all S * n rows."""
        attention, mlp = self.self_attention, self.mlp
        x, y = x.before(None, **steps_of(attention.linear_qkv.layer_norm))
        attended = attention(layer, y.flatten(0, 1), segments, attend)
        if attended is None:
            return None
        gate_attention, gate_mlp = self.ada_modulate_layer(cond)
        attended = attended.unflatten(0, x.shape[:2])
        x = x.plus(attention.linear_proj, attended, gate=gate_attention, **steps_of(self.self_attn_post_norm))
        x, y = x.before(mlp.linear_fc1, **steps_of(mlp.layer_norm))
        return x.plus(mlp.linear_fc2, mlp(y, x.dtype), gate=gate_mlp, **steps_of(self.mlp_post_norm))


def steps_of(norm: nn.LayerNorm | LayerNorm1p) -> dict[str, Any]:
    """As a stream takes them."""
    weight = norm.scale if isinstance(norm, LayerNorm1p) else norm.weight
    return {"norm": "layer", "weight": weight, "bias": norm.bias, "eps": norm.eps}


class TimestepEmbedder(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQ_DIM, config.cond_dim), nn.SiLU(), nn.Linear(config.cond_dim, config.cond_dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        """[n] -> [n, cond_dim]. The sinusoids are float32, as in the source."""
        angles = (t.float()[:, None] * time_rates(t.device) * TIME_SCALE).double()
        waves = torch.cat([angles.cos(), angles.sin()], 1).float()
        return self.mlp(waves.to(next(self.parameters()).dtype))


def time_rates(device: torch.device) -> Tensor:
    """[FREQ_DIM / 2] float32: angular frequencies of the time embedding, the same on every machine.

    Sinusoids and rates are computed in float64 and rounded: angles reach 1,000, where the last bit of a rate moves
    latents by 6e-5, and float32 functions of libraries differ in it from one kind of CPU to the next.
    """
    half = FREQ_DIM // 2
    exponents = -math.log(TIME_BASE) * torch.arange(half, dtype=torch.float32, device=device) / half
    return exponents.double().exp().float()


class CaptionEmbedder(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.y_proj_xattn = nn.Sequential(nn.Linear(config.caption_dim, config.dim), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(config.caption_dim, config.cond_dim))
        self.null_caption_embedding = nn.Parameter(torch.randn(config.caption_len, config.caption_dim))


class LearnedBands(nn.Module):
    """Frequencies of the rotary embedding, the same ones for time, row and column."""

    def __init__(self, config: MagiConfig):
        super().__init__()
        count = config.head_dim // 8
        self.bands = nn.Parameter(TIME_BASE ** (-torch.arange(count, dtype=torch.float32) / count))


class FinalLinear(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch**2 * config.width, bias=False)


class Layers(nn.Module):
    def __init__(self, config: MagiConfig):
        super().__init__()
        self.layers = nn.ModuleList(MagiLayer(config) for _ in range(config.layers))
        self.final_layernorm = LayerNorm1p(config.dim, config.eps)


class MagiNetwork(nn.Module):
    """See the module's docstring. Parameters bear the published names, but q, k and v of self-attention are packed.

    `dtype` is that of the layers' products. Embeddings, norms of added terms and the final linear may be held in
    float32 among bfloat16 layers, as the source holds them; see `checkpoint.PRECISE`.
    """

    def __init__(self, config: MagiConfig):
        super().__init__()
        self.config = config
        kernel = (1, config.patch, config.patch)
        # For its parameter; see `_patches`.
        self.x_embedder = nn.Conv3d(config.width, config.dim, kernel, kernel, bias=False)
        self.t_embedder, self.y_embedder = TimestepEmbedder(config), CaptionEmbedder(config)
        self.rope = LearnedBands(config)
        self.videodit_blocks = Layers(config)
        self.final_linear = FinalLinear(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.videodit_blocks.layers[0].self_attention.linear_kv_xattn.weight.dtype  # type: ignore[union-attr, return-value]

    def cross_cache(self, rows: Tensor, dropped: bool = False) -> CrossCache:
        """What cross-attention needs of caption rows [n, caption_dim], computed once per caption."""
        config = self.config
        if rows.ndim != 2 or not 0 < len(rows) <= config.caption_len or rows.shape[1] != config.caption_dim:
            raise ValueError(f"rows must be [1..{config.caption_len}, {config.caption_dim}], got {list(rows.shape)}")
        null = self.y_embedder.null_caption_embedding
        embedded = self.y_embedder.y_proj_xattn(rows.to(null)).to(self.dtype)
        layers = [layer.self_attention for layer in self.videodit_blocks.layers]
        return CrossCache([layer.text_cache(embedded) for layer in layers], dropped)  # type: ignore[operator, union-attr]

    def null_rows(self) -> Tensor:
        return self.y_embedder.null_caption_embedding[:NULL_ROWS]

    def forward(
        self,
        blocks: Sequence[Tensor],
        times: Tensor,
        crosses: Sequence[CrossCache],
        attend: Attend,
        stride: float | None = None,
        shard: WholeFrames = WholeFrames(),
    ) -> list[Tensor] | None:
        """Velocity (clean latent minus noise) of every block; None if `attend` ended the pass.

        Args:
            blocks: [frames, channels, height, width] each.
            times: [blocks], 0 (noise) to 1 (clean).
            crosses: the conditioning of each block, from `cross_cache`.
            attend: carries out self-attention over these blocks and whatever came before them.
            stride: the size of its steps, which a distilled network takes.
            shard: whose tokens this process computes: all, or one rank's; `attend` is given those.
        """
        config = self.config
        x = torch.cat(list(blocks)).to(self.x_embedder.weight.dtype) * config.x_scale
        grid = x.shape[2] // config.patch, x.shape[3] // config.patch
        cond = self._cond(times.to(x.device), crosses, stride).to(self.dtype)
        patches = shard.own(self._patches(x, grid).to(self.dtype).unflatten(0, (len(x), -1)))  # [F, n, dim]
        lengths = [len(block) * patches.shape[1] for block in blocks]
        segments = [(slice(*rows), cross) for rows, cross in zip(pairwise(accumulate(lengths, initial=0)), crosses)]
        # As many rows in each place, of one noise level: a segment's or, where segments differ, a frame's.
        places = [len(block) for block in blocks] if len(set(lengths)) > 1 else [1] * len(blocks)
        cond = torch.cat([row.expand(count, -1) for row, count in zip(cond.split(1), places)])[:, None]
        stream: Any = Residual(patches.flatten(0, 1).unflatten(0, (len(cond), -1)))
        for i, layer in enumerate(self.videodit_blocks.layers):
            with profile.span("layer", layer=i):
                stream = layer(i, stream, cond, segments, attend)
            if stream is None:
                return None
        out = self.final_linear.linear(self.videodit_blocks.final_layernorm(stream.sum().flatten(0, 1)))
        out = shard.whole(out.unflatten(0, (len(x), -1)), grid[0] * grid[1]).flatten(0, 1)
        velocity = self._unpatch(out, len(x), grid)[:, : config.channels] / config.x_scale
        return list(velocity.split([len(block) for block in blocks]))

    def _cond(self, times: Tensor, crosses: Sequence[CrossCache], stride: float | None) -> Tensor:
        cond = self.t_embedder(times)
        if stride is not None:
            cond = cond + self.t_embedder(torch.full((1,), stride, dtype=torch.float32, device=times.device))
        # Whatever the caption says, gates learn from a row of the null caption only whether there is one.
        null = self.y_embedder.null_caption_embedding
        rows = torch.stack([null[-1 if cross.dropped else -2] for cross in crosses])
        return cond + self.y_embedder.y_proj_adaln(rows)

    def _patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, C, height, width] -> [F * rows * columns, dim]: the convolution, as the matrix product that it is."""
        patch, channels = self.config.patch, self.config.channels
        if x.shape[1] != channels or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"blocks must be [frames, {channels}, multiples of {patch}], got {list(x.shape)}")
        if self.config.halved:
            x = torch.cat([x, x], 1)
        tiles = x.unflatten(3, (grid[1], patch)).unflatten(2, (grid[0], patch))  # [F, C, gh, rows, gw, columns]
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        return F.linear(tiles, self.x_embedder.weight.flatten(1))

    def _unpatch(self, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """[F * rows * columns, patch row * patch column * channel] -> [F, channels, height, width]."""
        patch = self.config.patch
        tiles = x.unflatten(1, (patch, patch, -1)).unflatten(0, (frames, *grid))  # [F, gh, gw, rows, columns, C]
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
