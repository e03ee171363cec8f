"""Patched models make what they made before: each relative's attention, over several blocks, rolling and rewritten."""

import doctest
import re
import runpy
from pathlib import Path

import pytest
import torch

from inferix_kernels import KVPages
from inferix_kernels.integrations import self_forcing
from inferix_kernels.integrations.self_forcing import caches as caches_module
from inferix_kernels.integrations.self_forcing import functions, patching
from tests.integrations import wan_stand_ins as stand_ins
from tests.integrations.bytes import Allocations
from tests.integrations.wan_stand_ins import FRAME, caches, tokens

RELATIVES = {name: getattr(stand_ins, name)() for name in ("self_forcing", "causvid", "longlive1", "longlive2", "krea")}
EXAMPLES = Path(__file__).parents[2] / "examples"
# Two layers in float32: what other orders of summation cost.
FLOAT32 = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def unpatched():
    yield
    self_forcing.unpatch()


def make(name, **options):
    torch.manual_seed(0)
    return RELATIVES[name].CausalWanModel(**options).eval().requires_grad_(False)


class Rollout:
    """A pipeline's loop: each block in noisy passes and a clean one, all overwriting each other's keys and values."""

    def __init__(self, name, frames=9, batch=1, dtype=torch.float32, **options):
        self.name, self.model, self.batch, self.dtype = name, make(name, **options).to(dtype), batch, dtype
        self.caches = caches(frames, batch, ends=name != "causvid", dtype=dtype)
        self.at = 0

    def forward(self, frames, seed, start=None, **given):
        start = self.at if start is None else start
        if self.name == "causvid":
            given["current_end"] = (start + frames) * FRAME
        x = tokens(frames, seed, self.batch).to(self.dtype)
        return self.model(x, kv_cache=self.caches, current_start=start * FRAME, **given)

    def block(self, frames=3, passes=3, **given):
        made = [self.forward(frames, 100 * self.at + step, **given) for step in range(passes)]
        self.at += frames
        return torch.cat(made)

    def blocks(self, count, frames=3, **given):
        return torch.stack([self.block(frames, **given) for _ in range(count)])


def both(play, name, format=None, **options):
    """What a rollout gives as the repository is, and patched."""
    theirs = Rollout(name, **options)
    expected = play(theirs)
    patched = self_forcing.patch(RELATIVES[name], format, page_size=8, worlds=2)
    ours = Rollout(name, **options)
    got = play(ours)
    assert RELATIVES[name].CausalWanSelfAttention.__name__ in str(patched)
    return expected, got, theirs, ours


@pytest.mark.parametrize("name", RELATIVES)
def test_all_frames_are_kept(name):
    expected, got, theirs, ours = both(lambda rollout: rollout.blocks(3), name)
    torch.testing.assert_close(got, expected, **FLOAT32)
    same_cache(theirs, ours)


def same_cache(theirs, ours, written=slice(None)):
    """Dense, as the repository has it: the past to the last bit where the layer's input is the same."""
    held = ours.caches[0]["k"][:, :].shape[1]
    for layer, (dense, paged) in enumerate(zip(theirs.caches, ours.caches)):
        for side in "kv":
            tolerance = FLOAT32 if layer else {"atol": 0, "rtol": 0}
            expected = dense[side][:, :held]
            torch.testing.assert_close(paged[side][:, written], expected[:, written], **tolerance)
        for end in set(dense) - {"k", "v"}:
            assert int(paged[end]) == int(dense[end])


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("name", ["self_forcing", "longlive1", "longlive2", "krea"])
def test_the_window_rolls_over_the_sink(name, sink):
    window = {"window": 6, "sink": sink, "frames": 6}
    expected, got, theirs, ours = both(lambda rollout: rollout.blocks(5), name, **window)
    torch.testing.assert_close(got, expected, **FLOAT32)
    same_cache(theirs, ours)


@pytest.mark.parametrize("name", ["self_forcing", "longlive1"])
def test_several_sequences_and_blocks_of_a_frame(name):
    options = {"window": 4, "sink": 1, "frames": 4, "batch": 2}
    expected, got, theirs, ours = both(lambda rollout: rollout.blocks(7, frames=1), name, **options)
    torch.testing.assert_close(got, expected, **FLOAT32)
    same_cache(theirs, ours)


