"""The recorded runs of Wan's relatives in tests/models/golden, and what replays them through the decode loop.

`replay` runs the loop over a KVStore; `replay_dense` runs the same loop and network in float64 over `DenseTable`, which
stands in for a page table and keeps plain lists of K and V: what the paper says, without a page.
"""

import copy
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from inferix.decode.sequential import SequentialDecoder
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.adapters import latents_of
from inferix.models.wan.checkpoint import config_of
from inferix.models.wan.names import canonical
from inferix.models.wan.network import WanConfig, WanNetwork
from inferix_kernels import KVStore, Policy
from inferix_kernels.reference.qkv import normalise, rotate
from inferix_kernels.store import Block

GOLDEN = Path(__file__).parent / "golden"
HINTS = {"heads": 3, "text_len": 24}  # what the shapes of the recorded weights do not show
PAGE = 8  # slots: a frame of 15 or 21 tokens ends in a page that is partly valid


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict


def network_from(tensors, dtype=torch.float32):
    """A network from recorded weights, without the loader under test elsewhere."""
    weights = canonical({name: x for name, x in tensors.items() if name.startswith("model.")}, "golden")
    network = WanNetwork(config_of(weights, HINTS, "golden"))
    state = {
        name: torch.cat([weights[name.replace("qkv", letter)] for letter in "qkv"])
        if ".qkv." in name
        else weights[name]
        for name in network.state_dict()
    }
    network.load_state_dict(state)
    return network.to(dtype)


def tiny_config(**changes):
    return dataclasses.replace(
        WanConfig(dim=96, layers=2, heads=3, ffn=160, freq_dim=64, text_dim=40, text_len=24), **changes
    )


def random_network(config, seed=0, dtype=torch.float32):
    return fill(WanNetwork(config), seed).to(dtype).eval().requires_grad_(False)


def fill(network, seed=0):
    """Weights large enough that nothing is nearly the identity; the published head would be zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in network.named_parameters():
        drawn = torch.randn(x.shape, generator=generator)
        if x.ndim > 1 and "modulation" not in name:
            x.data = drawn * (2 / x[0].numel()) ** 0.5
        else:
            x.data = 0.1 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


class Replay(SequentialDecoder):
    """The decode loop with recorded noise instead of drawn, which notes the clean prediction of every step."""

    def __init__(self, model, table, draws):
        super().__init__(model, table, torch.Generator())
        self.draws, self.x0, self.held = iter(draws), [], []

    def step(self, conditioning):
        self.x0.append([])
        clean = super().step(conditioning)
        self.x0[-1].append(clean)
        # What the block attended to: the past as its table stands, and itself.
        self.held.append([*self.table.held, *self.recent[-1].block.frames])
        return clean

    def _sampler(self, levels, frames):
        sampler = super()._sampler(levels, frames)

        def noting(step, x, clean):
            self.x0[-1].append(clean)
            return sampler(step, x, clean)

        return noting

    def _noise(self, frames):
        drawn = next(self.draws)
        return drawn.to(self.model.network.dtype)


def model_for(tensors, name, dtype=torch.float32, **changes):
    noise = next(tensors[name] for name in ("inputs.noise", "noise", "noise.0") if name in tensors)
    height, width = (latents_of(ADAPTERS[name]).stride * side for side in noise.shape[-2:])
    adapter = dataclasses.replace(ADAPTERS[name], size=(height, width), **changes)
    return Wan(network_from(tensors, dtype), adapter)


def draws_of(tensors, block_frames, blocks):
    """Recorded noise in the order in which the loop asks for it."""
    noise, renoise = tensors["inputs.noise"][0], tensors["inputs.renoise"]
    order = []
    for first in range(0, blocks * block_frames, block_frames):
        frames = slice(first, first + block_frames)
        order.append(noise[frames])
        order += [again.flatten(0, 1)[frames] for again in renoise.transpose(0, 1)]
    return order


def table_for(model, policy, kv="fp32", backend="reference", frames=None, scratch_blocks=2, pools=None):
    size = model.adapter.block_frames
    store = KVStore(
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        frame_tokens=model.frame_tokens,
        block_frames=size,
        scratch_blocks=scratch_blocks,
        pools=pools or {kv: frames or policy.window + policy.sink},
        page_size=PAGE,
        turn_back=model.turn_back,
        backend=backend,
    )
    return store.open(policy)


def run(model, tensors, table, blocks):
    """Replay `blocks` blocks, the last one's clean pass included, as the published loops run it."""
    decoder = Replay(model, table, draws_of(tensors, model.adapter.block_frames, blocks))
    condition = model.conditioning_from(tensors["inputs.prompt_embeds"][0])
    for _ in range(blocks):
        decoder.step(condition)
    decoder.commit_pending()
    assert next(decoder.draws, None) is None
    return decoder


