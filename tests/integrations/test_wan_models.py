"""Models of which there are no recordings, run as they are and patched: `pytest --reference DIR tests/integrations`.

DIR holds checkouts of LongLive (branch main) and scope, under these names. Without it the tests are skipped by name.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

from inferix_kernels.integrations import self_forcing
from tests.integrations import wan_repositories as repositories

FLOAT32 = {"atol": 2e-5, "rtol": 0}
SIDE = 8  # tokens of a frame's row and column: two frames are flex_attention's tile, so that Krea's bias pads no keys
FRAME = SIDE * SIDE
SCOPE = "scope.core.pipelines"
LONGLIVE2 = repositories.Layout("LongLive", "wan_5b.modules.causal_model", "utils", "", "", "", ("einops",))
KREA, LONGLIVE1 = (
    repositories.Layout(
        *("scope/src", f"{SCOPE}.{name}.modules.causal_model", "", "", "", ""),
        *(("einops", f"{SCOPE}.wan2_1.modules.attention"),),
    )
    for name in ("krea_realtime_video", "longlive")
)


@pytest.fixture
def opened(request, monkeypatch):
    """(layout, options) -> (module, model), and both ways to run it."""
    root = request.config.getoption("--reference")
    with contextlib.ExitStack() as stack:

        def open_(layout, **options):
            if root is None or not (Path(root) / layout.folder).is_dir():
                pytest.skip(f"no checkout of {layout.folder}: give --reference DIR")
            load = stack.enter_context(repositories.imported(layout, root))
            module = load(layout.attention)
            for each in (module, load(layout.attention.replace("causal_model", "model"))):
                for name in ("attention", "flash_attention"):
                    monkeypatch.setattr(each, name, repositories.dense, raising=False)
                monkeypatch.setattr(each, "SAGEATTN_AVAILABLE", False, raising=False)
            monkeypatch.setattr(module, "flex_attention", flex_attention.flex_attention)
            for name in ("_TRITON_ROPE_ENABLED", "_TRITON_ADALN_ENABLED"):
                monkeypatch.setattr(module, name, False, raising=False)
            stack.callback(self_forcing.unpatch)
            return module, repositories.tiny_model(module, **options)

        yield open_


class Run:
    def __init__(self, model, frames):
        self.model = model
        size = (1, frames * FRAME, 3, 32)
        ends = {"global_end_index": 0, "local_end_index": 0}
        self.caches, self.cross = [], []
        for _ in range(2):
            self.caches.append({side: torch.zeros(size) for side in "kv"} | {k: torch.tensor([0]) for k in ends})
            self.cross.append({"k": None, "v": None, "is_init": False})

    def __call__(self, start, frames, seed, **more):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 16, frames, 2 * SIDE, 2 * SIDE, generator=generator)
        prompt = torch.randn(1, 24, 40, generator=torch.Generator().manual_seed(9))
        given = {"kv_cache": self.caches, "crossattn_cache": self.cross, "current_start": start * FRAME}
        t = torch.full((1, frames), 100.0 * (seed % 7))
        return self.model(x, t=t, context=prompt, seq_len=32760, **given, **more)

    def blocks(self, first, count, frames=2, **more):
        return torch.cat(
            [self(first + i * frames, frames, 7 * i + step, **more) for i in range(count) for step in (0, 1)]
        )


def both(module, model, frames, play):
    expected = play(Run(model, frames))
    assert expected.std() > 0.1
    print(self_forcing.patch(module, page_size=16))
    return expected, play(Run(model, frames))


@torch.no_grad()
def test_longlive_2(opened, monkeypatch):
    # It imports, and does not use, what newer versions of transformers have no more.
    monkeypatch.setattr("transformers.models.x_clip.modeling_x_clip.x_clip_loss", None, raising=False)
    module, model = opened(LONGLIVE2, local_attn_size=6, sink_size=2, num_frame_per_block=2)
    for layer in model.blocks:
        layer.self_attn.max_attention_size = 6 * FRAME
    model.t_scale, model.rope_temporal_offset = 0.5, 3.0
    expected, got = both(module, model, 6, lambda run: run.blocks(0, 5))
    torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("first, limit", [(0, 8), (2, 8), (2, 6)])
@torch.no_grad()
def test_longlive_2_pins_a_chunk_at_a_scene_cut(opened, monkeypatch, first, limit):
    monkeypatch.setattr("transformers.models.x_clip.modeling_x_clip.x_clip_loss", None, raising=False)
    module, model = opened(LONGLIVE2, local_attn_size=8, sink_size=2, num_frame_per_block=2)
    for layer in model.blocks:
        layer.self_attn.max_attention_size, layer.self_attn.global_sink_size = limit * FRAME, first

    def play(run):
        for cache in run.caches:
            cache |= {"pinned_start": torch.tensor([-1]), "pinned_len": torch.tensor([0])}
        made, pins = [], []
        for i in range(9):
            made.append(run.blocks(2 * i, 1))
            if i in (3, 6):
                for cache in run.caches:
                    cache["pinned_start"].fill_(int(cache["local_end_index"]) - 2 * FRAME)
                    cache["pinned_len"].fill_(2 * FRAME)
            pins.append(int(run.caches[0]["pinned_start"]))
        return torch.cat([torch.tensor(pins).double(), *(x.flatten().double() for x in made)])

    expected, got = both(module, model, 8, play)
    assert len(set(expected[:9].tolist())) > 3
    torch.testing.assert_close(got, expected, **FLOAT32)


@torch.no_grad()
def test_longlive_1_in_scope(opened):
    module, model = opened(LONGLIVE1, local_attn_size=6, sink_size=2)

    def play(run):
        first = run.blocks(0, 5)
        window = run(4, 6, 50, sink_recache_after_switch=True)
        return torch.cat([each.flatten() for each in (first, window, run.blocks(10, 2))])

    expected, got = both(module, model, 6, play)
    torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("bias", [1.0, 0.3])
@torch.no_grad()
def test_krea_in_scope(opened, bias):
    module, model = opened(KREA)
    for layer in model.blocks:
        layer.self_attn.frame_seq_length, layer.self_attn.num_frame_per_block = FRAME, 2
        layer.self_attn.max_attention_size = 6 * FRAME
        layer.self_attn.fuse_projections()

    def play(run):
        run.model.block_mask = None
        made = [run.blocks(0, 2, kv_cache_attention_bias=bias)]
        for i in range(2):
            shape = {"num_frames": 4, "frame_seqlen": FRAME, "num_frame_per_block": 2, "local_attn_size": -1}
            with contextlib.redirect_stdout(None):
                mask = run.model._prepare_blockwise_causal_attn_mask(device="cpu", **shape)
            run.model.block_mask = mask
            made.append(run(4, 4, 60 + i))
            run.model.block_mask = None
            made.append(run.blocks(4, 1, kv_cache_attention_bias=bias))
        return torch.cat([each.flatten() for each in made])

    expected, got = both(module, model, 6, play)
    torch.testing.assert_close(got, expected, **FLOAT32)
