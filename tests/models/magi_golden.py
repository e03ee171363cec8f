"""The recorded runs of MAGI-1 in tests/models/golden, and what replays them through the pipeline.

`replay` runs over a KVStore; given a `DenseTable`, which stands in for a page table and keeps plain lists of K and V,
it runs the same loop and network in float64, without a page.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from inferix.decode.pipeline import PipelineDecoder
from inferix.models.magi import Magi, MagiConfig, MagiNetwork, MagiSchedule, adapter_for
from inferix.models.magi.network import time_rates
from inferix_kernels import KVStore, Policy
from inferix_kernels.reference import rotate
from inferix_kernels.store import Block

GOLDEN = Path(__file__).parent / "golden"
CHUNKS, CHUNK, FRAME_TOKENS, CAPTION = 5, 6, 15, 17
PAGE = 8  # slots: a frame of 15 tokens ends in a page that is partly valid
CONFIG = MagiConfig(
    dim=192,
    layers=2,
    heads=6,
    ffn=128,
    kv_heads=2,
    head_dim=32,
    cond_dim=48,
    caption_dim=24,
    caption_len=64,
    channels=4,
)
SCHEDULES = {
    "distill8": MagiSchedule(8, distilled=True),
    "cfg3": MagiSchedule(8),
    "distill12": MagiSchedule(12, distilled=True),
}


def recorded_rates(device):
    """time_rates as of the machine that recorded: its float32 exp gave two of them one bit more than is right."""
    rates = time_rates(device)
    rates[[12, 106]] = torch.nextafter(rates[[12, 106]], torch.tensor(1.0, device=device))
    return rates


def golden():
    with safe_open(GOLDEN / "magi_tiny.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


def trace():
    return json.loads((GOLDEN / "magi_trace.json").read_text())["runs"]


def packed(tensors):
    """Published names -> the network's, where q, k and v are one; without the loader that is tested elsewhere."""
    state = {name: x for name, x in tensors.items() if not name.startswith(("inputs.", "outputs."))}
    for name in [name for name in state if ".linear_qkv.q.weight" in name]:
        parts = [state.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


def model_for(tensors, run, dtype=torch.float32, **changes):
    network = MagiNetwork(CONFIG)
    network.load_state_dict(packed(tensors))
    height, width = (8 * side for side in tensors["inputs.noise"].shape[-2:])
    schedule = dataclasses.replace(SCHEDULES[run], **changes)
    adapter = adapter_for("magi-4.5b", schedule, (height, width))
    return Magi(network.to(dtype), adapter, schedule)


def table_for(model, kv="fp32", backend="reference", policy=None, page_size=PAGE):
    policy = policy or Policy(window=model.adapter.window)
    store = KVStore(
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        frame_tokens=model.frame_tokens,
        block_frames=CHUNK,
        scratch_blocks=model.adapter.stages + 2,
        pools={kv: policy.capacity(CHUNK * CHUNKS)[policy.format or kv] if policy.format else policy.window},
        page_size=page_size,
        backend=backend,
    )
    return store.open(policy)


class Replay(PipelineDecoder):
    """The pipeline with recorded noise instead of drawn, which notes what every step leaves and every forward is."""

    def __init__(self, model, table, noise, total=CHUNKS):
        super().__init__(model, table, torch.Generator(), total)
        self.noise, self.after, self.forwards, self.committed = noise, {}, [], table.committed

    def _noise(self, frames):
        return self.noise[CHUNK * self.begun : CHUNK * self.begun + frames].to(self.model.network.dtype)

    def _velocities(self, flight):
        for flying in flight:
            self.after.setdefault(flying.block.first // CHUNK, {})[flying.steps] = flying.x
        self.forwards.append([])
        return super()._velocities(flight)

    def _plan(self, forward, blocks):
        passed = super()._plan(forward, blocks)
        self.forwards[-1].append((forward, blocks, [list(frames) for frames in self.table.noted_see]))
        return passed


def noted(table, layers):
    """The table, noting what each pass sees, and K and V of every chunk that is sealed."""
    plan, seal = table.plan, table.seal

    def noting(blocks, *args, see=None, **options):
        table.noted_see = see
        return plan(blocks, *args, see=see, **options)

    def sealing(block, horizon=None):
        seal(block, horizon)
        table.committed[block.first // CHUNK] = [table.gather(layer, block.frames) for layer in range(layers)]

    table.plan, table.seal, table.noted_see, table.committed = noting, sealing, [], {}
    return table


def replay(model, tensors, table):
    pipeline = Replay(model, noted(table, model.layers), tensors["inputs.noise"][0].transpose(0, 1))
    valid = tensors["inputs.caption_mask"][0].bool()
    prompt = model.conditioning_from(tensors["inputs.caption_embs"][0, 0][valid])
    done = []
    while len(done) < CHUNKS:
        state = pipeline.step(prompt)
        if pipeline.finished:
            pipeline.after[len(done)][model.schedule.steps] = state[:CHUNK]
            done.append(state[:CHUNK])
    return pipeline, torch.cat(done)


@dataclasses.dataclass
class DensePass:
    table: "DenseTable"
    blocks: list
    rope: torch.Tensor
    commit: Block | None
    predict: bool
    see: list

    def attend(self, layer, qkv, norm_q, norm_k, eps, *, norm_q_bias, norm_k_bias, interleaved):
        table, size, heads = self.table, self.table.head_dim, self.table.heads
        q, k, v = qkv.unflatten(1, (-1, size)).split([qkv.shape[1] // size - 2 * heads, heads, heads], 1)
        q, k = (
            rotate(F.layer_norm(x, (size,), weight, bias, eps), self.rope, interleaved)
            for x, weight, bias in ((q, norm_q, norm_q_bias), (k, norm_k, norm_k_bias))
        )
        frames = [frame for block in self.blocks for frame in block.frames]
        own = dict(zip(frames, zip(k.split(table.frame_tokens), v.split(table.frame_tokens))))
        if self.commit is not None:
            table.cache[layer].update({frame: own[frame] for frame in self.commit.frames})
        if not self.predict and layer == len(table.cache) - 1:
            return None
        return self.over(q, table.cache[layer] | own).flatten(1)

    def over(self, q, known):
        """known: frame -> (k, v), of all that were committed and of the pass's own, which come last."""
        out, row = [], 0
        for block, seen in zip(self.blocks, self.see):
            rows = slice(row, row := row + len(block.frames) * self.table.frame_tokens)
            keys, values = (torch.cat(x).transpose(0, 1) for x in zip(*(known[f] for f in [*seen, *block.frames])))
            out.append(F.scaled_dot_product_attention(q[rows].transpose(0, 1), keys, values, enable_gqa=True))
        return torch.cat(out, 1).transpose(0, 1)


class DenseTable:
    """As much of a PageTable as the pipeline asks for, with K and V in lists of the network's own dtype."""

    can_fuse, passes = True, DensePass

    def __init__(self, model):
        self.heads, self.head_dim, self.frame_tokens = model.heads, model.head_dim, model.frame_tokens
        self.cache = [{} for _ in range(model.layers)]  # per layer: frame -> (k, v)
        self.policy, self.pinned = Policy(), set()
        self.held, self.open_blocks = {}, []

    @property
    def next_frame(self):
        return len(self.held)

    def open_block(self, frames):
        first = self.open_blocks[-1].end if self.open_blocks else self.next_frame
        self.open_blocks.append(Block(first, first + frames))
        return self.open_blocks[-1]

    def plan(self, blocks, rope, commit=None, predict=True, see=None, buffers=None):
        return self.passes(self, list(blocks), rope, commit, predict, see)

    def seal(self, block, horizon=None):
        self.open_blocks.remove(block)
        self.held |= dict.fromkeys(block.frames)

    def drop(self, block):
        self.open_blocks.remove(block)

    def gather(self, layer, frames):
        return tuple(torch.cat(part) for part in zip(*(self.cache[layer][frame] for frame in frames)))
