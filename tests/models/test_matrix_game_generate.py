"""Matrix-Game 2 by command, on a folder as people have it: a picture through VAE and CLIP, keys, a video."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from inferix.commands.cli import main
from tests.models.matrix_game_folder import write_folder

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: wan)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("weights"))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder


def command(folder, out, *more, model="matrix-game-2", image="first.png"):
    options = ["generate", "--model", model, "--weights", folder, "--out", out, "--seconds", 0.9, "--size", "32x48"]
    options += ["--device", "cpu", *(["--image", folder / image] if image else []), *more]
    return [str(option) for option in options]


@pytest.mark.parametrize("model", ["matrix-game-2", "matrix-game-2-gta", "matrix-game-2-templerun"])
def test_one_command_makes_a_video(model, folder, tmp_path):
    (tmp_path / "keys").write_text("slide 2\njump\n" if "templerun" in model else "forward+camera_l 2\nback\n")
    assert main(command(folder, tmp_path / "v.mp4", "--actions", tmp_path / "keys", model=model)) == 0
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 11  # 0.9 s at 12: 9 of the first block, 2 of the next
    assert json.loads((tmp_path / "v.json").read_text())["model"] == model


def test_the_grey_after_the_picture_is_encoded_until_it_stays_as_it_is(folder):
    """A VAE of the published depth, thin: no latent after the last encoded one would be another."""
    from diffusers import AutoencoderKLWan

    from inferix.models.matrix_game import ENCODED
    from inferix.models.wan.vae import VAE

    torch.manual_seed(0)
    vae = VAE(AutoencoderKLWan(base_dim=4).eval())  # the other sizes are Wan2.1's
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    latents = vae.encode_start(picture, ENCODED + 2)
    assert torch.equal(latents[ENCODED - 1], latents[ENCODED]) and torch.equal(latents[ENCODED], latents[ENCODED + 1])
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize(
    "more, said",
    [
        (["--video", "first.png"], "--video must not be given: matrix-game-2 begins with a picture and actions alone"),
    ],
)
def test_what_it_takes_not_is_refused(more, said, folder, tmp_path, capsys):
    image = None if "--video" in more else "first.png"
    assert main(command(folder, tmp_path / "v.mp4", *more, image=image)) == 2
    assert said in capsys.readouterr().err


def test_a_picture_must_be_given(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "v.mp4", image=None)) == 2
    assert "--image must be given: matrix-game-2 is conditioned on the picture" in capsys.readouterr().err