def test_the_first_block_may_have_its_own_schedule():
    """Causal Forcing: more steps, and blocks of a frame after one of three."""

    def play(rollout):
        return torch.cat([rollout.block(3, 5).flatten(), *(rollout.block(1, 2).flatten() for _ in range(4))])

    expected, got, *_ = both(play, "self_forcing", window=6, sink=0, frames=6)
    torch.testing.assert_close(got, expected, **FLOAT32)


def test_less_is_read_than_held():
    def play(rollout):
        for layer in rollout.model.layers:
            layer.max_attention_size = 4 * FRAME
        return rollout.blocks(4)

    for name in ("self_forcing", "longlive1", "longlive2"):
        expected, got, *_ = both(play, name, window=9, sink=1, frames=9)
        torch.testing.assert_close(got, expected, **FLOAT32)
        self_forcing.unpatch()


@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("limit", [12, 9])
def test_a_scene_cut_pins_a_sink_that_rolls_to_the_front(first, limit):
    """LongLive 2: what is pinned rolls with the rest until it lies behind the first frames, and stays there."""

    def play(rollout):
        for layer in rollout.model.layers:
            layer.global_sink_size, layer.max_attention_size = first, limit * FRAME
        for cache in rollout.caches:
            cache |= {"pinned_start": torch.tensor([-1]), "pinned_len": torch.tensor([0])}
        made, pins = [], []
        for i in range(8):
            if i in (2, 5):
                for cache in rollout.caches:
                    cache["pinned_start"].fill_(int(cache["local_end_index"]) - 3 * FRAME)
                    cache["pinned_len"].fill_(2 * FRAME)
            made.append(rollout.block())
            pins.append(int(rollout.caches[1]["pinned_start"]))
        return torch.cat([*(x.flatten() for x in made), torch.tensor(pins)])

    expected, got, *_ = both(play, "longlive2", window=12, sink=2, frames=12)
    torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("fresh_sink", [False, True])
@pytest.mark.parametrize("before", [1, 2, 4])
def test_a_prompt_switch_writes_the_window_anew(before, fresh_sink):
    """LongLive: one pass over all frames of the window. A sink that lies before them stays, unless it is rewritten."""

    def play(rollout):
        first = rollout.blocks(before)
        if fresh_sink:
            for cache in rollout.caches:
                cache["k"].zero_(), cache["v"].zero_()
        frames = min(6, rollout.at)
        window = rollout.forward(frames, 7, rollout.at - frames, sink_recache_after_switch=fresh_sink)
        return torch.cat([first.flatten(), window.flatten(), rollout.blocks(3).flatten()])

    expected, got, theirs, ours = both(play, "longlive1", window=6, sink=2, frames=6)
    torch.testing.assert_close(got, expected, **FLOAT32)
    same_cache(theirs, ours)


def test_a_later_rollout_begins_anew():
    def play(rollout):
        first = rollout.blocks(3)
        rollout.at = 0
        for cache in rollout.caches:
            cache |= {end: torch.tensor([0]) for end in cache.keys() - {"k", "v"}}
        return torch.cat([first, rollout.blocks(2)])

    for name in ("self_forcing", "causvid", "longlive1"):
        expected, got, *_ = both(play, name)
        torch.testing.assert_close(got, expected, **FLOAT32)
        self_forcing.unpatch()


def test_a_rollout_that_goes_back_writes_over_what_came_after():
    def play(rollout):
        first = rollout.blocks(3)
        rollout.at = 3
        return torch.cat([first, rollout.blocks(2)])

    for name in ("self_forcing", "causvid", "longlive1", "longlive2", "krea"):
        expected, got, *_ = both(play, name)
        torch.testing.assert_close(got, expected, **FLOAT32)
        self_forcing.unpatch()


@pytest.mark.parametrize("bias", [1.0, 0.3])
def test_krea_fills_its_cache_by_a_mask_and_biases_the_past(bias):
    def play(rollout):
        for layer in rollout.model.layers:
            layer.fuse_projections()
        made = [rollout.block(kv_cache_attention_bias=bias) for _ in range(2)]
        for _ in range(2):  # before each further block the frames that stay are made anew, counted from 0
            frame = torch.arange(5 * FRAME) // FRAME
            rollout.model.block_mask = (frame[:, None] + 1) // 3 >= (frame[None] + 1) // 3
            made.append(rollout.forward(5, 50, start=5))
            rollout.model.block_mask = None
            rollout.at = 5
            made.append(rollout.block(kv_cache_attention_bias=bias))
        return torch.cat([x.flatten() for x in made])

    expected, got, theirs, ours = both(play, "krea", frames=8)
    torch.testing.assert_close(got, expected, **FLOAT32)
    same_cache(theirs, ours)
    assert all(isinstance(cache["global_end_index"], int) for cache in ours.caches)


