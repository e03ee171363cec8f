"""Small modules with the attention of Wan's causal relatives: the signatures and cache contracts of the repositories,
over dense tensors. Written from what is known of them (inferix_kernels/integrations/self_forcing/contract.py).
"""

import math
import types

import torch
import torch.nn.functional as F
from torch import nn

HEADS, WIDTH, GRID, LAYERS = 2, 16, (2, 3), 2
FRAME = GRID[0] * GRID[1]  # tokens
ENDS = ("global_end_index", "local_end_index")
PINS = ("pinned_start", "pinned_len")


def causal_rope_apply(x, grid_sizes, freqs, start_frame=0, t_scale=1.0, method="linear", original_seq_len=None,
                      temporal_offset=0.0):  # fmt: skip
    frames, height, width = grid_sizes[0].tolist()
    time = (torch.arange(frames) + start_frame) * t_scale + temporal_offset
    place = torch.arange(height * width) / 10
    angles = (time[:, None] + place)[..., None].flatten(0, 1) * freqs  # [tokens, D / 2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def softmax_attention(q, k, v, bias=None):
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def roll(cache, sink, evicted, held):
    for name in "kv":
        kept = cache[name][:, sink + evicted : held].clone()
        cache[name][:, sink : held - evicted] = kept


class Attention(nn.Module):
    """What all have in common; each relative has its own `forward`."""

    def __init__(self, window=-1, sink=0):
        super().__init__()
        dim = HEADS * WIDTH
        self.num_heads, self.head_dim, self.local_attn_size, self.sink_size = HEADS, WIDTH, window, sink
        self.max_attention_size = 1 << 20 if window == -1 else window * FRAME
        self.num_frame_per_block, self.frame_seq_length = 3, FRAME
        for name in "qkvo":
            setattr(self, name, nn.Linear(dim, dim))
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def turned(self, x, grid_sizes, freqs, start, **options):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (each.unflatten(-1, (HEADS, WIDTH)) for each in (q, k, v))
        q, k = (causal_rope_apply(each, grid_sizes, freqs, start // FRAME, **options) for each in (q, k))
        return q, k, v

    def placed(self, cache, tokens, start):
        """(evicted, begin, end) in tokens, by the ends in the dict."""
        made, held = (int(cache[name]) for name in ENDS)
        size = cache["k"].shape[1]
        full = self.local_attn_size != -1 and start + tokens > made and tokens + held > size
        evicted = tokens + held - size if full else 0
        end = held + start + tokens - made - evicted
        return evicted, end - tokens, end

    def result(self, q, k, v, bias=None):
        return self.o(softmax_attention(q, k, v, bias).to(q.dtype).flatten(2))

    def newest(self, cache, end, sink=0, pinned=(0, 0)):
        """What of slots 0 .. end - 1 is read: the sink, what is pinned, and the newest."""
        pin, count = pinned
        count = count if sink <= pin < end - self.max_attention_size else 0
        first = max(sink, end - (self.max_attention_size - sink - count))
        parts = slice(0, min(sink, end)), slice(pin, pin + count), slice(first, end)
        return [torch.cat([cache[name][:, part] for part in parts], 1) for name in "kv"]


def self_forcing():
    class CausalWanSelfAttention(Attention):
        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
            return _written_by_attention(self, x, grid_sizes, freqs, kv_cache, current_start)

    return _module("stand_in.self_forcing", CausalWanSelfAttention)


def _written_by_attention(self, x, grid_sizes, freqs, kv_cache, current_start):
    q, k, v = self.turned(x, grid_sizes, freqs, current_start)
    if kv_cache is None:
        return self.result(q, k, v)
    evicted, begin, end = self.placed(kv_cache, x.shape[1], current_start)
    if evicted:
        roll(kv_cache, self.sink_size * FRAME, evicted, int(kv_cache["local_end_index"]))
    kv_cache["k"][:, begin:end], kv_cache["v"][:, begin:end] = k, v
    for name, number in zip(ENDS, (current_start + x.shape[1], end)):
        kv_cache[name].fill_(number)
    return self.result(q, *self.newest(kv_cache, end))


def causvid():
    class CausalWanSelfAttention(Attention):
        def __init__(self):
            super().__init__()
            del self.local_attn_size, self.sink_size, self.max_attention_size

        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, current_end=0):
            q, k, v = self.turned(x, grid_sizes, freqs, current_start)
            if kv_cache is None:
                return self.result(q, k, v)
            kv_cache["k"][:, current_start:current_end], kv_cache["v"][:, current_start:current_end] = k, v
            return self.result(q, kv_cache["k"][:, :current_end], kv_cache["v"][:, :current_end])

    return _module("stand_in.causvid", CausalWanSelfAttention)


def _written_by_model(self, x, grid_sizes, freqs, kv_cache, current_start, protected=False, pinned=None, **options):
    """Attends to a copy, and tells the model what to write."""
    q, k, v = self.turned(x, grid_sizes, freqs, current_start, **options)
    if kv_cache is None:
        return self.result(q, k, v)
    evicted, begin, end = self.placed(kv_cache, x.shape[1], current_start)
    made, held = (int(kv_cache[name]) for name in ENDS)
    again = current_start + x.shape[1] <= made and current_start > 0
    sink, pinned = (self.sink_size * FRAME, (0, 0)) if pinned is None else pinned
    first = max(begin, sink) if again and protected else begin
    update = {
        "action": "roll_and_insert" if evicted else "direct_insert",
        **{"sink": sink, "evicted": evicted, "held": held, "first": first, "end": end, "is_recompute": again},
        "rolled": evicted if pinned[1] and pinned[0] >= sink else 0,
        **{"k": k[:, first - begin :], "v": v[:, first - begin :]},
    }
    seen = {name: kv_cache[name].clone() for name in "kv"}
    _write(seen, update)
    out = self.result(q, *self.newest(seen, end, sink, pinned))
    return out, (current_start + x.shape[1], end, update)


def _write(cache, update):
    if update["action"] not in ("roll_and_insert", "direct_insert"):
        return
    if update["evicted"]:
        roll(cache, update["sink"], update["evicted"], update["held"])
    for name in "kv":
        cache[name][:, update["first"] : update["end"]] = update[name]
    if update["rolled"] and "pinned_start" in cache:
        cache["pinned_start"].sub_(update["rolled"])


def longlive1():
    class CausalWanSelfAttention(Attention):
        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
                    sink_recache_after_switch=False):  # fmt: skip
            protected = not sink_recache_after_switch
            return _written_by_model(self, x, grid_sizes, freqs, kv_cache, current_start, protected)

    return _module("stand_in.longlive1", CausalWanSelfAttention)


