"""The trainer learns, stops, and goes on where it stopped."""

import argparse
import json

import pytest
import torch

from inferix.models.tiny import load, train
from inferix.models.tiny.model import TinyConfig

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


def test_both_stages_learn_and_the_result_loads(tmp_path):
    log = run(tmp_path, 75, "--own-from", "0.67")
    assert log[1]["next"] < 0.8 * log[0]["next"]
    assert "own_sprites0" in log[2] and "own_sprites0" not in log[1]
    world = load(tmp_path / "tiny_world.safetensors")
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    # float16 keeps 11 bits of weights that are below 4.
    for name, value in world.network.state_dict().items():
        assert torch.allclose(value, trained["average"][name], atol=2e-3)


def test_a_run_resumes_with_all_its_state(tmp_path):
    run(tmp_path, 25)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    args = dict(seed=0, lr=3e-3, batch=4, compile=False, steps=50, decay=0.3, warmup=5, average=0.998, motion=12.0)
    args |= dict(first_weight=0.3, shift=8.0, sample_steps=2, own_from=0.5, sound=0.04, one_step=0.75)
    trainer = train.Trainer(argparse.Namespace(**args), SMALL)
    trainer.load(before)
    assert trainer.step == 25
    after = trainer.state()
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    for a, b in zip(after["optimizers"], before["optimizers"]):
        assert a["state"].keys() == b["state"].keys() and a["state"]
    assert run(tmp_path, 50, "--resume")[-1]["step"] == 50


def test_a_run_starts_from_shipped_weights(tmp_path):
    run(tmp_path / "first", 50)
    log = run(tmp_path / "second", 25, "--init", str(tmp_path / "first" / "tiny_world.safetensors"))
    fresh = run(tmp_path / "third", 25)
    assert log[0]["next"] < 0.8 * fresh[0]["next"]
