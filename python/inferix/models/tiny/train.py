"""Train the tiny world model on its simulator: `python -m inferix.models.tiny.train --help`.

Two stages in one run, under one warm-up / hold / decay schedule:

1. Teacher forcing (until --own-from): clips of two blocks, each denoised given the true, lightly noised one before.
2. Self-rollout with few-step distillation (two steps in three; the third is for blocks without a past): streams of
   the model's own video and the simulator run under the same actions. The context is what the model generated,
   the noisy input its own previous estimate, noised again as its few-step sampler does; the target stays the true
   block. The model learns to heal its own errors, at the noise levels at which it will be sampled. After every block
   the simulator goes on from what the last frame shows, so a player gone astray has a right next place as well: one.

Clips are simulated on the fly. `--resume` continues from the checkpoint; the flags may differ from the first run's.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferix_kernels.files import atomic_write

from .clips import OWN_CONTEXT, PLAYER_WEIGHT, Stream, hard_futures, simulate, simulate_doubled
from .model import Layer, TinyConfig, TinyWorldModel, few_step_times, rope_angles
from .simulator import Simulator

WRONG = 0.003  # error of a token past which it counts like one with a player: what leaks out of a sprite is small
ASTRAY = 0.04  # error of a block's sprites past which the log counts it as gone astray
# Of a stream with two players: which one stays is hard to tell, and must not drown the rest.
SECOND_PLAYER_WEIGHT = 0.3
DOUBLED = 0.5  # share of the blocks without a past in which a second player is begun
FUTURES = 4  # next blocks that a stream tries, each under other actions


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved channel pairs of x [..., D] by angles whose cos and sin are [..., D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class DenseAttend:
    """Block-causal attention over clean blocks 0 .. clean-1 followed by noisy blocks of the indices `noisy`.

    Block j, clean or noisy, sees the clean blocks before j and itself. This is what the paged cache computes block by
    block, written densely for training: more blocks along S instead of a mask. An index may stand in `noisy` several
    times: several futures of one past.
    """

    def __init__(self, config: TinyConfig, clean: int, noisy: Sequence[int]):
        self.config, self.order = config, [*range(clean), *noisy]  # block index along S
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
    """Mimetic start: a query finds the key of its own place, and attention copies."""
    config = model.config
    for table in (model.action, model.words):
        torch.nn.init.normal_(table.weight, std=0.5)
    torch.nn.init.normal_(model.action_token.weight, std=0.2)
    torch.nn.init.normal_(model.time_projection.weight, std=0.02)
    for linear in (model.time_projection, model.head):
        torch.nn.init.zeros_(linear.bias)
    torch.nn.init.zeros_(model.head.weight)
    for layer in model.layers:
        assert isinstance(layer, Layer)
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


def noised(x: Tensor, t: Tensor) -> Tensor:
    """x [B, n, L, patch] at noise level t [B, n]."""
    return x + t[..., None, None] * (torch.randn_like(x) - x)


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
        orders = {"forced": (1, [1]), "forced, first": (1, [0, 1]), "nothing": (0, [0])}
        orders["own"] = (OWN_CONTEXT, [OWN_CONTEXT] * FUTURES)
        self.attends = {name: DenseAttend(config, *order) for name, order in orders.items()}
        self.world = Simulator(args.batch, np.random.default_rng(args.seed))
        self._restart_streams()
        self.step = 0
        self.predict = torch.compile(self._predict, dynamic=False) if args.compile else self._predict

    def _restart_streams(self) -> None:
        self.starts = Simulator(self.args.batch * 5 // 2, self.world.rng)
        self.streams = [Stream(self.config.block_frames, self.world.rng) for _ in range(max(1, self.args.batch // 2))]

    def _predict(
        self, order: str, context: Tensor, noisy: Tensor, t_context: Tensor, t: Tensor, actions: Tensor, themes: Tensor
    ) -> Tensor:
        """Clean prediction [B, n, L, patch] of n noisy blocks from m context blocks, in one of self.attends' orders.

        noisy, t are [B, n, ...]; context, t_context [B, m, ...]; actions, themes [B, m + n, ...].
        """
        cross = self.model.prompt_cache(themes)
        x, levels = torch.cat([context, noisy], 1), torch.cat([t_context, t], 1)
        return self.model(x, levels, actions, cross, self.attends[order], predict=slice(context.shape[1], None))

    def learning_rate(self) -> float:
        """Share of the peak: linear warm-up, hold, linear decay over the last part of the run."""
        left = (self.args.steps - self.step) / (self.args.decay * self.args.steps)
        return min(1.0, (self.step + 1) / self.args.warmup, left + 0.01)

    def train_step(self) -> dict[str, float]:
        late = self.step >= self.args.own_from * self.args.steps
        if late:
            loss, report = self._own_loss() if self.step % 4 else self._nothing_loss()
        else:
            loss, report = self._forced_loss()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * self.learning_rate()
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        report["norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        keep = min(self.args.average, self.step / (self.step + 100))
        for mean, new in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(new.detach(), 1 - keep)
        self.step += 1
        return {name: float(value) for name, value in report.items()}

    def _forced_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1: two blocks, the true first one (lightly noised in half the clips) as context of the second."""
        args, first = self.args, int(self.step % 3 > 0)  # every third step also learns a block without a past
        self.world.reset(self.world.rng.random(self.world.batch) < 0.5)
        clip = simulate(self.world, 2, self.config.block_frames)
        truth, shape = clip.tokens, clip.tokens.shape[:2]
        t = self._times(shape)
        t_context = torch.rand(shape[0], 1) * 0.25 * (torch.rand(shape[0], 1) < 0.5)
        noisy, context = noised(truth, t), noised(truth[:, :-1], t_context)
        order, blocks = ("forced", [0, 1]) if first else ("forced, first", [0, 0, 1])
        actions, themes = clip.actions[:, blocks], clip.themes[:, blocks]
        x0 = self.predict(order, context, noisy[:, first:], t_context, t[:, first:], actions, themes).float()
        error = (x0 - truth[:, first:]).square().mean(-1)  # [B, 2 - first, L]
        weight = self._weight(clip.touched) / t.clamp(min=0.3)[..., None]
        weight[:, 0] *= args.first_weight
        report = self._sprite_errors("sprites", error[:, -1], clip.touched[:, -1]) | {
            "next": error[:, -1].detach().mean()
        }
        if not first:
            report["first"] = error[:, 0].detach().mean()
        return (error * weight[:, first:]).mean(), report

    def _nothing_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 2, every fourth step: blocks without a past."""
        self.starts.reset(self.world.rng.random(self.starts.batch) < 0.5)
        clip, seen = simulate_doubled(self.starts, self.config.block_frames, DOUBLED)
        t = self._times(clip.tokens.shape[:2])
        none = clip.tokens[:, :0]
        x0 = self.predict("nothing", none, noised(seen, t), t[:, :0], t, clip.actions, clip.themes).float()
        error = (x0 - clip.tokens).square().mean(-1)
        weight = self.args.first_weight * self._weight(clip.touched) / t.clamp(min=0.3)[..., None]
        return (error * weight).mean(), {"first": error.detach().mean()}

    def _times(self, shape: tuple[int, ...]) -> Tensor:
        """Noise levels, shifted towards noise."""
        u = torch.rand(shape)
        return (self.args.shift * u / (1 + (self.args.shift - 1) * u)).clamp(min=0.02)

    def _own_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 2: every stream makes its next block in the few-step schedule, and learns from one of the steps.

        It makes several next blocks, under different actions: the past is computed once, and what an action changes
        is seen side by side.
        """
        args = self.args
        doubled = self.world.rng.random(len(self.streams)) < args.second_player
        for stream, appears in zip(self.streams, doubled):
            stream.restart_if_lost(args.sound)
            if appears:
                stream.add_second_player()
        calm = ~torch.from_numpy(doubled)
        says = torch.where(calm, 1.0, SECOND_PLAYER_WEIGHT)[:, None, None]
        frames = self.config.block_frames
        keys = [hard_futures(stream.world, FUTURES, frames) for stream in self.streams]
        futures = [stream.world.repeat(FUTURES) for stream in self.streams]
        clips = [simulate(world, 1, frames, first_switch=0.1, keys=held) for world, held in zip(futures, keys)]
        truth, touched, actions, themes = (  # [streams, FUTURES, ...]
            torch.stack([getattr(clip, name)[:, 0] for clip in clips])
            for name in ("tokens", "touched", "actions", "themes")
        )
        context, past_actions, past_themes = (
            torch.stack([getattr(s, n) for s in self.streams]) for n in Stream.HISTORY
        )
        both = torch.cat([past_actions, actions], 1), torch.cat([past_themes, themes], 1)
        clean = torch.zeros(context.shape[:2])
        levels = few_step_times(args.sample_steps, args.sample_shift)
        learned = int(self.world.rng.integers(len(levels)))
        x = torch.randn_like(truth)
        for i, t in enumerate(levels):
            level = torch.full(truth.shape[:2], t)
            with torch.set_grad_enabled(i == learned):
                x0 = self.predict("own", context, x, clean, level, *both).float()
            error = (x0 - truth).square().mean(-1)
            if i == learned:
                wrong = (error.detach() > WRONG) * PLAYER_WEIGHT
                loss = (error * self._weight(torch.maximum(touched, wrong)) * says / t).mean()
            x0 = x0.detach().clamp(-1, 1)
            x = noised(x0, torch.full(truth.shape[:2], levels[i + 1])) if i + 1 < len(levels) else x0
        strayed = ((x - truth).square().mean(-1) * touched).sum(2) / touched.sum(2)
        # Life goes on as it comes or, every other time, the hardest way.
        moved = [
            stream.advance(
                futures[i].pick(way), x[i, way : way + 1], actions[i, way : way + 1], themes[i, way : way + 1]
            )
            for i, (stream, way) in enumerate(zip(self.streams, self.world.rng.integers(0, 2, len(self.streams))))
        ]
        report = self._sprite_errors("own_sprites", error.flatten(0, 1), touched.flatten(0, 1))
        report["age"] = torch.tensor([float(stream.age) for stream in self.streams]).mean()
        if calm.any():
            report["astray"] = (strayed > ASTRAY)[calm].float().mean()
            report["moved"] = torch.tensor(moved)[calm].float().mean()
        return loss, report

    def _weight(self, touched: Tensor) -> Tensor:
        return 1 + self.args.motion * touched

    def _sprite_errors(self, name: str, error: Tensor, touched: Tensor) -> dict[str, Tensor]:
        """Mean error of tokens with a sprite, by frame of the block; error, touched [B, L]."""
        error, touched = (z.detach().unflatten(1, (self.config.block_frames, -1)) for z in (error, touched))
        return {f"{name}{f}": value for f, value in enumerate((error * touched).sum((0, 2)) / touched.sum((0, 2)))}

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": optimizers,
            "step": self.step,
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        torch.manual_seed(self.args.seed + self.step)
        self.world = Simulator(self.args.batch, np.random.default_rng(self.args.seed + self.step))
        self._restart_streams()


