"""`inferix generate --model magi-...` on a folder as it is published: latents, pictures with a decoder that is brought,
images and videos to begin with, a run that was killed.
"""

import json
import sys

import av
import numpy as np
import pytest
import torch

from inferix.commands.cli import main
from inferix.media import VideoWriter, read_video
from inferix.models import load_model
from inferix.models.magi.text import CaptionEncoder, clean, find_encoder
from inferix.world import World
from tests.models.magi_folder import write_folder

for library in ("diffusers", "transformers", "zstandard", "ftfy", "bs4"):
    pytest.importorskip(library, reason=f"{library} is not installed (extra: magi)")
SIZE = (48, 80)


class Blocky:
    """A stand-in for MAGI-1's VAE: a latent frame is four pictures, a pixel of it a square of eight."""

    def __init__(self, folder):
        assert (folder / "special_tokens.npz").exists()

    def open(self):
        return lambda latents: self.decode(latents)

    @staticmethod
    def decode(latents):
        pictures = (latents[:, :3].clamp(-4, 4) * 31 + 128).to(torch.uint8).permute(0, 2, 3, 1)
        return pictures.repeat_interleave(4, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()

    @staticmethod
    def encode(frames):
        latents = torch.zeros(-(-len(frames) // 4), 16, SIZE[0] // 8, SIZE[1] // 8)
        latents[:, :3] = (torch.tensor(frames[::4, ::8, ::8]).permute(0, 3, 1, 2).float() - 128) / 31
        return latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("magi"))


@pytest.fixture(scope="module")
def prompt_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def options(folder, out, prompt_cache, *more, seconds="2"):
    command = ["generate", "--model", "magi-4.5b", "--weights", str(folder), "--out", str(out), "--size", "48x80"]
    return [*command, "--steps", "4", "--prompt-cache", str(prompt_cache), "--seconds", seconds, *more]


def test_latents_come_out_where_there_is_no_decoder(folder, prompt_cache, tmp_path, capsys):
    out = tmp_path / "x"
    assert main(options(folder, out, prompt_cache, "--prompt", "a red panda in fog", seconds="3")) == 0
    latents, summary = np.load(tmp_path / "x.npy"), json.loads((tmp_path / "x.json").read_text())
    assert latents.shape == (18, 16, 6, 10) and np.isfinite(latents).all() and (latents.std((1, 2, 3)) > 0.1).all()
    assert (summary["frames"], summary["seconds_of_video"]) == (18, 3.0)
    read = summary["kv_read_per_layer_and_step"]
    said = capsys.readouterr().out
    assert f"each layer read {read['read'] / 2**20:.2f} MiB a step" in said and "18 latent frames (3.0 s)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npy"]


def test_a_longer_video_reads_no_more_of_its_past(folder, prompt_cache, tmp_path):
    reads = []
    for seconds in ("6", "12"):
        assert main(options(folder, tmp_path / "x", prompt_cache, "--prompt", "fog", seconds=seconds)) == 0
        reads.append(json.loads((tmp_path / "x.json").read_text())["kv_read_per_layer_and_step"])
    assert reads[1]["read"] < 1.5 * reads[0]["read"] and reads[1]["copied"] > 1.8 * reads[0]["copied"]
    assert reads[1]["copied"] > 3 * reads[1]["read"]  # in pages of 64 slots for frames of 15 tokens


def test_24b_in_eight_bits(prompt_cache, tmp_path):
    """Gated, heads grouped by six, latents doubled, distilled with a nearly clean copy, twelve uneven steps."""
    folder, made = write_folder(tmp_path / "weights", "magi-24b-distill-quant"), {}
    for fp8 in ("keep", "dequantize"):
        more = ("--prompt", "fog", "--model", "magi-24b-distill-quant", "--steps", "12", "--fp8", fp8)
        assert main(options(folder, tmp_path / fp8, prompt_cache, *more)) == 0
        made[fp8] = np.load(tmp_path / f"{fp8}.npy")
    error = np.linalg.norm(made["keep"] - made["dequantize"]) / np.linalg.norm(made["dequantize"])
    assert 0 < error < 0.1 and np.isfinite(made["keep"]).all()


def test_a_decoder_that_is_brought_makes_the_video(folder, prompt_cache, tmp_path):
    brought = options(folder, tmp_path / "v.mp4", prompt_cache, "--prompt", "fog", "--decoder", f"{__name__}:Blocky")
    assert main(brought) == 0
    with av.open(str(tmp_path / "v.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 48 and container.streams.video[0].average_rate == 24
    assert main(options(folder, tmp_path / "x", prompt_cache, "--prompt", "fog")) == 0
    wanted = Blocky.decode(torch.from_numpy(np.load(tmp_path / "x.npy")))
    assert np.abs(np.stack(frames).astype(int) - wanted).mean() < 6  # what H.264 leaves of noise
    assert (tmp_path / "v.png").exists()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_given_image_or_video_begins_it(kind, folder, prompt_cache, tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    # Colours that stay what they are through a video file: one to a picture.
    shades = np.repeat(generator.integers(60, 200, (32, 1, 1, 1)), 3, 3).astype(np.uint8)
    pictures = np.broadcast_to(shades, (32, *SIZE, 3))
    source = tmp_path / f"given.{'png' if kind == 'image' else 'mp4'}"
    if kind == "image":
        Image.fromarray(pictures[0]).save(source)
    else:
        with VideoWriter(source, 24, SIZE, scale=1) as video:
            video.write(pictures)
        assert np.abs(read_video(source, SIZE, 24, 99).astype(int) - pictures).max() <= 3
        assert len(read_video(source, SIZE, 12, 99)) == 16 and len(read_video(source, SIZE, 24, 5)) == 5
    more = ("--prompt", "fog", "--decoder", f"{__name__}:Blocky", f"--{kind}", str(source))
    assert main(options(folder, tmp_path / "v.mp4", prompt_cache, *more)) == 0
    frames = read_video(tmp_path / "v.mp4", SIZE, 24, 99)
    assert len(frames) == 48
    given = 4 if kind == "image" else 32  # a picture is a latent frame, which is four
    wanted = pictures[:1].repeat(4, 0) if kind == "image" else np.repeat(pictures[::4], 4, 0)
    assert np.abs(frames[:given].astype(int) - wanted).max() <= 12
    assert frames[given:].std() > 20


def test_a_given_video_may_fill_it(folder, prompt_cache, tmp_path):
    with VideoWriter(tmp_path / "given.mp4", 24, SIZE, scale=1) as video:
        video.write(np.full((24, *SIZE, 3), 90, np.uint8))
    more = ("--prompt", "fog", "--decoder", f"{__name__}:Blocky", "--video", str(tmp_path / "given.mp4"))
    assert main(options(folder, tmp_path / "v.mp4", prompt_cache, *more, seconds="1")) == 0
    summary = json.loads((tmp_path / "v.json").read_text())
    assert summary["frames"] == len(read_video(tmp_path / "v.mp4", SIZE, 24, 99)) == 24 and "fps" not in summary


def test_a_killed_run_goes_on_bit_for_bit(folder, prompt_cache, tmp_path, monkeypatch):
    command = options(folder, tmp_path / "x", prompt_cache, "--prompt", "fog", seconds="4")
    assert main(command) == 0
    whole = np.load(tmp_path / "x.npy")
    step, calls = World.advance, iter(range(99))

    def killed(world, *args, **options):
        if next(calls) == 5:
            raise SystemExit
        return step(world, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(World, "advance", killed)
        with pytest.raises(SystemExit):
            main(command)
    assert (tmp_path / ".x.journal").exists() and len(np.load(tmp_path / ".x.npy.part")) == 12
    assert np.array_equal(np.load(tmp_path / "x.npy"), whole)  # the earlier one
    assert main([*command, "--resume"]) == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), whole) and not (tmp_path / ".x.journal").exists()
    assert main([*command, "--resume"]) == 2  # nothing to resume any more, and nothing is lost
    assert np.array_equal(np.load(tmp_path / "x.npy"), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npy"]


def test_ctrl_c_while_the_pipeline_fills_keeps_what_was_made(folder, prompt_cache, tmp_path, capsys, monkeypatch):
    command = options(folder, tmp_path / "x", prompt_cache, "--prompt", "fog")
    step, calls = World.advance, []

    def interrupted(world, *args, **options):
        calls.append(world)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(world, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(World, "advance", interrupted)
        assert main(command) == 130
    journal = tmp_path / ".x.journal"
    assert f"interrupted before the first frame: --resume goes on with {journal}\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [journal]
    kept = journal.read_bytes()
    assert main(command) == 2
    assert f"--resume goes on; or delete {journal}\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [journal] and journal.read_bytes() == kept
    assert main([*command, "--resume"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npy"]


def test_a_prompt_that_changes_is_heard_where_it_begins(folder, prompt_cache, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("0 a red panda in fog\n2 a red panda in rain\n")
    assert main(options(folder, tmp_path / "x", prompt_cache, "--prompt-file", str(prompts), seconds="4")) == 0
    changed = np.load(tmp_path / "x.npy")
    assert main(options(folder, tmp_path / "x", prompt_cache, "--prompt", "a red panda in fog", seconds="4")) == 0
    same = np.load(tmp_path / "x.npy")
    assert np.array_equal(same[:12], changed[:12]) and not np.allclose(same[12:18], changed[12:18], atol=1e-3)


def test_bad_input_is_one_line(folder, prompt_cache, tmp_path, capsys):
    out, prompt = tmp_path / "x", ("--prompt", "fog")
    cases = [
        (
            options(folder, out, prompt_cache, *prompt, "--lora", "l.pt"),
            "lora must not be given: magi-4.5b has no such",
        ),
        (options(folder, out, prompt_cache, *prompt, "--guidance", "3"), "guidance must not be given"),
        (options(folder, out, prompt_cache, *prompt, "--image", "nowhere.png"), "--image: cannot read"),
        (options(folder, out, prompt_cache, *prompt, "--video", "nowhere.mp4"), "--video: cannot read"),
        (options(folder, out, prompt_cache, *prompt, "--special-tokens", "shiny"), "special tokens must be of"),
        (
            options(folder, out, prompt_cache, *prompt, "--steps", "6"),
            "steps must be a multiple of the 4 stages, got 6",
        ),
        (options(folder, out, prompt_cache, *prompt, "--window", "3"), "window must be at least the 6 frames"),
        (options(tmp_path, out, prompt_cache, *prompt), "holds no magi-4.5b"),
    ]
    for command, message in cases:
        assert main(command) == 2
        error = capsys.readouterr().err.split("inferix generate: ")
        assert len(error) == 2 and message in error[1] and error[1].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_captions_are_cleaned_and_encoded_as_published(folder, tmp_path, monkeypatch):
    """Lower case, without links, tags and rare signs; and the rows of T5 without padding."""
    assert clean("A <b>Red</b> Panda @someone https://x.com/y &amp; fog\n") == "a red panda fog"
    encoder = CaptionEncoder(find_encoder(folder), 64, tmp_path)
    rows = encoder("A Red PANDA in fog")
    from transformers import AutoTokenizer, T5EncoderModel

    where = folder / "t5_pretrained" / "t5-v1_1-xxl"
    tokens = AutoTokenizer.from_pretrained(where)(
        ["a red panda in fog"], max_length=64, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        padded = T5EncoderModel.from_pretrained(where).eval()(**tokens).last_hidden_state[0]
    assert len(rows) == tokens["attention_mask"].sum() == 6
    assert torch.allclose(rows, padded[:6], atol=1e-5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert torch.equal(encoder("A Red PANDA in fog"), rows)  # from the cache on disk
    with pytest.raises(
        ImportError, match=r"needs transformers, which is not installed: pip install 'inferix-kernels\[magi\]'"
    ):
        encoder("A fox")
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(
        ImportError, match=r"cleaning it needs bs4, which is not installed: pip install 'inferix-kernels\[magi\]'"
    ):
        clean("fog")


def test_special_tokens_change_what_is_made(folder, prompt_cache):
    model = load_model("magi-4.5b", str(folder), size=SIZE, prompt_cache=prompt_cache)
    plain = load_model("magi-4.5b", str(folder), size=SIZE, prompt_cache=prompt_cache, special_tokens=())
    lengths = [each.variants(each.conditioning("fog", []), 1)["caption"].text[0][0].shape[2] for each in (model, plain)]
    assert lengths == [4, 2]  # quality and duration before "fog" and the end
