"""`inferix inspect-kv` measures what is there: what is planted in keys and values is found."""

import dataclasses
import json

import pytest
import torch

from inferix.commands.cli import main
from inferix.kv_statistics import LayerStatistics, Watched, attention, through
from inferix.opening import open_decoder, open_store, policy_for
from inferix_kernels import Policy
from tests.decode.test_pipeline import model as magi
from tests.models.test_wan_world import wan


def test_a_large_channel_and_a_drifting_mean_are_found():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(500, 2, 16, generator=generator) for _ in range(2))
    k[:, 1, 5] *= 20
    k[:, 0, 3] += 30  # a constant: the mean takes it off
    found = LayerStatistics()
    found.add(k, v)
    found.add(k + 2.0, v)
    report = found.report()
    assert report["keys"]["outliers"] == 2 and report["values"]["outliers"] == 0
    assert report["keys"]["worst"][0][:2] == [0, 3]
    assert report["keys"]["without_mean"]["worst"][0][:2] == [1, 5] and report["keys"]["without_mean"]["outliers"] == 1
    assert report["drift"][0] == 0
    spread = (k - k.mean(0)).square().mean(0).sum().sqrt()
    assert report["drift"][1] == pytest.approx(float(2 * 32**0.5 / (spread**2 + 4 * 32) ** 0.5), rel=1e-2)
    assert 0.3 < report["mean_share"] < 1


def test_errors_are_of_what_came_out():
    found = LayerStatistics()
    found.add(torch.randn(8, 1, 8), torch.randn(8, 1, 8))
    right = torch.full((4,), 2.0)
    found.compare("int8", [(right + 0.2, right), (right, right), (right * 0, right), (right, right)])
    right = {"keys": 0.1, "values": 0.0, "attention": 1.0, "attention_mean_kept": 0.0}
    assert found.report()["error"]["int8"] == right


def test_attention_is_torchs():
    q, k, v = torch.randn(5, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    wide = [x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)]
    right = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *wide).transpose(0, 1)
    assert torch.allclose(attention(q, k, v), right, atol=1e-6)
    met, other = torch.tensor([1, 0, 0, 1, 0, 0, 1, 1, 0]), torch.randn(5, 4, 8)  # of each token, its variant of q
    scores = torch.stack([(other if n else q).transpose(0, 1) @ wide[0][:, i, :, None] for i, n in enumerate(met)], 2)
    right = ((scores[..., 0] / 8**0.5).softmax(-1) @ wide[1]).transpose(0, 1)
    assert torch.allclose(attention(torch.stack([q, other]), k, v, met), right, atol=1e-6)


def test_what_goes_through_pages_of_floats_comes_back():
    k, v = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    lens = torch.tensor([16, 4], dtype=torch.int32)
    assert all(map(torch.equal, through("fp32", k, v, lens, 16), (k, v)))
    assert not torch.equal(through("int8", k, v, lens, 16)[0], k)


@pytest.mark.parametrize(
    "name, policy", [("self-forcing", Policy(6)), ("infinity-rope", Policy(5, 1, time="relative"))]
)
def test_watching_changes_nothing(name, policy):
    model, policy = wan(name), dataclasses.replace(policy, format="fp32")
    plain, decoder = (open_decoder(model, open_store(model, policy, 1, "auto", "exact").open(policy), 0) for _ in "ab")
    watched, conditioning = Watched(decoder, ["int8"]), model.conditioning("fog", [])
    for _ in range(3):
        plain.step(conditioning)
        plain.commit_pending()
        watched.step(conditioning, trying=True)
        assert torch.equal(decoder.last_latents(), plain.last_latents())
    first = watched.layers[1]
    assert first.keys.tokens == 9 * model.frame_tokens
    errors = first.report()["error"]["int8"]
    assert 0 < errors["keys"] < 0.02 and 0 < errors["values"] < 0.02 and 0 < errors["attention"] < 0.02


def test_several_blocks_in_flight_have_a_past_too():
    model = magi()
    policy = policy_for(model.adapter, "fp32", None, None, 0)
    store = open_store(model, policy, 1, "auto", "exact")
    watched = Watched(open_decoder(model, store.open(policy), 0), ["int8"])
    for _ in range(model.adapter.stages + 3):
        watched.step(model.conditioning("fog", []), trying=True)
    report = watched.layers[0].report()
    assert len(report["drift"]) >= 2 and 0 < report["error"]["int8"]["attention"] < 0.05


def test_a_wan_without_vae_is_measured(tmp_path, capsys):
    from tests.models import wan_folder

    wan_folder.write_network(tmp_path)
    wan_folder.write_encoder(tmp_path)
    options = ["--model", "self-forcing", "--weights", tmp_path, "--size", "32x48", "--device", "cpu", "--seconds", 2]
    options += ["--prompt-cache", tmp_path, "--prompt", "the fox", "--out", tmp_path / "kv.json"]
    assert main(["inspect-kv", *map(str, options)]) == 0
    said = capsys.readouterr().out
    assert "9 frames of self-forcing, " in said and "int8: worst layer" in said
    report = json.loads((tmp_path / "kv.json").read_text())
    assert report["drift_at"] == [1, 2, 3] and len(report["layers"]) == 2
    for layer in report["layers"]:
        assert layer["drift"][0] == 0 and len(layer["drift"]) == 3
        error = layer["error"]
        assert set(error) == {"fp16", "bf16", "int8", "i8f8", "fp8", "int4"}
        assert error["fp16"]["attention"] < error["int8"]["attention"] < error["int4"]["attention"] < 1
        assert 0 < error["int8"]["keys"] < error["fp8"]["keys"] < error["int4"]["keys"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model", "wan-t2v"], "--weights must be a checkpoint file"),
        (["--image", "x.png"], "--image: tiny is conditioned on no picture"),
        (["--out", "/nowhere/kv.json"], "--out"),
        (["--seconds", "0"], "--seconds must be a positive number"),
    ],
)
def test_bad_input_is_refused(more, said, capsys):
    assert main(["inspect-kv", *more]) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_is_not_written_over(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    given = ["--model", "self-forcing", "--weights", str(weights), "--out", str(weights)]
    assert main(["inspect-kv", *given]) == 2
    assert "would be written, but --weights is read from it" in capsys.readouterr().err
    assert weights.read_bytes() == b"weights"