def export(model: TinyWorldModel, path: Path, note: dict[str, str]) -> None:
    """Write the weights as float16 safetensors, with the config that `inferix.models.tiny.load` needs."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path, "out") as part:
        save_file(state, part, {"config": json.dumps(dataclasses.asdict(model.config))} | note)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inferix.models.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiny_training"), help="folder of checkpoint and log")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors), with a fresh optimizer")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=12, help="clips per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the run over which the learning rate falls")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running average that is shipped")
    parser.add_argument("--motion", type=float, default=12.0, help="extra weight of tokens with a sprite")
    parser.add_argument("--first-weight", type=float, default=0.3, help="weight of the block without context")
    parser.add_argument("--shift", type=float, default=8.0, help="noise schedule shift")
    parser.add_argument("--sample-steps", type=int, default=3, help="few-step schedule the model is distilled for")
    parser.add_argument("--sample-shift", type=float, default=1.0, help="its shift")
    parser.add_argument("--own-from", type=float, default=0.45, help="share of the run after which self-rollout begins")
    parser.add_argument("--second-player", type=float, default=0.06, help="chance of two players in a stream's past")
    parser.add_argument("--sound", type=float, default=0.02, help="error of a frame past which a stream starts over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    trainer = Trainer(args, TinyConfig())
    if args.init:
        for network in (trainer.model, trainer.average):
            network.load_state_dict({name: tensor.float() for name, tensor in load_file(args.init).items()})
    if args.resume:
        trainer.load(torch.load(checkpoint, weights_only=True))
    started, recent = time.time(), []
    print(f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    while trainer.step < args.steps:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # cast anew with and without a gradient
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
            with atomic_write(checkpoint, "out") as part:
                torch.save(trainer.state(), part)
    note = {"command": " ".join(sys.argv[1:] if argv is None else argv), "steps": str(trainer.step)}
    export(trainer.average, args.out / "tiny_world.safetensors", note)


if __name__ == "__main__":
    main()
