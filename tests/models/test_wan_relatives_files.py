"""A file under another relative's name: what it says of itself is said; what can't be run is refused by name."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import inferix
from inferix.models import load_model
from inferix.models.wan.network import WanConfig
from inferix.models.wan.relatives import say_whose
from tests.models.wan_golden import published, random_network, tiny_config


@pytest.fixture(scope="module")
def state():
    return published(random_network(tiny_config(ffn=64)))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_heads": 3, "text_len": 24}))
    return folder


def said(caplog, folder, row="causal-forcing", **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "inferix"):
        load_model(row, str(folder), size=(48, 80), **options)
    assert all("\n" not in message for message in caplog.messages)
    return caplog.messages


def test_a_name_says_whose_weights_they_are(state, folder, tmp_path, caplog):
    torch.save({"generator": state, "generator_ema": state}, folder / "self_forcing_dmd.pt")
    (message,) = said(caplog, folder)
    assert "self_forcing_dmd.pt is self-forcing's by its name" in message and "takes causal-forcing's" in message
    assert not said(caplog, folder, "self-forcing") and not said(caplog, folder, "infinity-rope")
    converted = tmp_path / "ours.safetensors"
    inferix.convert(source=str(folder), out=str(converted), model="self-forcing")
    (message,) = said(caplog, converted)
    assert "ours.safetensors is self-forcing's by its source, 'self_forcing_dmd.pt'" in message
    (folder / "self_forcing_dmd.pt").rename(folder / "model.pt")
    assert not said(caplog, folder)  # nothing is known then


def test_metadata_a_config_and_a_folder_say_it_too(state, folder, caplog):
    save_file(state, folder / "model.safetensors", metadata={"modelspec.title": "LongLive 1.3B"})
    (message,) = said(caplog, folder)
    assert "longlive's by its modelspec.title, 'LongLive 1.3B'" in message
    torch.save({"generator": state, "trained": "CausVid"}, folder / "model.pt")
    (folder / "model.safetensors").unlink()
    (message,) = said(caplog, folder)
    assert "causvid's by its trained, 'CausVid'" in message
    config = {"num_heads": 3, "text_len": 24, "_name_or_path": "checkpoints/rolling_forcing"}
    torch.save({"generator": state}, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(config))
    (message,) = said(caplog, folder)
    assert "rolling-forcing's by _name_or_path of its config.json" in message
    (folder / "config.json").write_text(json.dumps({"num_heads": 3, "text_len": 24}))
    (message,) = said(caplog, folder.rename(folder.with_name("krea-realtime-video")))
    assert "krea-realtime's by its folder's name" in message


def test_weights_that_are_not_those_a_row_is_published_as(state, folder, caplog):
    torch.save({"generator": state, "critic": {}}, folder / "model.pt")
    (message,) = said(caplog, folder, "self-forcing")
    assert "holds generator and no generator_ema, as which self-forcing is published" in message


def test_weights_that_were_trained_for_four_bits(folder, caplog):
    other = published(random_network(tiny_config(ffn=64, channels_in=48, channels_out=48)))
    torch.save({"generator": other, "checkpoint_format": "longlive_generator_merged_bf16"}, folder / "model_te.pt")
    with caplog.at_level(logging.WARNING, "inferix"):
        load_model("longlive-2", str(folder), size=(64, 96))
    (message,) = caplog.messages
    assert "model_te.pt was trained to be rounded to NVFP4 as it runs" in message


def test_the_size_of_another_relative(tmp_path, caplog):
    config = WanConfig(dim=5120, layers=40, heads=40, ffn=13824)
    for row, told in (("krea-realtime", 0), ("wan-t2v", 0), ("self-forcing", 1), ("longlive-2", 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "inferix"):
            say_whose(row, tmp_path / "m.pt", {}, {}, ["generator"], config)
        assert len(caplog.messages) == told
    assert "dim is 5120, and longlive-2 was published with 3072" in caplog.text


def test_latents_of_another_relative(state, folder):
    torch.save({"generator": state}, folder / "model.pt")
    said = "head.head.weight gives latents of 16 channels, those of longlive-2 have 48"
    with pytest.raises(ValueError, match=said):
        load_model("longlive-2", str(folder))
    other = published(random_network(tiny_config(ffn=64, channels_in=48, channels_out=48)))
    torch.save({"generator": other}, folder / "model.pt")
    said = "gives latents of 48 channels, those of self-forcing have 16: longlive-2 and longlive-2-i2v have so many"
    with pytest.raises(ValueError, match=said):
        load_model("self-forcing", str(folder))
    other["patch_embedding.weight"] = other["patch_embedding.weight"][:, :16]
    torch.save({"generator": other}, folder / "model.pt")
    with pytest.raises(ValueError, match=r"16 channels and gives 48, which .*: image-to-video networks, of 36 ch"):
        load_model("longlive-2", str(folder))


CODES, SCALES = torch.zeros(8, 4, dtype=torch.uint8), torch.ones(8, 1).to(torch.float8_e4m3fn)
LAYER = "blocks.0.ffn.0"


@pytest.mark.parametrize(
    "layer, writer",
    [
        ({"quantized_weight_values": CODES, "quantized_weight_scale_factors": SCALES}, "FourOverSix"),
        ({"weight": CODES.float(), "_extra_state": CODES}, "TransformerEngine"),
        ({"weight": CODES, "weight_scale": SCALES, "weight_scale_2": torch.ones(())}, "packed codes"),
        ({"weight_packed": CODES, "weight_scale": SCALES}, "packed codes"),
    ],
    ids=["fouroversix", "transformer engine", "modelopt", "compressed-tensors"],
)
def test_four_bits_are_refused_by_name(layer, writer, state, folder):
    others = {name: x for name, x in state.items() if not name.startswith(LAYER + ".w")}
    model = others | {f"{LAYER}.{name}": x for name, x in layer.items()}
    file = {"generator": {f"model.{name}": x for name, x in model.items()}, "checkpoint_format": "longlive"}
    torch.save(file, folder / "model_4o6.pt")
    with pytest.raises(ValueError) as error:
        load_model("longlive-2", str(folder))
    message = str(error.value)
    assert f"holds layers in NVFP4 ({writer}: model.{LAYER}." in message and "model_bf16.pt" in message
    assert "\n" not in message and len(message) < 400
