"""The command line's words and names: what is no text is refused by the option's name; links lead where they say."""

import os
import re

import numpy as np
import pytest
import torch

from inferix.commands.cli import main
from inferix.media import LatentWriter
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import export


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    export(TinyWorldModel(TinyConfig(dim=32, layers=2, heads=2, head_dim=16, ffn=48)), path, {})
    return str(path)


def generate(weights, out, *options):
    options = ("--seconds", "0.2", "--prompt", "desert night", *options)
    return main(["generate", "--weights", weights, "--out", str(out), *map(str, options)])


TEXTS = ["--out", "--prompt", "--weights", "--image", "--video", "--prompt-file", "--actions", "--lora", "--device"]


@pytest.mark.parametrize("bad", ["a\0b", "a\udce9b"])
@pytest.mark.parametrize("option", [*TEXTS, "--negative-prompt", "--prompt-cache", "--decoder", "--special-tokens"])
def test_what_is_no_text_is_refused_by_its_option(option, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", option, bad]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"inferix generate: {option} must (have no NUL character|be text in UTF-8), got '.*'\n", said)
    assert ascii(bad)[1:-1] in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, named", [(["a\0.pt", "b.safetensors"], "source"), (["a.pt", "b\0.safetensors"], "out")]
)
def test_arguments_without_an_option_are_named_too(arguments, named, capsys):
    assert main(["convert", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"inferix convert: {named} must have no NUL character, got ")


@pytest.mark.parametrize("option", ["--folder", "--token", "--push"])
def test_the_options_of_play_are_text(option, capsys):
    assert main(["play", option, "a\0"]) == 2
    assert capsys.readouterr().err.startswith(f"inferix play: {option} must have no NUL character, got ")


def test_a_prompt_file_holds_text(weights, tmp_path, capsys):
    (tmp_path / "prompts").write_text("0 desert night\0\n")
    assert main(["generate", "--weights", weights, "--prompt-file", str(tmp_path / "prompts")]) == 2
    assert "--prompt-file: " in (said := capsys.readouterr().err) and "NUL" in said and said.count("\n") == 1


@pytest.mark.parametrize("there", [False, True], ids=["dangling", "there"])
@pytest.mark.parametrize("name", ["v.mp4", "stored"])
def test_a_video_is_written_where_a_link_leads(name, there, weights, tmp_path):
    """And what goes beside it beside the link, by its name."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    real, link = tmp_path / "far" / name, tmp_path / "near" / "v.mp4"
    link.symlink_to(f"../far/{name}")
    if there:
        real.write_text("old")
    assert generate(weights, link) == 0
    assert link.is_symlink() and not real.is_symlink() and b"ftyp" in real.read_bytes()[:12]
    assert os.listdir(real.parent) == [name] and sorted(os.listdir(link.parent)) == ["v.json", "v.mp4", "v.png"]


@pytest.mark.parametrize("name", ["v.json", "v.png"])
def test_what_goes_beside_a_video_follows_links_too(name, weights, tmp_path):
    (tmp_path / name).symlink_to("stored")
    assert generate(weights, tmp_path / "v.mp4") == 0
    assert (tmp_path / name).is_symlink() and (tmp_path / "stored").stat().st_size > 100


@pytest.mark.parametrize("name", ["v.mp4", "v.png", "v.json"])
@pytest.mark.parametrize(
    "to, reason", [("no/v.mp4", "No such file or directory"), ("loop", "Too many levels of symbolic")]
)
def test_a_link_that_leads_nowhere_is_one_line(name, to, reason, weights, tmp_path, capsys):
    (tmp_path / name).symlink_to(to)
    (tmp_path / "loop").symlink_to(name)
    assert generate(weights, tmp_path / "v.mp4") == 2
    said = capsys.readouterr().err
    assert said.startswith("inferix generate: --out: cannot write '") and reason in said and said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == sorted(["loop", name])


@pytest.mark.parametrize("name", ["v.png", "v.json"])
def test_two_files_that_are_one_are_refused(name, weights, tmp_path, capsys):
    (tmp_path / name).symlink_to("v.mp4")
    assert generate(weights, tmp_path / "v.mp4") == 2
    said = capsys.readouterr().err
    assert f"v.mp4' and '{tmp_path / name}' must be two files, got links to one" in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == [name]


def test_the_weights_are_not_written_over_through_a_link(weights, tmp_path, capsys):
    (tmp_path / "v.json").symlink_to(weights)
    assert generate(weights, tmp_path / "v.mp4") == 2
    assert "would be written, but --weights is read from it" in capsys.readouterr().err


def test_latents_are_written_where_a_link_leads(tmp_path):
    (tmp_path / "x.npy").symlink_to("stored")
    with LatentWriter(tmp_path / "x.npy", 2, (3,)) as writer:
        assert (tmp_path / ".stored.part").exists()
        writer.write(np.ones((2, 3), np.float32))
    assert (tmp_path / "x.npy").is_symlink() and np.load(tmp_path / "stored").shape == (2, 3)
    assert sorted(os.listdir(tmp_path)) == ["stored", "x.npy"]
