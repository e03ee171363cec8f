"""MAGI-1's own call of flex_flash_attn_func in a recorded run: the latents, and the recorded ranges.

Here as in its repository keys and values lie side by side, [tokens, heads, 2 * width], the committed chunks' first; a
forward's q_ranges and k_ranges are tensors, and max_seqlen_q and max_seqlen_k are given (MagiAttention#193).
"""

import torch

from inferix.models.magi import network
from inferix_kernels.integrations.flex_flash_attn import flex_flash_attn_func
from tests.models.magi_golden import DensePass, DenseTable, golden, model_for, recorded_rates, replay, table_for, trace

SINGLE = 2e-5  # of float32 code; see tests/models/golden/README.md


def furthest(got, wanted):
    return (got - wanted).abs().max()


class FlexPass(DensePass):
    def over(self, q, known):
        tokens = self.table.frame_tokens
        first = {frame: i * tokens for i, frame in enumerate(known)}
        buffer = torch.cat([torch.cat(pair, -1) for pair in known.values()])
        q_ranges, k_ranges, row = [], [], 0
        for block, seen in zip(self.blocks, self.see):
            frames = [*seen, *block.frames]
            assert [first[frame] for frame in frames] == [first[frames[0]] + i * tokens for i in range(len(frames))]
            q_ranges.append([row, row := row + len(block.frames) * tokens])
            k_ranges.append([first[frames[0]], first[frames[-1]] + tokens])
        self.table.calls.append({"q_ranges": q_ranges, "k_ranges": k_ranges})
        ranges = (torch.tensor(x, dtype=torch.int32) for x in (q_ranges, k_ranges))
        key, value = buffer.chunk(2, -1)
        out, _ = flex_flash_attn_func(q, key, value, *ranges, max_seqlen_q=len(q), max_seqlen_k=len(key),
                                      softmax_scale=None, deterministic=False,
                                      disable_fwd_atomic_reduction=True)  # fmt: skip
        return out


class FlexTable(DenseTable):
    passes = FlexPass

    def __init__(self, model):
        super().__init__(model)
        self.calls = []


def test_magis_call_gives_its_recorded_latents_and_those_of_our_own_path(monkeypatch):
    run = "distill8"
    monkeypatch.setattr(network, "time_rates", recorded_rates)
    recorded = golden()
    model = model_for(recorded, run)
    table = FlexTable(model)
    _, latents = replay(model, recorded, table)
    assert furthest(latents.transpose(0, 1), recorded[f"outputs.{run}.final"][0]) < SINGLE
    _, ours = replay(model, recorded, table_for(model, backend="compiled"))
    assert furthest(latents, ours) < SINGLE
    made = {str(call) for call in table.calls}
    wanted = [forward for step in trace()[run]["steps"] for forward in step["forwards"]]
    assert made == {str({name: forward[name] for name in ("q_ranges", "k_ranges")}) for forward in wanted}
