"""LongLive 2 as a world and by command: shots, a picture to begin with, Wan2.2's VAE. Its runs are compared with its
own code's in test_wan_relatives.py. Weights are tiny and random."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from inferix import saved
from inferix.commands.cli import main
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.vae import VAE, load_vae
from inferix.world import World
from inferix_kernels import OutOfPages
from tests.models.test_wan_world import Pictures, text
from tests.models.wan_folder import write_folder, write_network, write_published_vae22, write_vae22
from tests.models.wan_golden import random_network, tiny_config

SIZE, CUT = (64, 96), ADAPTERS["longlive-2"].shots.cut
FIVE = {"channels_in": 48, "channels_out": 48}


def encode(frames):
    return torch.from_numpy(frames[:, ::16, ::16].mean(-1)).float().div(127.5).sub(1)[:, None].repeat(1, 48, 1, 1)


def longlive_2(name="longlive-2", **changes):
    """Blocks of 2 frames; a block sees 8 frames at most, the first 2 of the video and of the shot among them."""
    changes = {"block_frames": 2, "window": 6, "sink": 2, "sampler": "euler", "size": SIZE} | changes
    return Wan(
        random_network(tiny_config(**FIVE)), dataclasses.replace(ADAPTERS[name], **changes), text, Pictures, encode
    )


def made(world, prompts):
    blocks = []
    for prompt in prompts:
        world.step(prompt=prompt)
        blocks.append(world.latents)
    return torch.cat(blocks)


@pytest.fixture(scope="module")
def model():
    return longlive_2()


def test_a_cut_begins_one_shot(model):
    """The next blocks have its prompt without the cut; what is pinned takes its room from the window."""
    world = World(model, kv="fp32")
    made(world, [CUT + "fog", None, CUT + "rain", None, None, None])
    assert world.prompt == "rain" and world.decoder.branches[0].shots == (4,)  # the first block is no other shot
    assert sorted(world.table.pinned) == [4, 5]
    made(world, [None, CUT + "rain"])  # the same words again: another shot
    assert world.decoder.branches[0].shots == (4, 14) and sorted(world.table.pinned) == [4, 5]
    made(world, [None])
    assert sorted(world.table.pinned) == [14, 15]
    world.commit_pending()
    assert list(world.table.held) == [0, 1, 12, 13, 14, 15, 16, 17]


def test_a_shot_is_another_time_and_another_anchor(model):
    """Under the same words: what comes after the cut is not what would have come, and what came before is."""
    prompts = ["fog", None, None, None, None, None]
    plain = made(World(model, kv="fp32"), prompts)
    cut = made(World(model, kv="fp32"), [*prompts[:2], "fog", *prompts[3:]])
    assert torch.equal(plain, cut)
    same_words = longlive_2()
    same_words.text = lambda prompt: text(prompt.removeprefix(CUT))
    shot = made(World(same_words, kv="fp32"), [*prompts[:2], CUT + "fog", *prompts[3:]])
    assert torch.equal(plain[:4], shot[:4]) and (plain[4:] - shot[4:]).abs().max() > 0.01


def test_a_world_of_shots_is_saved_forked_and_rewound(model, tmp_path):
    world = World(model, kv="int8", worlds=3, undo=2)
    made(world, ["fog", None, CUT + "rain", None])
    saved.save(world, tmp_path / "world")
    forked, loaded = world.fork(), saved.load(world, tmp_path / "world")
    after = made(world, [None, None])
    assert torch.equal(after, made(forked, [None, None])) and torch.equal(after, made(loaded, [None, None]))
    forked.step(prompt=CUT + "snow")
    forked.rewind(2)  # the cut with it: its first frames are not pinned yet
    assert forked.decoder.branches[0].shots == (4,)
    forked.step(prompt=CUT + "snow")
    forked.commit_pending()
    assert forked.decoder.branches[0].shots == (4, 12) and 2 not in forked.decoder.rewinds
    state = torch.load(tmp_path / "world" / saved.STATE)
    torch.save(state | {"shots": [4, 4]}, tmp_path / "world" / saved.STATE)
    (tmp_path / "world" / saved.CHECKSUM).unlink()
    with pytest.raises(ValueError, match="has no proper 'shots'"):
        saved.load(world, tmp_path / "world")


def test_a_run_of_shots_is_taken_up_bit_for_bit(model):
    prompts = ["fog", None, CUT + "rain", None, None, CUT + "snow", None]
    whole, again = made(World(model, kv="int8"), prompts), World(model, kv="int8")
    for latents, prompt in zip(whole[:8].split(2), prompts):
        again.replay(latents, prompt=prompt)
    assert torch.equal(made(again, prompts[4:]), whole[8:])


def test_a_cut_that_failed_is_no_part_of_the_world(model):
    """The next block goes on with the words of before, and the cut can be asked for again."""
    world, straight = (World(model, kv="int8") for _ in range(2))
    made(world, ["fog", None, None])
    fork = world.fork()
    with pytest.raises(OutOfPages):  # there is room for one world
        made(fork, [None] * 3)
    with pytest.raises(OutOfPages):
        world.step(prompt=CUT + "rain")
    assert world.prompt == "fog" and world.decoder.branches[0].shots == ()
    fork.release()
    after, wanted = made(world, [CUT + "rain", None]), made(straight, ["fog", None, None, CUT + "rain", None])[6:]
    assert world.prompt == "rain" and world.decoder.branches[0].shots == (6,) and torch.equal(after, wanted)


def test_recaching_keeps_to_the_room_that_there_is(model):
    """Under a new prompt, with a shot pinned behind the window: the store has room for 8 frames."""
    world = World(model, kv="fp32")
    made(world, ["fog", CUT + "rain", None, None, None, None])
    world.step(prompt="snow", recache=True)
    world.commit_pending()
    assert list(world.table.held) == [0, 1, 2, 3, 10, 11, 12, 13] and world.table.next_frame == 14


def test_a_video_begins_with_its_picture():
    picture = np.full((*SIZE, 3), 200, np.uint8)
    bare = longlive_2("longlive-2-i2v")
    with pytest.raises(ValueError, match="image: videos of longlive-2-i2v begin with a picture"):
        World(bare).step(prompt="fog")
    for wrong, said in (
        (None, "image must be given"),
        (picture[1:], r"image must be uint8 \[64, 96, 3\], got uint8 \[63"),
    ):
        with pytest.raises(ValueError, match=said):
            bare.with_picture(wrong)
    with pytest.raises(ValueError, match="longlive-2 is conditioned on no picture"):
        longlive_2().with_picture(picture)
    told = []
    model = bare.with_picture(picture)
    predict = model.predict
    model.predict = lambda inputs, *more: told.append(inputs[-1].t.tolist()) or predict(inputs, *more)
    latents = made(World(model, kv="fp32"), ["fog", None])
    assert torch.equal(latents[:1], encode(picture[None])) and not torch.equal(latents[1], latents[0])
    assert told[:4] == [[0.0, t] for t in (999.0, 937.0, 833.0, 624.0)] and told[4] == 999.0


def test_what_it_was_not_made_for(model, caplog):
    with pytest.raises(ValueError, match="time must be absolute: longlive-2 counts it through the shots of a video"):
        World(model, time="relative")
    for window, sink, least in ((3, 2, "2 frames of one block and the first 2"), (1, 0, "2 frames of one block, ")):
        with pytest.raises(ValueError, match=f"window must be at least the {least}.*, got {window}"):
            World(model, window=window, sink=sink)  # at a cut, no room would be left in the window
    made(World(model, window=3, sink=1), ["fog", CUT + "rain", None, None, CUT + "snow", None])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "inferix"):
        World(model, window=4, sink=1)
    assert caplog.messages == ["longlive-2 was made for window=6, sink=2, and is run with window=4, sink=1"]


def test_blocks_are_decoded_as_the_whole_video_is(tmp_path):
    """From diffusers' folder, and from the file that Wan published."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    theirs = write_vae22(tmp_path)
    latents = torch.randn(3, 48, 2, 3, generator=torch.Generator().manual_seed(0))
    stream = load_vae(tmp_path).open()
    pictures = np.concatenate([stream(part) for part in latents.split([1, 2])])
    z = latents.transpose(0, 1)[None]
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    whole = theirs.decode(z * std + mean).sample[0].permute(1, 2, 3, 0)
    assert pictures.shape == (9, 32, 48, 3)
    assert np.abs(pictures - ((whole.numpy() + 1) * 127.5)).max() < 1.01
    published = tmp_path / "published"
    published.mkdir()
    theirs = write_published_vae22(published / "Wan2.2_VAE.pth")
    assert np.array_equal(load_vae(published).open()(latents), VAE(theirs).open()(latents))
    (published / "Wan2.1_VAE.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="holds two VAEs"):
        load_vae(published)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for library in ("diffusers", "transformers", "ftfy"):
        pytest.importorskip(library, reason=f"{library} is not installed (extra: wan)")
    return write_folder(tmp_path_factory.mktemp("weights"), wan22=True)


@pytest.mark.parametrize("model", ["longlive-2", "longlive-2-i2v"])
def test_one_command_makes_a_video(model, folder, tmp_path, capsys):
    from PIL import Image

    options = ["generate", "--model", model, "--weights", folder, "--out", tmp_path / "v.mp4", "--device", "cpu"]
    options += ["--size", "64x96", "--prompt-cache", tmp_path / "cache", "--seconds", 1.5]
    (tmp_path / "prompts").write_text(f"0 the fox walks\n1 {CUT}the fox runs in snow\n")
    options += ["--prompt-file", tmp_path / "prompts"]
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "first.png")
    image = ["--image", tmp_path / "first.png"]
    assert main([str(x) for x in [*options, *(image if "i2v" in model else [])]]) == 0
    assert json.loads((tmp_path / "v.json").read_text())["frames"] == 36  # at 24 a second; a block is 32, or 29
    if "i2v" in model:
        clip = ["--video", tmp_path / "v.mp4", "--out", tmp_path / "w.mp4"]
        for more, said in (([], "image must be given"), (clip, "begins with a picture and words alone")):
            assert main([str(x) for x in [*options, *more]]) == 2
            assert said in capsys.readouterr().err


def test_a_vae_of_other_latents_is_refused(folder, tmp_path):
    from inferix.models import load_model

    write_published_vae22(tmp_path / "Wan2.2_VAE.pth")
    (tmp_path / "m").mkdir()
    write_network(tmp_path / "m")
    model = load_model("self-forcing", str(tmp_path / "m"), size=(48, 80), vae=str(tmp_path / "Wan2.2_VAE.pth"))
    with pytest.raises(
        ValueError, match=r"vae: .* holds a VAE of latents of 48 channels, those of self-forcing have 16"
    ):
        model.stream()
