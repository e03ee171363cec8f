"""Train the tiny world model on its simulator: `python -m inferix.models.tiny.train --help`.

Two stages in one run, under one warm-up / hold / decay schedule:

1. Teacher forcing (until --own-from): clips of two blocks, each denoised given the true, lightly noised block before it.
2. Self-rollout with few-step distillation: clips of four blocks whose context blocks are what the model itself generates in its own
   few-step schedule, and the noisy input is its own previous estimate, noised again; the target stays the true
   frame. The model learns to heal its own errors, at the noise levels at which it will be sampled.

Clips are simulated on the fly. A checkpoint holds everything, so that `--resume` continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .model import TinyConfig, TinyWorldModel, few_step_times, patchify, rope_angles
from .simulator import SPRITE, TILE, Simulator


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of x [..., D] by angles whose cos and sin are [..., D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class DenseAttend:
    """Block-causal attention over clean blocks 0 .. n-2 followed by noisy blocks first .. n-1.

    Block j of either stream sees the clean blocks before j and itself. This is what the paged cache computes block
    by block, written densely for training: a second stream instead of a mask.
    """

    def __init__(self, config: TinyConfig, blocks: int, first: int):
        self.config, self.clean = config, blocks - 1
        self.order = [*range(blocks - 1), *range(first, blocks)]  # block index along S
        frames = torch.tensor(self.order)[:, None] * config.block_frames + torch.arange(config.block_frames)
        angles = rope_angles(config, frames).flatten(1, 2)[:, :, None]  # [S, L, 1, D / 2]
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def __call__(self, layer: int, qkv: Tensor, norm_q: Tensor, norm_k: Tensor) -> Tensor:
        heads = (self.config.heads, self.config.head_dim)
        q, k, v = qkv.chunk(3, -1)
        q, k = (F.rms_norm(z.float(), z.shape[-1:], norm, self.config.eps) for z, norm in ((q, norm_q), (k, norm_k)))
        q, k = (rotate(z.unflatten(-1, heads), self.cos, self.sin).to(v.dtype) for z in (q, k))
        q, k, v = (z.transpose(2, 3) for z in (q, k, v.unflatten(-1, heads)))  # [B, S, heads, L, D]
        out = []
        for s, block in enumerate(self.order):
            seen = [*range(block), s]
            keys, values = (torch.cat([z[:, i] for i in seen], 2) for z in (k, v))
            # Written out: compiled, this is about twice as fast on a CPU as the fused op and its backward.
            scores = (q[:, s] * self.config.head_dim**-0.5) @ keys.transpose(-1, -2)
            out.append(scores.float().softmax(-1).to(v.dtype) @ values)
        return torch.stack(out, 1).transpose(2, 3).flatten(3)


def initialise(model: TinyWorldModel) -> None:
    """Mimetic start: a query finds the key of its own place, and attention copies. Without it, nothing is learned early."""
    config = model.config
    for table in (model.action, model.words):
        torch.nn.init.normal_(table.weight, std=0.5)
    torch.nn.init.normal_(model.action_token.weight, std=0.2)
    torch.nn.init.normal_(model.time_projection.weight, std=0.02)
    for linear in (model.time_projection, model.head):
        torch.nn.init.zeros_(linear.bias)
    torch.nn.init.zeros_(model.head.weight)
    for layer in model.layers:
        q, k, v = layer.qkv.weight.data.chunk(3)
        for head in range(config.heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            torch.nn.init.orthogonal_(q[rows])
            k[rows] = q[rows]
            torch.nn.init.orthogonal_(v[rows])
        layer.out.weight.data = v.T.contiguous() * 0.25
        layer.qkv.bias.data.zero_()
        layer.out.bias.data.zero_()
        layer.down.weight.data *= 0.3


@dataclasses.dataclass
class Clip:
    """B clips of `blocks` blocks: tokens [B, blocks, L, patch], actions [B, blocks, frames], themes [B, blocks, 2], and
    touched [B, blocks, L] bool: tokens where a sprite is, or was one frame ago."""

    tokens: Tensor
    actions: Tensor
    themes: Tensor
    touched: Tensor


def simulate(world: Simulator, blocks: int, frames: int, switch: float = 0.1) -> Clip:
    """Play `blocks` blocks under a wandering player; the theme changes at a block boundary with chance `switch`."""
    images, actions, themes, touched = [], [], [], []
    before = _sprite_tokens(world)
    for block in range(blocks):
        if block:
            new = world.rng.random(world.batch) < switch
            theme = np.stack([world.rng.integers(0, 4, world.batch), world.rng.integers(0, 2, world.batch)], 1)
            world.theme = np.where(new[:, None], theme, world.theme)
        themes.append(world.theme.copy())
        for _ in range(frames):
            actions.append(world.wander())
            world.step(actions[-1])
            images.append(world.render())
            now = _sprite_tokens(world)
            touched.append(now | before)
            before = now
    tokens = patchify(torch.from_numpy(np.stack(images, 1)).float() / 127.5 - 1)
    return Clip(
        tokens.unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(actions, 1)).unflatten(1, (blocks, -1)),
        torch.from_numpy(np.stack(themes, 1)),
        torch.from_numpy(np.stack(touched, 1)).flatten(2).unflatten(1, (blocks, -1)).flatten(2),
    )


def _sprite_tokens(world: Simulator) -> np.ndarray:
    """[B, 8, 8] bool: tiles that a sprite covers in part."""
    covered = np.zeros_like(world.kinds, bool)
    corners = world.sprite_corners()
    rooms = np.arange(world.batch)[:, None]
    for dy in (0, SPRITE - 1):
        for dx in (0, SPRITE - 1):
            covered[rooms, (corners[..., 0] + dy) // TILE, (corners[..., 1] + dx) // TILE] = True
    return covered


class Trainer:
    """Model, optimizers, schedule and one training step. `state` and `load` make a run resumable."""

    def __init__(self, args: argparse.Namespace, config: TinyConfig):
        torch.manual_seed(args.seed)
        self.args, self.config = args, config
        self.model = TinyWorldModel(config)
        initialise(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2 and min(p.shape) > 6]
        ids = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in ids]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.attends = {key: DenseAttend(config, *key) for key in ((2, 0), (2, 1), (4, 0), (4, 1))}
        self.world = Simulator(args.batch, np.random.default_rng(args.seed))
        self.step = 0
        self.predict = torch.compile(self._predict, dynamic=False) if args.compile else self._predict

    def _predict(
        self, first: int, context: Tensor, noisy: Tensor, t_context: Tensor, t: Tensor, actions: Tensor, themes: Tensor
    ) -> Tensor:
        """Clean prediction [B, n - first, L, patch] of noisy blocks first .. n-1, from the n-1 context blocks.

        noisy, t are [B, n - first, ...]; context, t_context [B, n - 1, ...]; actions, themes [B, n, ...].
        """

        def both(z: Tensor) -> Tensor:
            return torch.cat([z[:, :-1], z[:, first:]], 1)

        cross = self.model.prompt_cache(both(themes))
        x, levels = torch.cat([context, noisy], 1), torch.cat([t_context, t], 1)
        attend = self.attends[themes.shape[1], first]
        return self.model(x, levels, both(actions), cross, attend, predict=slice(context.shape[1], None))

    def learning_rate(self) -> float:
        """Share of the peak: linear warm-up, hold, linear decay over the last part of the run."""
        left = (self.args.steps - self.step) / (self.args.decay * self.args.steps)
        return min(1.0, (self.step + 1) / self.args.warmup, left + 0.01)

    @torch.no_grad()
    def own_blocks(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """What the model makes of a clip from its first block on: [B, n, L, patch], and the error of each block [B, n].

        All blocks are predicted at once from the previous round's blocks, so d rounds are an exact rollout of depth
        d; deeper blocks are rollouts from nearer context.
        """
        own = clip.tokens
        clean = torch.zeros(own.shape[0], own.shape[1] - 1)
        levels = few_step_times(self.args.sample_steps, self.args.shift)
        for _ in range(int(self.world.rng.integers(1, 4))):
            x0 = own[:, 1:]
            for i, level in enumerate(levels[: 1 + int(self.world.rng.integers(len(levels)))]):
                noise = torch.randn_like(x0)
                noisy = noise if i == 0 else (1 - level) * x0 + level * noise
                x0 = self.predict(1, own[:, :-1], noisy, clean, clean + level, clip.actions, clip.themes).float()
                x0 = x0.clamp(-1, 1)
            own = torch.cat([clip.tokens[:, :1], x0], 1)
        error = ((own - clip.tokens).square().mean(-1) * clip.touched).sum(-1) / clip.touched.sum(-1)
        return own, error

    def train_step(self) -> dict[str, float]:
        args = self.args
        late = self.step >= args.own_from * args.steps
        blocks, first = 4 if late else 2, int(self.step % 3 > 0)
        self.world.reset(self.world.rng.random(self.world.batch) < 0.5)
        clip = simulate(self.world, blocks, self.config.block_frames)
        if late:  # a third of the clips, as they are longer and rolled out first
            clip = Clip(*(z[: args.batch // 3] for z in dataclasses.astuple(clip)))
        truth, shape = clip.tokens, clip.tokens.shape[:2]
        block_weight = torch.ones(shape)
        block_weight[:, 0] = args.first_weight
        context = origin = truth
        if late and self.world.rng.random() < args.own_share:
            context, error = self.own_blocks(clip)
            # Past the first block that went astray the true frames are no longer the right answer.
            sound = (error < args.sound).float().cumprod(1)
            block_weight[:, 1:] *= sound[:, :-1]
            on_policy = (torch.rand(shape) < 0.5) & (sound > 0)
            on_policy[:, 0] = False
            origin = torch.where(on_policy[..., None, None], context, truth)
        t = torch.rand(shape)
        t = (args.shift * t / (1 + (args.shift - 1) * t)).clamp(min=0.02)
        t_context = (torch.rand(shape[0], 1) * 0.25 * (torch.rand(shape[0], 1) < 0.5)).expand(-1, blocks - 1)
        noisy = origin + t[..., None, None] * (torch.randn_like(origin) - origin)
        context = context[:, :-1] + t_context[..., None, None] * (torch.randn_like(context[:, :-1]) - context[:, :-1])

        x0 = self.predict(first, context, noisy[:, first:], t_context, t[:, first:], clip.actions, clip.themes).float()
        error = (x0 - truth[:, first:]).square().mean(-1)  # [B, n - first, L]
        weight = (1 + args.motion * clip.touched) * (block_weight / t.clamp(min=0.3))[..., None]
        loss = (error * weight[:, first:]).mean()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * self.learning_rate()
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        keep = min(args.average, self.step / (self.step + 100))
        for mean, new in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(new.detach(), 1 - keep)
        self.step += 1
        touched = clip.touched[:, 1:].unflatten(2, (self.config.block_frames, -1))
        nexts = error[:, 1 - first :].detach()
        sprites = (nexts.unflatten(2, (self.config.block_frames, -1)) * touched).sum((0, 1, 3)) / touched.sum((0, 1, 3))
        report = {"next": nexts.mean(), "norm": norm} | {f"sprites{f}": value for f, value in enumerate(sprites)}
        if not first:
            report["first"] = error[:, 0].detach().mean()
        if late:
            report["unsound"] = (block_weight[:, 1:] == 0).float().mean()
        return {name: float(value) for name, value in report.items()}

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"model": self.model.state_dict(), "average": self.average.state_dict(), "optimizers": optimizers, "step": self.step}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        torch.manual_seed(self.args.seed + self.step)
        self.world = Simulator(self.args.batch, np.random.default_rng(self.args.seed + self.step))


def export(model: TinyWorldModel, path: Path, note: dict[str, str]) -> None:
    """Write the weights as float16 safetensors, with the config that `inferix.models.tiny.load` needs."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, {"config": json.dumps(dataclasses.asdict(model.config))} | note)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inferix.models.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny_training"), help="folder of checkpoint and log")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=12, help="clips per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the run over which the learning rate falls")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running average that is shipped")
    parser.add_argument("--motion", type=float, default=12.0, help="extra weight of tokens with a sprite")
    parser.add_argument("--first-weight", type=float, default=0.3, help="weight of the block without context")
    parser.add_argument("--shift", type=float, default=8.0, help="noise schedule shift")
    parser.add_argument("--sample-steps", type=int, default=2, help="few-step schedule the model is distilled for")
    parser.add_argument("--own-from", type=float, default=0.65, help="share of the run after which self-rollout begins")
    parser.add_argument("--own-share", type=float, default=0.6, help="share of those steps on the model's own context")
    parser.add_argument("--sound", type=float, default=0.04, help="largest sprite error of a context block still learned from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    trainer = Trainer(args, TinyConfig())
    if args.resume:
        trainer.load(torch.load(checkpoint, weights_only=True))
    started, recent = time.time(), []
    print(f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    while trainer.step < args.steps:
        with torch.autocast("cpu", torch.bfloat16):
            recent.append(trainer.train_step())
        if trainer.step % 25 == 0 or trainer.step == args.steps:
            names = sorted({name for entry in recent for name in entry})
            means = {name: round(float(np.mean([e[name] for e in recent if name in e])), 6) for name in names}
            line = json.dumps({"step": trainer.step, "seconds": round(time.time() - started, 1)} | means)
            with log.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
            recent.clear()
        if trainer.step % 250 == 0 or trainer.step == args.steps:
            torch.save(trainer.state(), checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    note = {"command": " ".join(sys.argv[1:] if argv is None else argv), "steps": str(trainer.step)}
    export(trainer.average, args.out / "tiny_world.safetensors", note)


if __name__ == "__main__":
    main()
