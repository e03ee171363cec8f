"""The trainer learns, stops, and goes on where it stopped."""

import argparse
import json

import numpy as np
import pytest
import torch

from inferix.models.tiny import load, train
from inferix.models.tiny.checker import look
from inferix.models.tiny.clips import PLAYER_WEIGHT, Stream, hard_futures, place_sprites, simulate, simulate_doubled
from inferix.models.tiny.model import TinyConfig, unpatchify
from inferix.models.tiny.simulator import MOVES, PLAYER_COLOR, PLAYER_SPRITES, TILE, UNIT, Simulator

SMALL = TinyConfig(dim=32, layers=1, heads=2, head_dim=16, ffn=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "TinyConfig", lambda: SMALL)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(out, steps, *options):
    fixed = ["--out", str(out), "--batch", "4", "--threads", "1", "--no-compile", "--warmup", "5"]
    train.main([*fixed, "--steps", str(steps), *options])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder and the log of a run through both stages: 50 steps, then 25."""
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TinyConfig", lambda: SMALL)
        log = run(folder, 75, "--own-from", "0.67")
    torch.set_num_threads(threads)
    return folder, log


def test_both_stages_learn_and_the_result_loads(trained):
    folder, log = trained
    assert log[1]["next"] < 0.8 * log[0]["next"]
    assert "own_sprites0" in log[2] and "own_sprites0" not in log[1]
    world = load(folder / "tiny_world.safetensors")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    # float16 keeps 11 bits of weights that are below 4.
    for name, value in world.network.state_dict().items():
        assert torch.allclose(value, checkpoint["average"][name], atol=2e-3)


def test_a_run_resumes_with_all_its_state(tmp_path):
    run(tmp_path, 25)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    args = dict(seed=0, lr=3e-3, batch=4, compile=False, steps=50, decay=0.3, warmup=5, average=0.998, motion=12.0)
    args |= dict(
        first_weight=0.3, shift=8.0, sample_steps=3, sample_shift=1.0, own_from=0.5, sound=0.04, second_player=0.06
    )
    trainer = train.Trainer(argparse.Namespace(**args), SMALL)
    trainer.load(before)
    assert trainer.step == 25
    after = trainer.state()
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    for a, b in zip(after["optimizers"], before["optimizers"]):
        assert a["state"].keys() == b["state"].keys() and a["state"]
    assert run(tmp_path, 50, "--resume")[-1]["step"] == 50


def test_a_run_starts_from_shipped_weights(trained, tmp_path):
    folder, fresh = trained
    log = run(tmp_path, 25, "--own-from", "1", "--init", str(folder / "tiny_world.safetensors"))
    assert log[0]["next"] < 0.8 * fresh[0]["next"]  # 25 steps of the first stage, both


def frames_of(stream):
    return ((unpatchify(stream.tokens.flatten(0, 1)) + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def test_a_doubled_stream_shows_two_players_and_goes_on_from_one_of_them():
    generator, doubled = np.random.default_rng(0), 0
    for _ in range(40):
        stream = Stream(3, generator)
        stream.restart_if_lost(sound=0.02)
        before, player = frames_of(stream), stream.world.player.copy()
        stream.add_second_player()
        after, world = frames_of(stream), stream.world
        assert np.array_equal(before[:1], after[:1]) or (before != after).any((1, 2, 3)).all(), (
            "the last frames, in a row"
        )
        assert not world.blocked(world.player)[0]
        doubled += look(after[-1:]).count[0, 0] > 1
        if (world.player != player).any():  # the other one is more solid, or as solid and further up
            assert look(after[-1:]).count[0, 0] >= 1
    assert doubled >= 5


def test_of_two_players_the_more_solid_one_stays_and_of_equals_the_upper():
    world = Simulator(1, np.random.default_rng(1), wall_share=0.0)
    free = np.argwhere([[not world.blocked(np.array([[y, x]]))[0] for x in range(23)] for y in range(23)])
    upper, lower = free[0], free[-1]
    for solid, stays in ((1.0, upper), (0.5, lower)):
        image = world.scenery()[0].astype(np.float32)
        for place, share in ((upper, solid), (lower, 1.0)):
            y, x = place * 4
            image[y : y + 8, x : x + 8] += share * (PLAYER_SPRITES[0] - image[y : y + 8, x : x + 8])
        place_sprites(world, image)
        assert world.player[0].tolist() == stays.tolist()


def test_hard_futures_run_into_more_than_a_wandering_player_does():
    world = Simulator(1, np.random.default_rng(2))
    stopped = np.zeros(4)
    for _ in range(100):
        keys = hard_futures(world, 4, 3)
        clip = simulate(world.repeat(4), 1, 3, keys=keys)
        assert np.array_equal(clip.actions[:, 0].numpy(), keys)
        futures = world.repeat(4)
        for key in keys.T:
            before = futures.player
            futures.step(key)
            stopped += (futures.player == before).all(1) & (key > 0)
        world.step(keys[0, :1])
    assert stopped[1:].min() > 1.25 * stopped[0] > 0


def test_the_tile_that_a_player_runs_into_counts_as_one_with_the_player():
    rng, blocked = np.random.default_rng(3), 0
    for _ in range(60):
        world = Simulator(1, rng)
        start, key = world.player[0].copy(), int(rng.integers(1, 5))
        clip = simulate(world, 1, 1, keys=np.array([[key]]))
        hit = (world.player[0] == start).all()
        blocked += hit
        wanted = (start + MOVES[key]).clip(0, 22) * UNIT
        for corner in wanted, wanted + 2 * UNIT - 1:
            row, column = corner // TILE
            assert clip.touched[0, 0].unflatten(0, (8, 8))[row, column] == PLAYER_WEIGHT
    assert 5 < blocked < 55


def frames(tokens):
    return ((unpatchify(tokens.flatten(0, 1)) + 1) * 127.5).round().clamp(0, 255).byte().numpy().reshape(-1, 96, 96, 3)


def test_of_two_players_begun_the_stronger_one_stays_or_of_equals_the_upper():
    world = Simulator(64, np.random.default_rng(4))
    clip, seen = simulate_doubled(world, 3, 1.0)
    truth, shown = look(frames(clip.tokens)), look(frames(seen))
    assert truth.once[:, 0].all(), "one player, undivided"
    assert (shown.count[:, 1:] == 1).all(), "boats are left alone"
    red, left = ((frames(z)[2::3] == PLAYER_COLOR).all(-1) for z in (seen, clip.tokens))  # the last pictures
    two = np.flatnonzero(red.sum((1, 2)) == 2 * left.sum((1, 2)))
    assert len(two) >= 8, "a quarter of the clips show two whole players, but for those whose paths cross"
    assert (red[two].any(2).argmax(1) == left[two].any(2).argmax(1)).all(), "the upper one stays"
    faded = np.flatnonzero(red.sum((1, 2)) == left.sum((1, 2)))
    assert len(faded) >= 16 and (red[faded] == left[faded]).all(), "where one is whole, it stays"
    clip, seen = simulate_doubled(world, 3, 0.0)
    assert torch.equal(seen, clip.tokens)
