"""The transformer of Matrix-Game 2: Wan's, conditioned on a picture in place of words, and on what the keys do.

    x ── patches ──┐                     (per layer)
    t ── modulation ├─ self-attention over pages ─ cross-attention to picture ─ actions ─ feed-forward ── head ── flow
    picture ────────┘

Actions come in through an `ActionModule` in the first layers. It attends along time alone, and has keys and values of
its own: those of the mouse for each token of a frame, which depend on what the frame shows, and those of the keyboard
for a frame as a whole. They lie with the block that they are of (`ActionBlock`) in the network's precision, not in
pages: there are at most as many keys as frames in the window.

Source: formulas and key names of Matrix-Game-2 in github.com/SkyworkAI/Matrix-Game (6146d7a); the design of the module
is GameFactory's (arXiv:2501.08325).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix_kernels.quantize import Residual

from ..wan.network import CrossCache, WanBlock, WanConfig, WanNetwork

PICTURES = 4  # of the video per latent frame after the first
REACH = 3  # latent frames whose pictures' actions a frame is told of
ROTATED, ROPE_BASE = 8, 256.0  # channels of a head that time rotates; the others stay


@dataclasses.dataclass(frozen=True)
class MatrixGameConfig(WanConfig):
    """Sizes of a Matrix-Game transformer. It has no words: text_dim is 0.

    Attributes:
        action_layers: the first so many layers have an action module.
        keyboard: keys, one channel each.
        mouse: channels of the mouse's movement; 0: a model without one.
        key_dim: width of one picture's keys, embedded.
        action_dim, action_heads: of the attention in an action module.
    """

    action_layers: int = 0
    keyboard: int = 0
    mouse: int = 0
    key_dim: int = 128
    action_dim: int = 1024
    action_heads: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_dim % self.action_heads or self.action_dim // self.action_heads < ROTATED:
            raise ValueError(
                f"action_heads must divide action_dim={self.action_dim} into parts of at least {ROTATED}, "
                f"got {self.action_heads}"
            )


@dataclasses.dataclass(frozen=True)
class ActionBlock:
    """What is done in the frames of one block, and what the action modules keep of it.

    Attributes:
        keyboard: [frames, keys], 1 where a key is held.
        mouse: [frames, 2], how the camera turns, or None.
        kept: (layer, "mouse" or "keyboard") -> (k, v), each [frames, tokens or 1, heads, head_dim]. Every forward over
            the block writes them, the clean pass last.
    """

    keyboard: Tensor
    mouse: Tensor | None
    kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionConditioning(CrossCache):
    """The conditioning of one block: the picture's keys and values, actions, and where the block stands (`placed`).

    Attributes:
        own: the block's actions.
        first: index of its first frame.
        keyboard: [frames, 12, keys]: what is held in each of the pictures that a frame is told of.
        mouse: [frames, 12 * 2], the same of the mouse, or None.
        rotation: [frames, ROTATED / 2, 2] (cos, sin) of each frame's place in time.
        past: the blocks before, oldest first, whose last `remembered` frames are attended to.
    """

    own: ActionBlock
    first: int = 0
    keyboard: Tensor | None = None
    mouse: Tensor | None = None
    rotation: Tensor | None = None
    past: tuple[ActionBlock, ...] = ()
    remembered: int = 0


def placed(
    conditioning: ActionConditioning, first: int, past: Sequence[ActionBlock], window: int
) -> ActionConditioning:
    """A block's conditioning where it stands: its first frame is `first`, `past` are the blocks before it.

    Latent frame f stands for pictures 4 f - 3 to 4 f and is told of the actions in pictures 4 f - 12 to 4 f - 1. Those
    before the first picture are as that one's.
    """
    blocks = [*past, conditioning.own]
    frames, known = len(conditioning.own.keyboard), sum(len(block.keyboard) for block in blocks)
    begin = first + frames - known  # the first frame whose actions are known
    at = torch.arange(first, first + frames)[:, None] * PICTURES + torch.arange(-PICTURES * REACH, 0)
    at = (at.clamp(min=0) + PICTURES - 1) // PICTURES - begin  # of the pictures, the frame that each belongs to
    rates = ROPE_BASE ** (-torch.arange(0, ROTATED, 2, dtype=torch.float64) / ROTATED)
    angles = torch.arange(first, first + frames, dtype=torch.float64)[:, None] * rates
    keyboard = torch.cat([block.keyboard for block in blocks])
    mice = [block.mouse for block in blocks if block.mouse is not None]
    return dataclasses.replace(
        conditioning,
        first=first,
        keyboard=keyboard[at],
        mouse=torch.cat(mice)[at].flatten(1) if mice else None,
        rotation=torch.stack([angles.cos(), angles.sin()], -1).to(keyboard.device),
        past=tuple(past),
        remembered=min(first, window - frames),
    )


class HeadNorm(nn.RMSNorm):
    """RMS norm without a weight. There is one in the checkpoint, which the published code does not multiply by."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class ActionModule(nn.Module):
    """What the keys do to a block: first the mouse, then the keyboard. Parameters bear the published names."""

    def __init__(self, config: MatrixGameConfig):
        super().__init__()
        dim, width, pictures = config.dim, config.action_dim, PICTURES * REACH
        self.heads = config.action_heads
        norms = width // self.heads, 1e-6
        if config.mouse:
            self.mouse_mlp = nn.Sequential(
                nn.Linear(dim + pictures * config.mouse, width),
                nn.GELU(approximate="tanh"),
                nn.Linear(width, width),
                nn.LayerNorm(width),
            )
            self.t_qkv = nn.Linear(width, 3 * width, bias=False)
            self.img_attn_q_norm, self.img_attn_k_norm = HeadNorm(*norms), HeadNorm(*norms)
            self.proj_mouse = nn.Linear(width, dim, bias=False)
        self.keyboard_embed = nn.Sequential(
            nn.Linear(config.keyboard, config.key_dim), nn.SiLU(), nn.Linear(config.key_dim, config.key_dim)
        )
        self.mouse_attn_q = nn.Linear(dim, width, bias=False)
        self.keyboard_attn_kv = nn.Linear(pictures * config.key_dim, 2 * width, bias=False)
        self.key_attn_q_norm, self.key_attn_k_norm = HeadNorm(*norms), HeadNorm(*norms)
        self.proj_keyboard = nn.Linear(width, dim, bias=False)

    def forward(self, layer: int, x: Tensor, conditioning: ActionConditioning) -> Tensor:
        """x [frames, tokens, dim] of one block, steered."""
        if conditioning.mouse is not None:
            told = conditioning.mouse.to(x)[:, None].expand(-1, x.shape[1], -1)
            qkv = self.t_qkv(self.mouse_mlp(torch.cat([x, told], -1)))
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
            q, k = self.img_attn_q_norm(q), self.img_attn_k_norm(k)
            x = x + self.proj_mouse(_along_time(q, k, v, conditioning, (layer, "mouse")))
        assert conditioning.keyboard is not None
        told = self.keyboard_embed(conditioning.keyboard.to(x)).flatten(1)[:, None]
        k, v = self.keyboard_attn_kv(told).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.key_attn_q_norm(self.mouse_attn_q(x).unflatten(-1, (self.heads, -1)))
        return x + self.proj_keyboard(_along_time(q, self.key_attn_k_norm(k), v, conditioning, (layer, "keyboard")))