@dataclasses.dataclass
class DensePass:
    table: "DenseTable"
    blocks: list
    rope: torch.Tensor
    commit: Block | None
    predict: bool = True
    see: list | None = None

    def attend(self, layer, qkv, norm_q, norm_k, eps):
        table, dim = self.table, qkv.shape[1] // 3
        q, k, v = qkv.split(dim, 1)
        q, k = (
            normalise(x, weight, None, eps).unflatten(1, (table.heads, -1)) for x, weight in ((q, norm_q), (k, norm_k))
        )
        if table.policy.time == "absolute":
            q, k = (rotate(x, self.rope, True) for x in (q, k))
        v = v.unflatten(1, (table.heads, -1))
        frames = [frame for block in self.blocks for frame in block.frames]
        made = dict(zip(frames, zip(k.split(table.frame_tokens), v.split(table.frame_tokens))))
        if self.commit is not None:
            table.cache[layer].update({frame: made[frame] for frame in self.commit.frames})
        held, out = table.cache[layer] | made, []
        sees = self.see or [[f for f in held if f < b.first and table.sees(f, b.end)] for b in self.blocks]
        for block, others in zip(self.blocks, sees):
            seen = sorted({*others, *block.frames})
            queries, (keys, values) = self._rows(q, block), (torch.cat(part) for part in zip(*(held[f] for f in seen)))
            if table.policy.time == "relative":
                places = range(seen.index(block.first), seen.index(block.end - 1) + 1)
                keys, queries = (
                    rotate(x, table.rope(f), True) for x, f in ((keys, range(len(seen))), (queries, places))
                )
            past = 0.0 if block is self.commit else table.policy.past_bias
            bias = [past * (f not in block.frames and f >= table.policy.sink) for f in seen]
            attended = F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in (queries, keys, values)),
                torch.tensor(bias, dtype=q.dtype).repeat_interleave(table.frame_tokens)[None],
            )
            out.append(attended.transpose(0, 1))
        return torch.cat(out).flatten(1)

    def _rows(self, q, block):
        first = sum(len(other.frames) for other in self.blocks[: self.blocks.index(block)])
        return q[first * self.table.frame_tokens : (first + len(block.frames)) * self.table.frame_tokens]


class DenseTable:
    """As much of a PageTable as the loop asks for, with K and V in lists of the network's own dtype; where the policy
    counts time anew, K is not rotated until it is read."""

    can_fuse = True

    def __init__(self, model, policy=Policy()):
        self.policy, self.heads, self.frame_tokens, self.rope = policy, model.heads, model.frame_tokens, model.rope
        self.cache = [{} for _ in range(model.layers)]  # per layer: frame -> (k, v)
        self.sealed, self.open, self.next_frame, self.pinned = [], [], 0, set()

    @property
    def held(self):
        end = self.open[-1].end if self.open else self.next_frame
        return [frame for frame in self.sealed if self.sees(frame, end)]

    def sees(self, frame, end):
        return frame in self.pinned or self.policy.sees(frame, self.window_end(end))

    def window_end(self, end):
        return end + self.policy.crowded(end, self.pinned)

    def pin(self, frames):
        self.pinned |= set(frames)

    def unpin(self, frames):
        self.pinned -= set(frames)

    def open_block(self, frames):
        first = self.open[-1].end if self.open else self.next_frame
        self.open.append(Block(first, first + frames))
        return self.open[-1]

    def plan(self, blocks, rope, commit=None, predict=True, see=None, buffers=None):
        return DensePass(self, list(blocks), rope, commit, predict, see)

    def seal(self, block, horizon=None):
        self.open.remove(block)
        self.sealed += block.frames
        self.next_frame = block.end

    def abandon(self, keep=None):
        self.open = [block for block in self.open if block is keep]

    def truncate(self, end):
        self.forget([frame for frame in self.sealed if frame >= end])
        self.next_frame = end

    def check_room(self, blocks, leaving):
        pass

    def forget(self, frames):
        self.sealed = [frame for frame in self.sealed if frame not in frames]
        self.unpin(frames)
        for layer in self.cache:
            for frame in frames:
                layer.pop(frame, None)

    def fork(self):
        other = copy.copy(self)
        other.cache, other.sealed, other.open = [dict(layer) for layer in self.cache], list(self.sealed), []
        other.pinned = set(self.pinned)
        return other

    def gather(self, layer, frames):
        return tuple(torch.cat(part) for part in zip(*(self.cache[layer][frame] for frame in frames)))


def published(network):
    """The network's tensors under the names that Wan published: q, k and v apart."""
    state = {}
    for name, x in network.state_dict().items():
        if ".qkv." in name:
            state |= {name.replace("qkv", letter): part.clone() for letter, part in zip("qkv", x.chunk(3))}
        else:
            state[name] = x
    return state
