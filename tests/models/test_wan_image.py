"""Image to video: 36 channels, CLIP's tokens, the picture's latents; against diffusers and transformers."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inferix.commands.cli import main
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.image import MEAN, PUBLISHED, STD, load_image_encoder
from inferix.models.wan.vae import VAE
from inferix_kernels import Policy
from tests.models.test_wan_teacher import (
    GUIDANCE,
    SIZE,
    STEPS,
    Watched,
    adapter_for,
    furthest,
    noise,
    scheduler_of,
    theirs_like,
)
from tests.models.wan_folder import write_folder, write_image_encoder, write_vae
from tests.models.wan_golden import random_network, table_for, tiny_config

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: wan)")
TOKENS, WIDTH = 5, 160  # what the tiny tower makes of a picture


def image_config(**changes):
    # diffusers takes the last 512 tokens as the text where there is an image
    return tiny_config(channels_in=36, image_dim=WIDTH, text_len=512, **changes)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


def test_guided_steps_are_those_of_the_pipeline_of_diffusers(vae, tmp_path):
    """WanImageToVideoPipeline itself, float32, over 3 latent frames: the latents of every step."""
    from PIL import Image

    network, look = random_network(image_config()), load_image_encoder(write_image_encoder(tmp_path) and tmp_path)
    texts = torch.randn(2, 512, 40, generator=torch.Generator().manual_seed(1))
    theirs, scheduler = theirs_like(network), scheduler_of("unipc")
    pipeline = diffusers.WanImageToVideoPipeline(None, None, vae, scheduler, transformer=theirs)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.encode_image = lambda *_: look(picture())[None]  # theirs cuts a square out of it, Wan's squeezes it
    wanted = []
    pipeline(
        Image.fromarray(picture()),
        prompt_embeds=texts[:1],
        negative_prompt_embeds=texts[1:],
        height=SIZE[0],
        width=SIZE[1],
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise().transpose(0, 1)[None],
        output_type="latent",
        callback_on_step_end=lambda _, i, t, kept: wanted.append(kept["latents"][0].transpose(0, 1)) or {},
    )
    adapter = adapter_for("unipc", "wan-i2v-480p")
    model = Wan(network, adapter, encode_start=VAE(vae).encode_start, look=look).for_video(9, picture())
    assert model.concat_latents.shape == (3, 20, 6, 10) and model.tokens.shape == (TOKENS, WIDTH)
    told, against = (model.conditioning_from(text) for text in texts)
    decoder = Watched(
        model, table_for(model, Policy(window=3), backend="compiled"), torch.Generator(), against, noise=[noise()]
    )
    decoder.seen.append(decoder.step(told))
    assert all(furthest(got, x) < 2e-5 for got, x in zip(decoder.seen, wanted, strict=True))
    other = Wan(network, adapter, encode_start=VAE(vae).encode_start, look=look).for_video(9, picture(1))
    assert furthest(other.tokens, model.tokens) > 1e-3 and furthest(other.concat_latents, model.concat_latents) > 1e-3


def test_the_tower_is_told_what_clip_is_told(tmp_path):
    tower = write_image_encoder(tmp_path)
    x = torch.tensor(picture()).permute(2, 0, 1)[None] / 127.5 - 1  # as Wan begins, and goes on
    x = F.interpolate(x, size=(28, 28), mode="bicubic", align_corners=False).mul(0.5).add(0.5)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    layers, noted = tower.encoder.layers, []
    layers[-1].register_forward_pre_hook(lambda _, args: noted.append(args[0]))
    with torch.inference_mode():
        tower(x)
    assert furthest(load_image_encoder(tmp_path)(picture()), noted[0][0]) < 1e-5  # the last layer's input; float32


def test_the_tower_that_wan_published_is_the_same(tmp_path):
    """Its names carried over, q, k and v packed, the text tower beside it left alone."""
    theirs = write_image_encoder(tmp_path)
    names = {
        "embeddings.class_embedding": "cls_embedding",
        "embeddings.patch_embedding": "patch_embedding",
        "embeddings.position_embedding.weight": "pos_embedding",
        "pre_layrnorm": "pre_norm",
        "post_layernorm": "post_norm",
        "encoder.layers": "transformer",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    state = {
        "textual.token_embedding.weight": torch.zeros(3),
        "visual.head": torch.zeros(4),
        "log_scale": torch.ones(()),
    }
    for name, x in theirs.state_dict().items():
        for called, published in names.items():
            name = name.replace(called, published)
        if "q_proj" in name:
            parts = [theirs.state_dict()[_unpublished(name, names).replace("q_proj", f"{p}_proj")] for p in "qkv"]
            state[f"visual.{name.replace('self_attn.q_proj', 'attn.to_qkv')}"] = torch.cat(parts)
        elif not any(part in name for part in ("k_proj", "v_proj", "position_ids")):
            state[f"visual.{name}"] = (
                x[None, None] if name == "cls_embedding" else x[None] if name == "pos_embedding" else x
            )
    published = tmp_path / "published"
    published.mkdir()
    torch.save({name: x.half() for name, x in state.items()}, published / PUBLISHED)
    theirs.half().float()  # Wan's file is in half precision
    theirs.save_pretrained(tmp_path / "image_encoder")
    assert torch.equal(load_image_encoder(published)(picture()), load_image_encoder(tmp_path)(picture()))
    torch.save({name: x for name, x in state.items() if ".1.mlp." not in name}, published / PUBLISHED)
    with pytest.raises(ValueError, match=r"is no CLIP image tower: missing encoder.layers.1.mlp.fc1.bias, .* none"):
        load_image_encoder(published)
    torch.save({"visual.head": torch.zeros(1)}, published / PUBLISHED)
    with pytest.raises(ValueError, match=r"is no CLIP image tower: it has no visual\.patch_embedding\.weight"):
        load_image_encoder(published)


def _unpublished(name, names):
    for called, published in names.items():
        name = name.replace(published, called)
    return name


def test_one_command_makes_a_video_from_a_picture(tmp_path, capsys):
    from PIL import Image

    folder, out = write_folder(tmp_path / "weights", image=True), tmp_path / "v.mp4"
    Image.fromarray(picture()).save(tmp_path / "first.png")
    command = ["generate", "--model", "wan-i2v-480p", "--weights", folder, "--out", out, "--seconds", "0.7"]
    command += ["--size", "32x48", "--prompt", "the fox runs", "--prompt-cache", tmp_path / "prompts", "--steps", "2"]
    command = [str(word) for word in [*command, "--negative-prompt", "fog", "--device", "cpu"]]
    assert main(command) == 2
    assert "image must be given: this network is conditioned on the first picture" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--image", str(tmp_path / "first.png")]) == 0
    assert "11 frames" in capsys.readouterr().out and out.exists()
    (tmp_path / "words").write_text("0 the fox runs\n0.3 the fox walks\n")
    at = command.index("--prompt")
    command[at : at + 2] = ["--prompt-file", str(tmp_path / "words")]
    assert main([*command, "--image", str(tmp_path / "first.png")]) == 2
    assert "--prompt-file must hold one prompt for wan-i2v-480p" in capsys.readouterr().err


def test_bad_input_says_what_it_must_be():
    network, adapter = random_network(image_config()), adapter_for("euler", "wan-i2v-480p")
    with pytest.raises(ValueError, match="takes 36 channels and gives 16, which causvid can't be: image-to-video"):
        Wan(network, dataclasses.replace(ADAPTERS["causvid"], size=SIZE))
    with pytest.raises(ValueError, match="need a VAE next to them and, to look at it, image_encoder/"):
        Wan(network, adapter).for_video(9, picture())
    with pytest.raises(ValueError, match=r"image must be uint8 \[48, 80, 3\], got uint8 \[8, 8, 3\]"):
        Wan(network, adapter).for_video(9, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="image: wan-i2v-480p is conditioned on the first picture: see for_video"):
        Wan(network, adapter).conditioning_from(torch.zeros(2, 40))