def _along_time(q: Tensor, k: Tensor, v: Tensor, conditioning: ActionConditioning, name: tuple[int, str]) -> Tensor:
    """Each token attends to the frames that the block remembers, and to the block's own: at its own place, or, where k
    and v have one token, to that.

    Args:
        q: [frames, tokens, heads, head_dim]; k, v: [frames, tokens or 1, heads, head_dim]. Keys are kept rotated.

    Returns:
        [frames, tokens, heads * head_dim]
    """
    assert conditioning.rotation is not None
    q, k = _rotated(q, conditioning.rotation), _rotated(k, conditioning.rotation)
    conditioning.own.kept[name] = k, v
    past = [block.kept[name] for block in conditioning.past]
    keys, values = (
        torch.cat([kept[part] for kept in (*past, (k, v))])[-conditioning.remembered - len(k) :] for part in (0, 1)
    )
    # A sequence for each place or, where all places read the same keys, one of all queries.
    queries = q if keys.shape[1] > 1 else q.flatten(0, 1)[:, None]
    queries, keys, values = (x.permute(1, 2, 0, 3) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values)
    return out.permute(2, 0, 1, 3).reshape(*q.shape[:2], -1)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [frames, tokens, heads, head_dim] with pairs of neighbouring channels turned, ROTATED channels in all."""
    cos, sin = rotation.to(x)[:, None, None].unbind(-1)
    a, b = x[..., :ROTATED].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., ROTATED:]], -1)


class ActionLayer(WanBlock):
    """A layer of Wan with an action module between cross-attention and feed-forward."""

    def __init__(self, config: MatrixGameConfig):
        super().__init__(config)
        self.action_model = ActionModule(config)

    def conditioned(self, layer: int, x: Residual, segments: Sequence[tuple[slice, CrossCache]]) -> Residual:
        told = super().conditioned(layer, x, segments).sum()
        parts = told.split([(rows.stop - rows.start) // told.shape[1] for rows, _ in segments])
        acted = [self.action_model(layer, part, conditioning) for part, (_, conditioning) in zip(parts, segments)]
        return Residual(torch.cat(acted))


class MatrixGameNetwork(WanNetwork):
    """See the module's docstring. `forward` is Wan's; its `crosses` are `ActionConditioning`s that are `placed`."""

    FULL_PRECISION = (*WanNetwork.FULL_PRECISION, "action_model")
    config: MatrixGameConfig

    def __init__(self, config: MatrixGameConfig):
        super().__init__(config)
        for i in range(config.action_layers):
            self.blocks[i] = ActionLayer(config)

    def picture_cache(self, tokens: Tensor) -> CrossCache:
        """The cross-attention cache of a picture: its tokens [n, image_dim] stand where Wan has words."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.image_dim:
            raise ValueError(f"tokens must be [n, {self.config.image_dim}], got {list(tokens.shape)}")
        context = self.img_emb(tokens.to(self.head.modulation))
        return CrossCache([block.cross_attn.text_cache(context) for block in self.blocks])  # type: ignore[operator, union-attr]