@pytest.mark.parametrize("format, batch, error", [("int8", 1, 0.02), ("int8", 2, 0.02), ("int4", 1, 0.3)])
def test_pages_may_be_quantized(format, batch, error):
    window = {"window": 6, "sink": 1, "frames": 6, "batch": batch}
    expected, got, _, ours = both(lambda rollout: rollout.blocks(5), "self_forcing", format, **window)
    assert 0 < (got - expected).abs().max() < error
    assert ours.caches[0]["k"].world.store.pools.keys() == {format}


def test_half_precision_stays_what_it_is():
    """The first layer's keys and values are the repository's own to the last bit."""
    options = {"window": 6, "sink": 1, "frames": 6, "dtype": torch.bfloat16}
    expected, got, theirs, ours = both(lambda rollout: rollout.blocks(4), "self_forcing", **options)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert (got.float() - expected.float()).abs().max() < 0.1  # two layers, each rounded to 8 bits
    for side in "kv":
        assert torch.equal(ours.caches[0][side][:, :], theirs.caches[0][side])


def test_a_fork_shares_pages_and_a_rollback_goes_on_from_one():
    def play(rollout):
        first = rollout.blocks(2)
        if isinstance(rollout.caches[0]["k"], torch.Tensor):
            kept = [{name: x.clone() for name, x in cache.items()} for cache in rollout.caches]
        else:
            kept = self_forcing.fork(rollout.caches)
        at = rollout.at
        later = rollout.blocks(3)
        rollout.caches, rollout.at = kept, at
        return torch.cat([first, later, rollout.blocks(3, passes=2).repeat(1, 3, 1, 1)[:, :3]])

    expected, got, *_ = both(play, "self_forcing", window=6, sink=1, frames=6)
    torch.testing.assert_close(got, expected, **FLOAT32)


def test_no_dense_cache_is_left_or_made():
    """Pages are for two layers, scratch for one; a layer allocates less than its dense cache was."""
    self_forcing.patch(RELATIVES["self_forcing"], "int8", page_size=8)
    rollout = Rollout("self_forcing", window=30, sink=1, frames=30, dtype=torch.bfloat16)
    dense = rollout.caches[0]["k"].nbytes
    rollout.blocks(10)
    assert not any(isinstance(x, torch.Tensor) and x.ndim == 4 for cache in rollout.caches for x in cache.values())
    store = rollout.caches[0]["k"].world.store
    assert store.nbytes == {
        "int8": KVPages.empty("int8", 2 * 30, heads=2, page_size=8, head_dim=16).nbytes,
        "scratch": KVPages.empty("bf16", 30, heads=2, page_size=8, head_dim=16).nbytes,
    }
    made = Allocations()
    x = tokens(3, 0).bfloat16()
    rollout.forward(3, 0)
    for layer, cache in enumerate(rollout.caches):
        q, k, v = (x.unflatten(-1, (2, 16)) for _ in range(3))
        with made:
            cache["k"].world.attend(layer, q, k, v)
    assert 0 < made.nbytes < dense


def test_the_example_says_what_pages_cost(capsys):
    runpy.run_path(str(EXAMPLES / "self_forcing_patch.py"), run_name="__main__")
    said = capsys.readouterr().out
    rows = re.findall(r"(\w+ \w+): +([\d,]+) bytes(?:, (\S+) away)?", said)
    sizes, away = ({row[0]: float(row[i].replace(",", "") or 0) for row in rows} for i in (1, 2))
    assert sizes["fp32 pages"] == sizes["dense fp32"] == 2 * sizes["bf16 pages"]
    assert sizes["int8 pages"] < 0.3 * sizes["dense fp32"]
    assert away["fp32 pages"] < 2e-5 < away["bf16 pages"] < 2e-2 and away["int8 pages"] < 5e-2
    assert "patched was causal_model (Self-Forcing, Causal-Forcing)" in said


def test_docstrings_say_what_happens():
    for module in (caches_module, functions, patching):
        results = doctest.testmod(module, extraglobs={"torch": torch})
        assert results.attempted and not results.failed
