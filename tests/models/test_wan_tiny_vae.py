"""Tiny VAEs of Wan 2.1's latents: their files, their pictures block by block, and what TAEHV's own code makes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inferix.models.wan.tiny_vae import MEAN, STD, TinyNetwork, TinyVAE, remembered, run
from inferix.models.wan.vae import read_vae
from inferix.models.wan.video import PICTURES
from tests.models import taehv_golden as golden

SMALL = (8, 8, 8, 8), (16, 12, 8, 8)


@pytest.fixture(scope="module")
def recorded():
    return json.loads(golden.GOLDEN.read_text())


def small(**options):
    return TinyVAE(golden.fill(TinyNetwork(*SMALL)), **options)


def latents_of(frames, seed=0):
    return torch.randn(frames, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_its_tensors_are_the_published_ones(recorded):
    """In the order of the network, too."""
    shapes = {name: list(x.shape) for name, x in TinyNetwork().state_dict().items()}
    assert list(shapes.items()) == list(recorded["shapes"].items())


def test_it_makes_what_taehv_makes(recorded):
    """Of the same sums in the same order; libraries for other processors have other ones."""
    vae = TinyVAE(golden.fill(TinyNetwork()))
    with torch.inference_mode():
        decoded = (vae.decode(golden.latents(), vae.begin()).clamp(-1, 1) + 1) / 2
        encoded = vae.encode_pictures(golden.pictures() * 2 - 1)
    for made, wanted in ((decoded, recorded["decoded"]), (encoded, recorded["encoded"])):
        wanted = torch.tensor(wanted)
        assert wanted.std() > 0.04 and len(wanted) >= golden.KEPT
        assert torch.allclose(torch.tensor(golden.some(made)), wanted, atol=5e-6)


def test_blocks_are_decoded_as_the_whole_video_is():
    """Bit for bit, beside another world of the same VAE, and from a fork and a saved state as well."""
    vae, latents = small(), latents_of(7)
    whole = vae.open()(latents)
    assert whole.shape == (1 + PICTURES * 6, 32, 48, 3) and whole.std() > 5
    stream, other, pictures = vae.open(), vae.open(), []
    for part in latents.split([3, 1, 3]):
        again = stream.fork()
        loaded = vae.open()
        loaded.restore(stream.state())
        pictures.append(stream(part))
        other(part.flip(0))
        assert np.array_equal(again(part), pictures[-1]) and np.array_equal(loaded(part), pictures[-1])
    assert np.array_equal(np.concatenate(pictures), whole)


def test_a_stream_remembers_one_step_of_each_layer_that_looks_back():
    vae, before = small(), remembered(small().network.decoder)
    memory = vae.begin()
    assert before == memory == [None] * 9
    vae.decode(latents_of(1), memory)
    kept = list(memory)
    assert [list(x.shape[:2]) for x in memory] == [[1, n] for n in (16, 16, 16, 12, 12, 12, 8, 8, 8)]
    copies = [x.clone() for x in kept]
    vae.decode(latents_of(1), memory)
    assert all(map(torch.equal, kept, copies))  # replaced, never changed


def test_a_rollout_begins_again_from_the_last_picture():
    vae, latents = small(), latents_of(6)
    stream = vae.open()
    stream(latents[:3]), stream(latents[3:])
    earlier, state = vae.open(), stream.state()
    earlier.restore({**state, "tail": state["tail"].transpose(0, 1)[None], "first": False})  # of an earlier version
    begun = stream.restart(latents[3:])
    assert torch.equal(earlier.restart(latents[3:]), begun)
    assert torch.equal(begun[1:], latents[4:]) and not torch.equal(begun[0], latents[3])
    afresh = vae.open()
    afresh(begun)
    assert np.array_equal(stream(latents[:3]), afresh(latents[:3]))


def test_pictures_are_encoded_four_by_four_and_the_last_one_repeated():
    vae, frames = small(), np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    latents = vae.encode(frames)
    assert latents.shape == (3, 16, 4, 6)
    filled = torch.from_numpy(np.concatenate([frames, *[frames[-1:]] * 3])).permute(0, 3, 1, 2) / 255
    at_once = run(vae.network.encoder, filled, remembered(vae.network.encoder))
    assert torch.allclose(latents, at_once, atol=1e-5)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4 k for the VAE to encode, got 8"):
        vae.encode(frames[:8])
    start = vae.encode_start(frames[0], 3)
    grey = np.full((9, 32, 48, 3), 127.5)
    grey[0] = frames[0]
    assert torch.allclose(start, vae.encode_pictures(torch.from_numpy(grey).permute(0, 3, 1, 2).float() / 127.5 - 1))


def test_light_tae_takes_latents_as_wan_has_them_inside():
    plain, light = small(), small(normalised=False)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (MEAN, STD))
    latents = latents_of(2)
    wanted = plain.decode(latents * std + mean, plain.begin())
    assert torch.equal(light.decode(latents, light.begin()), wanted)
    encoded = light.encode_pictures(wanted.clamp(-1, 1))
    assert torch.allclose(encoded * std + mean, plain.encode_pictures(wanted.clamp(-1, 1)), atol=1e-5)


def test_a_file_is_known_by_its_tensors(tmp_path):
    network = golden.fill(TinyNetwork())
    state = {name: x.clone() for name, x in network.state_dict().items()}
    torch.save(state, tmp_path / "any.pth")
    # One with more steps in a layer than are used, as a file of TAEHV may have them: the last ones count.
    state["decoder.7.conv.weight"] = torch.cat([torch.ones(256, 256, 1, 1), state["decoder.7.conv.weight"]])
    save_file(state, tmp_path / "lighttaew2_1.safetensors")
    plain, light = (read_vae(tmp_path / name) for name in ("any.pth", "lighttaew2_1.safetensors"))
    latents = latents_of(1)
    assert torch.equal(plain.decode(latents, plain.begin()), TinyVAE(network).decode(latents, plain.begin()))
    wanted = TinyVAE(network, normalised=False)
    assert torch.equal(light.decode(latents, light.begin()), wanted.decode(latents, wanted.begin()))
    assert plain.dtype == torch.float32


BAD = {
    "it has no decoder.22.weight": lambda state: state.pop("decoder.22.weight"),
    "it also has decoder.23.weight": lambda state: state.update({"decoder.23.weight": torch.ones(1)}),
    "decoder.1.weight must be [256, 16, 3, 3], got [256, 48, 3, 3]": lambda state: state.update(
        {"decoder.1.weight": torch.ones(256, 48, 3, 3)}  # Wan 2.2's latents
    ),
    "encoder.0.bias must be [64], got [3]": lambda state: state.update({"encoder.0.bias": torch.ones(3)}),
    "encoder.0.bias must be floating-point numbers, got torch.int64": lambda state: state.update(
        {"encoder.0.bias": torch.ones(64, dtype=torch.int64)}
    ),
}


@pytest.mark.parametrize("says", BAD)
def test_a_file_that_is_none_is_refused_by_the_name_of_a_tensor(says, tmp_path):
    state = dict(TinyNetwork().state_dict())
    BAD[says](state)
    save_file(state, tmp_path / "v.safetensors")
    with pytest.raises(ValueError) as error:
        read_vae(tmp_path / "v.safetensors")
    assert says in str(error.value) and str(error.value).startswith(f"vae: {tmp_path / 'v.safetensors'}")


def test_another_file_is_refused_too(tmp_path):
    save_file({"some.weight": torch.ones(1)}, tmp_path / "v.safetensors")
    (tmp_path / "text").write_text("words")
    for name, says in (
        ("v.safetensors", "is no Wan VAE: it has no encoder.conv1.weight"),
        ("text", "is damaged or no checkpoint"),
        ("nowhere", "vae: there is no file"),
        (".", "must be a file"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            read_vae(tmp_path / name)
        assert str(error.value).startswith("vae: ")