def longlive2():
    class CausalWanSelfAttention(Attention):
        global_sink_size = 0

        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
                    t_scale=1.0, use_relative_rope=False, method="linear", original_seq_len=None,
                    temporal_offset=0.0):  # fmt: skip
            options = {"t_scale": t_scale, "temporal_offset": temporal_offset}
            pinned = None
            if kv_cache is not None and "pinned_start" in kv_cache:
                first, at, count = self.global_sink_size * FRAME, *(int(kv_cache[n]) for n in PINS)
                count = count if at >= 0 else 0
                sink = max(first, self.sink_size * FRAME) if count == 0 else first + count * (at == first)
                pinned = sink, ((at, count) if count and at != first else (0, 0))
            return _written_by_model(self, x, grid_sizes, freqs, kv_cache, current_start, pinned=pinned, **options)

    return _module("stand_in.longlive2", CausalWanSelfAttention)


def krea():
    class CausalWanSelfAttention(Attention):
        def __init__(self, window=-1, sink=0):
            super().__init__(window, sink)
            self.fused_projections = False

        def fuse_projections(self):
            self.to_qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
            for name in ("weight", "bias"):
                parts = [getattr(getattr(self, part), name) for part in "qkv"]
                setattr(self.to_qkv, name, nn.Parameter(torch.cat(parts), requires_grad=False))
            self.fused_projections = True

        def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
                    kv_cache_attention_bias=1.0):  # fmt: skip
            tokens = x.shape[1]
            if kv_cache is None or block_mask is not None:
                q, k, v = self.turned(x, grid_sizes, freqs, 0)
                if kv_cache is not None:
                    kv_cache["k"][:, :tokens], kv_cache["v"][:, :tokens] = k, v
                    kv_cache.update(dict.fromkeys(ENDS, tokens))
                return self.result(q, k, v, block_mask)
            q, k, v = self.turned(x, grid_sizes, freqs, current_start)
            evicted, begin, end = self.placed(kv_cache, tokens, current_start)
            if evicted:
                roll(kv_cache, self.sink_size * FRAME, evicted, int(kv_cache["local_end_index"]))
            kv_cache["k"][:, begin:end], kv_cache["v"][:, begin:end] = k, v
            kv_cache.update(zip(ENDS, (current_start + tokens, end)))
            keys, values = self.newest(kv_cache, end)
            bias = torch.zeros(keys.shape[1], dtype=torch.double)
            bias[FRAME : keys.shape[1] - FRAME * self.num_frame_per_block] = math.log(kv_cache_attention_bias)
            return self.result(q, keys, values, bias[None])

    return _module("stand_in.krea", CausalWanSelfAttention)


def _module(name, attention):
    class CausalWanModel(nn.Module):
        """The layers, and what a repository's model does with their caches. block_mask: see krea."""

        def __init__(self, **options):
            super().__init__()
            self.layers = nn.ModuleList(attention(**options) for _ in range(LAYERS))
            self.freqs, self.block_mask = 10.0 ** -torch.arange(WIDTH // 2), None

        def forward(self, x, **given):
            return self._forward_inference(x, **given)

        def _forward_inference(self, x, kv_cache=None, current_start=0, **given):
            grid = torch.tensor([[x.shape[1] // FRAME, *GRID]] * len(x))
            lens, updates = torch.full((len(x),), x.shape[1]), []
            for i, layer in enumerate(self.layers):
                cache = None if kv_cache is None else kv_cache[i]
                out = layer(x, lens, grid, self.freqs, self.block_mask, cache, current_start, **given)
                if isinstance(out, tuple):
                    out, update = out
                    updates.append((kv_cache[i], update))
                x = x + out
            for cache, (made, held, update) in updates:
                _write(cache, update)
                if not update["is_recompute"]:
                    cache["global_end_index"].fill_(made)
                    cache["local_end_index"].fill_(held)
            return x

    module = types.ModuleType(name)
    module.CausalWanSelfAttention, module.causal_rope_apply = attention, causal_rope_apply
    module.CausalWanModel = CausalWanModel
    return module


def caches(frames, batch=1, ends=True, dtype=torch.float32):
    size = (batch, frames * FRAME, HEADS, WIDTH)
    made = []
    for _ in range(LAYERS):
        made.append({"k": torch.zeros(size, dtype=dtype), "v": torch.zeros(size, dtype=dtype)})
        if ends:
            made[-1] |= {name: torch.tensor([0]) for name in ENDS}
    return made


def tokens(frames, seed, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * FRAME, HEADS * WIDTH, generator=generator)
