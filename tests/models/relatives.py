"""Runs of relatives' own code (tests/models/golden), replayed through the decode loop and measured.

`python -m tests.models.relatives` prints the table of docs/models.md.
"""

import dataclasses
import functools

import torch

from inferix.models.wan import ADAPTERS
from inferix_kernels import Policy
from inferix_kernels.reference.qkv import rotate
from tests.models.replayed import KeepsAll, PipelineReplay, Replayed, cached, in_turn, over, played, recorded
from tests.models.wan_golden import DenseTable, Replay, model_for, table_for


def longlive(file, switch, way, kv="fp32", name="longlive", blocks=8, time="absolute", **changes):
    """Its cache of 12 frames counts its sink of 3. A new prompt from frame `switch` on."""
    tensors, policy = recorded(file), Policy(window=9, sink=3, time=time)
    model, table = over(way, tensors, name, policy, kv, 4, **changes)
    noise = tensors["noise"][0].split(3)[:blocks]
    decoder = Replay(model, table, in_turn(tensors, noise, [3] * blocks))
    fog, rain = (model.conditioning_from(tensors[f"prompts.p{i}"][0]) for i in range(2))
    played(decoder, [fog] * (switch // 3))
    decoder.recache(rain, model.adapter.recache)
    pairs = {}
    for layer in range(model.layers):
        for made, letter in zip(table.gather(layer, list(table.held)), "kv"):
            if letter == "v" or time == "absolute" or way == "dense":  # else theirs is not rotated
                pairs[f"recached.{layer}.{letter}"] = made, tensors[f"recached.{layer}.{letter}"][0]
    latents = played(decoder, [rain] * (blocks - switch // 3))
    pairs["latents"] = latents, tensors["latents"][: 3 * blocks]
    return Replayed(decoder, pairs, cached(range(3, 3 * blocks + 1, 3), 12, sink=3))


def infinity_rope(way, kv="fp32"):
    """Its cache of 6 frames counts its sink of 1."""
    tensors, policy = recorded("infinity_rope"), Policy(window=5, sink=1, time="relative")
    model, table = over(way, tensors, "infinity-rope", policy, kv)
    decoder = Replay(model, table, in_turn(tensors, tensors["noise"][0].split(3)[:6], [3] * 6))
    latents = played(decoder, [model.conditioning_from(tensors["prompts.p0"][0])] * 6)
    return Replayed(decoder, {"latents": (latents, tensors["latents"])}, cached(range(3, 19, 3), 6, sink=1))


def causal_forcing(way, kv="fp32"):
    """A first block of four steps, then two."""
    tensors = recorded("causal_forcing_2step")
    model, table = over(way, tensors, "causal-forcing-framewise-2step", Policy(window=6), kv)
    decoder = Replay(model, table, in_turn(tensors, tensors["noise"][0].split(1), [3] + [1] * 8))
    latents = played(decoder, [model.conditioning_from(tensors["prompts.p0"][0])] * 9)
    return Replayed(decoder, {"latents": (latents, tensors["latents"])}, cached(range(1, 10), 6))


def encoded_again(latents):
    """What stood for a VAE in the recordings: the first latent of the overlap."""
    return torch.cat([latents[:1] * 0.9 + 0.1, latents[1:]])


def causvid(way, kv="fp32"):
    """Two rollouts of 12 frames, the second one after the last 6 of the first."""
    tensors = recorded("causvid_overlap6")
    model, table = over(way, tensors, "causvid", Policy(window=12), kv, rollout=12, overlap=6)
    draws = in_turn(tensors, tensors["noise.0"][0].split(3), [2] * 4)
    draws += in_turn(tensors, tensors["noise.1"][0].split(3)[2:], [2] * 2, first=8)
    decoder = Replay(model, table, draws)
    decoder.restart = encoded_again
    latents = played(decoder, [model.conditioning_from(tensors["prompt"][0])] * 6)
    theirs = torch.cat([tensors["latents.0"], tensors["latents.1"][6:]])
    return Replayed(decoder, {"latents": (latents, theirs)}, cached((3, 6, 9, 12, 9, 12), 12))


def krea(name, way, kv="fp32"):
    """Its context of 3 frames is computed anew before each block."""
    tensors = recorded("krea_realtime")
    model, table = over(way, tensors, name, Policy(window=6), kv)
    decoder = Replay(model, table, in_turn(tensors, tensors["noise"][0].split(3), [4] * 6))
    decoder.restart = encoded_again
    latents = played(decoder, [model.conditioning_from(tensors["prompts.p0"][0])] * 6)
    theirs = tensors[f"latents.{model.adapter.rollout_begins}"]
    return Replayed(decoder, {"latents": (latents, theirs)}, cached((3, 6, 6, 6, 6, 6), 6))


def rolling_forcing(way, kv="fp32"):
    """Ten blocks, five in flight; the last two see a past whose keys were evicted, but for the sink."""
    tensors, blocks, stages = recorded("rolling_forcing"), 10, 5
    policy = Policy(window=21, sink=3, time="relative")
    model, table = over(way, tensors, "rolling-forcing", policy, kv, stages + 2)
    if way == "dense":
        table = KeepsAll(model, policy)
    noise, renoised, draws = tensors["noise"][0].split(3), iter(range(4 * blocks)), []
    for step in range(blocks + stages - 1):  # the new block's own noise, then that of all but one that is done
        draws += noise[step : step + 1]
        draws += [tensors[f"draws.{next(renoised)}"] for block in range(step - 3, step + 1) if 0 <= block < blocks]
    decoder, made = PipelineReplay(model, table, draws, blocks), []
    condition = model.conditioning_from(tensors["prompts.p0"][0])
    for _ in range(blocks + stages - 1):
        latents = decoder.step(condition)
        made.append(latents[: decoder.finished])
    decoder.commit_pending()
    seen = [[frame for frame in row if frame >= 0] for row in tensors["seen.noisy"].tolist()]
    # Theirs are five for the first block, of which the last is kept.
    clean = [[frame for frame in row if frame >= 0] for row in tensors["seen.clean"][stages - 1 :].tolist()]
    held = [frame for frame in table.held if frame < 3 or frame >= 9]
    rows = [15 * (frame if frame < 3 else frame - 6) for frame in held]
    theirs = torch.cat([tensors["cache.1.v"][0, row : row + 15] for row in rows])
    pairs = {"latents": (torch.cat(made), tensors["latents"]), "cache": (table.gather(1, held)[1], theirs)}
    return Replayed(decoder, pairs, [seen, clean])


class Merging(DenseTable):
    """Reward Forcing's merge as its code has it, in unrotated keys, before a block is begun."""

    def open_block(self, frames):
        block = super().open_block(frames)
        for frame in [frame for frame in self.sealed if not self.policy.sees(frame, block.end)]:
            for layer in self.cache:
                sink, leaving = layer[frame % self.policy.sink], layer.pop(frame)
                layer[frame % self.policy.sink] = tuple(0.999 * a + 0.001 * b for a, b in zip(sink, leaving))
            self.sealed.remove(frame)
        return block


def reward_forcing(way, kv="fp32"):
    """Its cache of 9 frames counts its sink of 3, into which five blocks are merged."""
    tensors, adapter = recorded("reward_forcing"), ADAPTERS["reward-forcing"]
    policy = Policy(6, 3, format=kv, sink_format="fp32", time="relative", on_evict=adapter.on_evict)
    model = model_for(tensors, "reward-forcing", torch.float64 if way == "dense" else torch.float32)
    pools = {"fp32": 3 + 3} | {kv: 9 + 3 if kv == "fp32" else 6}
    table = Merging(model, policy) if way == "dense" else table_for(model, policy, kv, way, pools=pools)
    decoder = Replay(model, table, in_turn(tensors, tensors["noise"][0].split(3), [3] * 8))
    latents = played(decoder, [model.conditioning_from(tensors["prompts.p0"][0])] * 8)
    pairs = {"latents": (latents, tensors["latents"])}
    for layer in range(model.layers):
        k, v = (tensors[f"sink.{layer}.{letter}"] for letter in "kv")
        if way != "dense":  # theirs is not rotated
            k = rotate(k, model.rope(range(3)), True)
        pairs |= zip((f"sink.{layer}.k", f"sink.{layer}.v"), zip(table.gather(layer, range(3)), (k, v)))
    return Replayed(decoder, pairs, cached(range(3, 25, 3), 9, sink=3))


def longlive_2(way, kv="fp32", picture=False):
    """Twelve blocks of 4 frames in four shots; its cache of 16 frames counts its sink of 4 and what is pinned. Or three
    blocks, two shots, of a video that begins with a picture."""
    tensors, name = recorded("longlive_2"), "longlive-2-i2v" if picture else "longlive-2"
    policy, shots = Policy(window=12, sink=4, pins_in_window=True), dataclasses.replace(ADAPTERS[name].shots, offset=4)
    model, table = over(way, tensors, name, policy, kv, block_frames=4, shots=shots)
    model.first_latents = tensors["picture"] if picture else None
    prompts = [0, 0, 1] if picture else [0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 5, 5]
    decoder = Replay(model, table, tensors["noise"][0].split(4)[: len(prompts)])
    # The recorded prompts: fog, another shot with rain, rain, another with snow, another with sun, sun.
    said = [model.conditioning_from(tensors[f"prompts.p{i}"][0], begins_shot=i in (1, 3, 4)) for i in range(6)]
    latents = played(decoder, [said[i] for i in prompts])
    theirs = tensors["latents.picture" if picture else "latents"]
    # The blocks in its cache, as recorded.
    blocks = ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 2, 4, 5), (0, 2, 5, 6), (0, 5, 6, 7))
    blocks += ((0, 6, 7, 8), (0, 7, 8, 9), (0, 7, 9, 10), (0, 7, 10, 11))
    held = [[frame for block in each for frame in range(4 * block, 4 * block + 4)] for each in blocks]
    return Replayed(decoder, {"latents": (latents, theirs)}, held[: len(prompts)])


RUNS = {
    "longlive, a new prompt at frame 12": functools.partial(longlive, "longlive_switch12", 12),
    "longlive, a new prompt at frame 15": functools.partial(longlive, "longlive_switch15", 15),
    "longlive-infinity, a new prompt at frame 15": functools.partial(
        longlive, "longlive_infinity", 15, name="longlive-infinity", time="relative"
    ),
    "longlive-2": longlive_2,
    "longlive-2-i2v": functools.partial(longlive_2, picture=True),
    "infinity-rope": infinity_rope,
    "causal-forcing-framewise-2step": causal_forcing,
    "causvid, overlap of 6": causvid,
    "krea-realtime": functools.partial(krea, "krea-realtime"),
    "krea-realtime-first-frame": functools.partial(krea, "krea-realtime-first-frame"),
    "rolling-forcing": rolling_forcing,
    "reward-forcing": reward_forcing,
}


def main():
    print("| run | float64, dense | float32, fp32 pages | int8 pages, PSNR |\n|---|---|---|---|")
    for name, run in RUNS.items():
        errors = [f"{run(way=way).error:.1e}" for way in ("dense", "compiled")]
        print(f"| {name} | {' | '.join(errors)} | {run(way='compiled', kv='int8').psnr:.1f} dB |", flush=True)


if __name__ == "__main__":
    main()
