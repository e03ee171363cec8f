"""The cache of prompt embeddings: many write it at once, and nobody needs it."""

import os
import pwd
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from inferix.models.wan import text
from inferix.models.wan.text import PromptEncoder

EMBEDDING = torch.arange(6.0).view(2, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a model whose encoder needs no library."""
    (tmp_path / "text_encoder").mkdir()
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, prompt: EMBEDDING.clone())
    return tmp_path


def test_many_meet_the_same_new_prompt_at_once(folder, monkeypatch):
    count, barrier, got = 8, threading.Barrier(8), []
    monkeypatch.setattr(PromptEncoder, "_encode", lambda self, prompt: (barrier.wait(60), EMBEDDING)[1])
    encoders = [PromptEncoder(folder, 24, folder / "cache") for _ in range(count)]
    threads = [threading.Thread(target=lambda e=encoder: got.append(e("fox"))) for encoder in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == count and all(torch.equal(x, EMBEDDING) for x in got)
    (file,) = (folder / "cache").iterdir()  # and no temporary one
    plain = folder / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode
    monkeypatch.setattr(PromptEncoder, "_encode", None)
    assert torch.equal(PromptEncoder(folder, 24, folder / "cache")("fox"), EMBEDDING)


def nobody(_):
    raise KeyError("no such user")


@pytest.mark.parametrize("home", [None, "/dev/null"])
def test_without_a_home_nothing_is_kept_and_a_line_says_so(home, folder, monkeypatch, capsys):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    if home:
        monkeypatch.setenv("HOME", home)
    encoder = PromptEncoder(folder, 24)
    assert torch.equal(encoder("fox"), EMBEDDING) and torch.equal(encoder("panda"), EMBEDDING)
    said = capsys.readouterr().err
    assert said.startswith("prompt_cache: cannot keep embeddings in '~/.cache/inferix/prompts' (")
    assert said.endswith("): going on without\n") and said.count("\n") == 1


def test_the_default_folder_is_kept_where_it_can_be(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    PromptEncoder(folder, 24)("fox")
    assert len(list((folder / ".cache/inferix/prompts").glob("*.safetensors"))) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_an_error_for_a_folder_that_was_named(named, folder, monkeypatch, capsys):
    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(text, "save_file", full)
    monkeypatch.setenv("HOME", str(folder))
    encoder = PromptEncoder(folder, 24, folder / "cache" if named else None)
    if named:
        with pytest.raises(ValueError, match=r"prompt_cache: cannot keep embeddings in .*no space left"):
            encoder("fox")
    else:
        assert torch.equal(encoder("fox"), EMBEDDING) and capsys.readouterr().err.count("\n") == 1
    assert not [name for _, _, names in os.walk(folder) for name in names]


@pytest.mark.parametrize(
    "spoiled",
    [
        b"",
        b"\x08\0\0\0\0\0\0\0nonsense",
        {"other": EMBEDDING},
        {"embedding": EMBEDDING[0]},
        {"embedding": EMBEDDING.int()},
    ],
    ids=["empty", "nonsense", "another tensor", "another shape", "another dtype"],
)
def test_a_damaged_entry_is_made_again(spoiled, folder):
    encoder = PromptEncoder(folder, 24, folder / "cache")
    encoder("fox")
    (file,) = (folder / "cache").iterdir()
    file.write_bytes(spoiled) if isinstance(spoiled, bytes) else save_file(spoiled, file)
    assert torch.equal(encoder("fox"), EMBEDDING) and torch.equal(text.load_file(file)["embedding"], EMBEDDING)


def test_a_cache_that_can_only_be_read_serves_what_it_has(folder, monkeypatch):
    encoder = PromptEncoder(folder, 24, folder / "cache")
    encoder("fox")
    monkeypatch.setattr(text.os, "access", lambda *_: False)
    assert torch.equal(encoder("fox"), EMBEDDING)
    with pytest.raises(
        ValueError, match=r"prompt_cache: cannot keep embeddings in '.*cache' \(it can not be written\)"
    ):
        encoder("panda")
