"""The whole command on a folder as people have it: prompts through UMT5, pictures through the VAE, kill and resume.

Weights are tiny and random; formats and names are the published ones.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch

from inferix.commands.cli import main
from inferix.models import load_model
from inferix.models.wan.text import PromptEncoder, clean, published_encoder
from inferix.models.wan.tiny_vae import MEAN, STD, TinyNetwork
from inferix.models.wan.vae import VAE, load_vae, read_vae
from inferix.world import World
from tests.models import taehv_golden as golden
from tests.models.wan_folder import WORDS, write_encoder, write_folder, write_published_vae, write_vae

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: wan)")
pytest.importorskip("ftfy", reason="ftfy is not installed (extra: wan)")
SIZE = (32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def prompt_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def options(folder, out, prompt_cache, *more, seconds=2.0, model="self-forcing"):
    chosen = ["generate", "--model", model, "--weights", folder, "--out", out, "--seconds", seconds, "--device", "cpu"]
    chosen += ["--size", f"{SIZE[0]}x{SIZE[1]}", "--prompt-cache", prompt_cache, "--prompt", "the red panda walks"]
    return [str(option) for option in [*chosen, *more]]


def frames_of(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def test_one_command_makes_a_video(folder, prompt_cache, tmp_path):
    out = tmp_path / "v.mp4"
    assert main(options(folder, out, prompt_cache, "--window", 6, "--sink", 3)) == 0
    assert frames_of(out).shape == (32, *SIZE, 3)  # 3 blocks are 1 + 4 * 8 = 33 pictures
    summary = json.loads((tmp_path / "v.json").read_text())
    # 9 frames x 6 tokens in pages of 64, 2 layers, 3 heads x 32 channels, K and V, and their scales.
    assert summary["model"] == "self-forcing" and summary["kv_bytes"]["int8"] == 9 * 2 * 3 * (2 * 64 * 32 + 4 * 96)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.json", "v.mp4", "v.png"]


def test_8_bit_layers_give_the_same_video_from_a_converted_checkpoint(folder, prompt_cache, tmp_path):
    converted = folder / "int8" / "int8.safetensors"
    converted.parent.mkdir()
    for part in ("text_encoder", "tokenizer", "vae"):
        (converted.parent / part).symlink_to(folder / part)
    assert main(["convert", str(folder), str(converted), "--linear", "int8"]) == 0
    videos = {
        "float": options(folder, tmp_path / "float.mp4", prompt_cache),
        "quantized": options(folder, tmp_path / "quantized.mp4", prompt_cache, "--linear", "int8"),
        "converted": options(converted, tmp_path / "converted.mp4", prompt_cache),
    }
    assert [main(command) for command in videos.values()] == [0, 0, 0]
    made = {name: frames_of(tmp_path / f"{name}.mp4") for name in videos}
    assert np.array_equal(made["quantized"], made["converted"])
    assert not np.array_equal(made["quantized"], made["float"])


@pytest.mark.parametrize(
    "model, seconds",
    [
        *(("causvid", 6.5), ("longlive", 2.0), ("longlive-infinity", 2.0), ("krea-realtime", 2.0)),
        *(("causal-forcing-framewise-2step", 0.5), ("self-forcing-first-frame", 2.0)),
        *(("rolling-forcing", 1.0), ("reward-forcing", 1.0)),
        *(("wan-causal", 2.0), ("wan-t2v", 2.0)),
    ],
)
def test_the_other_models_run_too(model, seconds, folder, prompt_cache, tmp_path):
    out = tmp_path / "v.mp4"
    more = ["--steps", 2, "--negative-prompt", "fog"] if model.startswith("wan") else []
    if model == "longlive":
        (tmp_path / "prompts").write_text("0 the fox walks in fog\n1.0 the fox runs in rain\n")
        more = ["--prompt-file", tmp_path / "prompts"]
    if model == "self-forcing-first-frame":
        from PIL import Image

        Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "first.png")
        more = ["--image", tmp_path / "first.png"]
    command = options(folder, out, prompt_cache, *more, seconds=seconds, model=model)
    if "--prompt-file" in more:
        at = command.index("--prompt")
        del command[at : at + 2]
    assert main(command) == 0
    assert len(frames_of(out)) == round(16 * seconds)


def test_kill_and_resume_give_the_identical_video(folder, prompt_cache, tmp_path):
    whole, killed = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    more = ["--window", 6, "--sink", 3, "--seed", 5]
    assert main(options(folder, whole, prompt_cache, *more, seconds=8)) == 0
    command = [sys.executable, "-m", "inferix", *options(folder, killed, prompt_cache, *more, seconds=600)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / ".killed.mp4.journal", time.monotonic() + 300
    block = 3 * 16 * 4 * 6 * 4
    while not (journal.exists() and journal.stat().st_size > 4 * block) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not killed.exists() and journal.stat().st_size > 4 * block
    with journal.open("ab") as file:
        file.truncate(journal.stat().st_size - 100)  # as if killed while a block was written
    assert main(options(folder, killed, prompt_cache, *more, "--seed", 6, "--resume", seconds=8)) == 2
    assert main(options(folder, killed, prompt_cache, *more, "--resume", seconds=8)) == 0
    assert np.array_equal(frames_of(whole), frames_of(killed))
    assert killed.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_the_picture_it_begins_with_is_kept_and_must_stay_the_same(folder, prompt_cache, tmp_path, capsys, monkeypatch):
    from PIL import Image

    picture = tmp_path / "first.png"
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(picture)
    before, more = picture.read_bytes(), {"seconds": 1.0, "model": "self-forcing-first-frame"}
    assert main(options(folder, tmp_path / "first.mp4", prompt_cache, "--image", picture, **more)) == 2
    assert "--image is read from it" in capsys.readouterr().err
    assert picture.read_bytes() == before and os.listdir(tmp_path) == ["first.png"]
    command = options(folder, tmp_path / "v.mp4", prompt_cache, "--image", picture, **more)
    step, calls = World.advance, []

    def killed(world, *args, **options):
        calls.append(world)
        if len(calls) == 2:
            raise SystemExit
        return step(world, *args, **options)

    monkeypatch.setattr(World, "advance", killed)
    with pytest.raises(SystemExit):
        main(command)
    Image.fromarray(np.full((50, 60, 3), 91, np.uint8)).save(picture)
    assert main([*command, "--resume"]) == 2
    assert "--resume: what --image or --video shows (its SHA-256) must be" in capsys.readouterr().err
    picture.write_bytes(before)
    with monkeypatch.context() as patch:  # until the video is closed the journal is all there is
        patch.setattr("inferix.media.VideoWriter._rename", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*command, "--resume"])
    assert main([*command, "--resume"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["first.png", "v.json", "v.mp4", "v.png"]


def test_a_picture_may_fill_the_video(folder, prompt_cache, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "first.png")
    more = {"seconds": 1 / 16, "model": "self-forcing-first-frame"}
    out = tmp_path / "v.mp4"
    assert main(options(folder, out, prompt_cache, "--image", tmp_path / "first.png", **more)) == 0
    summary = json.loads((tmp_path / "v.json").read_text())
    assert summary["frames"] == len(frames_of(out)) == 1 and "fps" not in summary
    assert "1 frames (0.1 s), all of them given" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["first.png", "v.json", "v.mp4", "v.png"]


def test_an_empty_prompt_is_taken(folder, prompt_cache, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, prompt: told.append(prompt) or torch.zeros(1, 40))
    assert main(options(folder, tmp_path / "v.mp4", tmp_path / "cache", "--prompt", "", seconds=0.5)) == 0
    assert told == [""]


def test_blocks_are_decoded_as_the_whole_video_is(folder):
    """The VAE's cache kept between blocks: pictures of 3 + 1 + 3 latents equal those of all 7 at once."""
    vae = write_vae(folder)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(7, 16, 4, 6, generator=generator)
    stream = VAE(vae).open()
    other = VAE(vae).open()
    pictures = []
    for part in latents.split([3, 1, 3]):
        pictures.append(stream(part))
        other(part.flip(0))  # another world, in between, of the same VAE
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        whole = vae.decode(latents.transpose(0, 1)[None] * std + mean).sample[0]
    wanted = ((whole + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert wanted.std() > 1
    assert np.array_equal(np.concatenate(pictures), wanted)


def vae_world(folder, name, prompt_cache, **options):
    model = load_model(name, str(folder), size=SIZE, prompt_cache=prompt_cache)
    model.adapter = dataclasses.replace(model.adapter, fused=False, rollout=9 if name == "causvid" else None)
    return World(model, **options)


@pytest.mark.parametrize("name", ["self-forcing", "causvid"])
def test_a_world_with_a_vae_is_rewound(name, folder, prompt_cache):
    """What its pictures look back on is as it was; CausVid's third rewinding is into its second rollout."""
    straight, other = (vae_world(folder, name, prompt_cache, undo=3, window=9, worlds=2) for _ in range(2))
    for blocks in (2, 1, 2):
        wanted = [straight.step(prompt="fog") for _ in range(blocks)]
        state = other.decoder.generator.get_state()
        other.decoder.generator.manual_seed(99)
        assert not any([np.array_equal(x, other.step(prompt="fog")) for x in wanted])
        twin = other.fork()
        for world in (other, twin):
            world.rewind(3 * blocks)
            world.decoder.generator.set_state(state)
            assert all(np.array_equal(x, world.step(prompt="fog")) for x in wanted)
        twin.release()
    with pytest.raises(ValueError, match=r"frames must be one of 0, 3, 6, whole blocks .* got 9"):
        other.rewind(9)
    with pytest.raises(ValueError, match=r"frames must be one of 0, whole .* got 3: World\(undo"):
        vae_world(folder, name, prompt_cache).rewind(3)


def test_restart_encodes_the_first_overlapping_frame_again(folder):
    vae = VAE(write_vae(folder))
    latents = torch.randn(6, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    stream = vae.open()
    first, second = stream(latents[:3]), stream(latents[3:])
    assert len(first) == 9 and len(second) == 12
    begun = stream.restart(latents[3:])
    # One picture for its first latent: the last of the four that the stream gave for it.
    assert torch.equal(begun[1:], latents[4:]) and not torch.equal(begun[0], latents[3])
    assert torch.allclose(begun[:1], vae.encode(second[3:4]), atol=0.05)  # there from 8-bit pictures
    more = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    afresh = vae.open()
    afresh(begun)
    assert np.array_equal(stream(more), afresh(more))


def test_an_overlap_of_several_blocks_needs_their_pictures(folder):
    vae = VAE(write_vae(folder))
    latents = torch.randn(9, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    stream = vae.open(overlap=6)
    pictures = np.concatenate([stream(block) for block in latents.split(3)])
    begun = stream.restart(latents[3:])
    assert torch.equal(begun[1:], latents[4:]) and len(pictures) == 33
    assert torch.allclose(begun[:1], vae.encode(pictures[12:13]), atol=0.05)  # the last one of latent 3
    other = vae.open()
    other(latents[:3])
    with pytest.raises(ValueError, match=r"overlap must be 6 latents of VAE.open, got 0"):
        other.restart(latents[3:])


def test_prompts_are_encoded_once(folder, tmp_path, monkeypatch):
    encoder = PromptEncoder(folder, 24, tmp_path)
    first = encoder("the  red panda&amp;fox\nwalks")
    assert first.shape[1] == 40 and 5 < len(first) <= 24
    assert torch.equal(encoder("the red panda&fox walks"), first)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    again = PromptEncoder(folder, 24, tmp_path)
    assert torch.equal(again("the  red panda&amp;fox\nwalks"), first)  # with neither of the two
    with pytest.raises(
        ImportError, match=r"transformers, which is not installed: pip install 'inferix-kernels\[wan\]'"
    ):
        encoder("another fox")
    assert len(PromptEncoder(folder, 24, None).key("x")) == 32 and encoder.key("x") != encoder.key("y")
    assert PromptEncoder(folder, 23, tmp_path).key("x") != encoder.key("x")


@pytest.mark.parametrize(
    "prompt",
    [
        "plain",
        "  two\n\tlines  ",
        "&amp;lt;b&amp;gt; &eacute;",
        "the Mona Lisa doesnâ€™t",
        "\ufeffＷｉｄｅ “quotes” ﬁ",
        "熊猫",
    ],
)
def test_prompts_are_cleaned_as_diffusers_does(prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(prompt) == prompt_clean(prompt)


def test_long_prompts_are_cut_and_damaged_entries_made_again(folder, tmp_path):
    encoder = PromptEncoder(folder, 24, tmp_path)
    long = encoder(" ".join(WORDS * 4))
    assert long.shape == (24, 40)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(encoder(" ".join(WORDS * 4)), long)


@pytest.mark.parametrize("cache", ["/dev/null/x", "/proc/x"])
def test_a_cache_that_can_not_be_written_is_one_line(cache, folder, tmp_path, capsys):
    assert main(options(folder, tmp_path / "v.mp4", cache)) == 2
    error = capsys.readouterr().err.split("inferix generate: ")[1]
    assert error.startswith(f"--prompt-cache: cannot keep embeddings in '{cache}' ") and error.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_the_encoder_that_wan_published_is_the_same(tmp_path):
    """Its names carried over: the encoder of transformers gives the same embedding."""
    theirs = write_encoder(tmp_path).eval()
    layer = {
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.0.SelfAttention": "attn",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
    }
    state = {}
    for name, x in theirs.state_dict().items():
        for part, published in layer.items():
            name = name.replace(part, published)
        name = name.replace("encoder.block.", "blocks.").replace("encoder.final_layer_norm", "norm")
        if name != "encoder.embed_tokens.weight":
            state[name.replace("shared.", "token_embedding.")] = x
    torch.save(state, tmp_path / "t5.pth")
    ours = published_encoder(tmp_path / "t5.pth").eval()
    tokens = torch.tensor([[3, 7, 9, 1]])
    with torch.inference_mode():
        assert torch.equal(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)
    torch.save({name: x for name, x in state.items() if "blocks.1.ffn" not in name}, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match=r"is no UMT5 encoder: missing encoder.block.1.layer.1.DenseReluDense"):
        published_encoder(tmp_path / "t5.pth")


def test_the_vae_that_wan_published_is_the_same(tmp_path):
    """Its names carried over: the VAE of diffusers makes the same pictures."""
    theirs = write_published_vae(tmp_path / "Wan2.1_VAE.pth")
    latents = torch.randn(2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(load_vae(tmp_path).open()(latents), VAE(theirs).open()(latents))
    torch.save({"encoder.conv1.weight": torch.zeros(8, 3, 3, 3, 3)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="is damaged or not a Wan VAE"):
        load_vae(tmp_path)


def test_light_vae_is_wans_with_fewer_channels(tmp_path):
    """A file of Wan's names, 24 channels wide, as LightX2V's pruned one is."""
    theirs = write_published_vae(tmp_path / "lightvaew2_1.pth", width=24)
    latents = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    vae = read_vae(tmp_path / "lightvaew2_1.pth")
    assert np.array_equal(vae.open()(latents), VAE(theirs).open()(latents))


def test_a_video_is_made_with_a_tiny_vae(folder, prompt_cache, tmp_path, capsys):
    file = tmp_path / "taew2_1.pth"
    torch.save(golden.fill(TinyNetwork()).state_dict(), file)
    command = options(folder, tmp_path / "v.mp4", prompt_cache, "--vae", file, seconds=0.5)
    assert main(command) == 0
    made = (tmp_path / "v.mp4").read_bytes()
    assert frames_of(tmp_path / "v.mp4").shape == (8, *SIZE, 3)
    for other, said in (
        (folder / "m.pt", "must hold tensors, got generator, generator_ema"),
        (out := tmp_path / "v.mp4", ""),
    ):
        assert main([*command, "--vae", str(other)]) == 2
        *_, error = capsys.readouterr().err.split("inferix generate: ")
        assert "--vae" in error and said in error and error.count("\n") == 1
    assert out.read_bytes() == made
    # The means and deviations that LightTAE needs are those of diffusers.
    config = write_vae(tmp_path / "vae").config
    assert (config["latents_mean"], config["latents_std"]) == (list(MEAN), list(STD))


def test_absent_parts_are_one_line(folder, prompt_cache, tmp_path, capsys, monkeypatch):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("m.pt", "config.json"):
        (bare / name).write_bytes((folder / name).read_bytes())
    cases = [
        (options(bare, tmp_path / "v.mp4", prompt_cache), "have no VAE next to them"),
        (options(folder, tmp_path / "v.mp4", prompt_cache, "--resume"), "--resume: there is nothing to resume"),
        (options(folder, tmp_path / "v.mp4", prompt_cache, "--size", "30x48"), "size must be multiples of 16 x 16"),
        (options(folder, tmp_path / "v.mp4", prompt_cache, "--image", "nowhere.png"), "--image: cannot read"),
    ]
    for command, message in cases:
        assert main(command) == 2
        error = capsys.readouterr().err.split("inferix generate: ")
        assert len(error) == 2 and message in error[1] and error[1].count("\n") == 1
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(options(folder, tmp_path / "v.mp4", prompt_cache)) == 2
    assert "diffusers, which is not installed: pip install 'inferix-kernels[wan]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]
    assert load_model("self-forcing", str(bare), size=SIZE).frame_tokens == 6
