"""Files of tensors that are not what they seem: misnamed, cut off, made to do harm. One line each, and no harm."""

import json
import os
import shutil
import struct
import tempfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from inferix.models import load_model
from inferix.models.magi.captions import load_captions
from inferix.models.wan import containers
from inferix.models.wan.checkpoint import find_checkpoint, load_network
from inferix.models.wan.containers import read_tensors
from inferix.models.wan.text import PromptEncoder
from inferix.models.wan.vae import load_vae
from tests.models.wan_folder import write_encoder, write_vae
from tests.models.wan_golden import published, random_network, tiny_config
from tests.soak import soak_checkpoints

X = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def same(found, wanted=X):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], x) for name, x in wanted.items())


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ""])
@pytest.mark.parametrize("format", ["safetensors", "zip", "old", "zst", "index"])
def test_what_a_file_is_its_contents_say(format, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    if format == "safetensors":
        save_file(X, path)
    elif format == "zst":
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(save(X)))
    elif format == "index":
        save_file(X, tmp_path / "part")
        path.write_text(json.dumps({"weight_map": dict.fromkeys(X, "part")}))
    else:
        torch.save(X, path, _use_new_zipfile_serialization=format == "zip")
    assert same(read_tensors(path)[0])


@pytest.mark.parametrize("length", [0x80, 0x4B50, 0x7B])
def test_the_length_of_a_header_may_look_like_another_mark(length, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 3.0))
    assert read_tensors(tmp_path / "x")[0]["a"].item() == 3.0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"these are no weights\n" * 50, "neither safetensors .* it begins with b'these are no wei'"),
        (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .* `git lfs pull`"),
        (b"\x80\x02text", "is damaged or not a checkpoint"),
        (b"\x80\x02K\x03.", "must hold a dictionary of tensors, got int|is damaged"),
        (b"PK\x03\x04" + bytes(60), "is damaged or not a checkpoint"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "is damaged"),
        (b"[1, 2]", "it begins with"),
        (b'{"weight_map": [}', "is not JSON"),
        (b'{"weight_map": ' + b"[" * 100_000, "is not JSON"),
        (b'{"weight_map": {}}', "is not an index of shards"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.index.json"])
def test_a_file_of_something_else_is_one_line(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"weights: .*{message}")
    refused(tmp_path / name, f"lora: .*{message}", argument="lora")


def test_what_is_no_file_is_one_line(tmp_path):
    refused(tmp_path, "must be a file")
    refused(tmp_path / "nowhere", "there is no file .*nowhere")
    os.mkfifo(tmp_path / "fifo")  # of which nobody writes the other end
    refused(tmp_path / "fifo", "must be a file")


# Indices


def write_index(folder, name):
    """An index beside one shard, and bait where the name may lead."""
    save_file(X, folder / "bait.safetensors")
    inside = folder / "model"
    inside.mkdir()
    save_file(X, inside / "part.safetensors")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": name}}))
    return index


OUTSIDE = [
    "../bait.safetensors",
    "..",
    ".",
    "",
    "sub/x.safetensors",
    "..\\bait.safetensors",
    "a\0b",
    7,
    None,
    ["x"],
    {},
]


@pytest.mark.parametrize("name", [*OUTSIDE, "absolute", "/dev/zero"])
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    name = str(tmp_path / "bait.safetensors") if name == "absolute" else name
    refused(write_index(tmp_path, name), "weights: .*index.json must name files next to it, got ")


def test_an_index_does_not_name_itself_or_a_pickle(tmp_path):
    index = write_index(tmp_path, "model.safetensors.index.json")
    refused(index, "must be a safetensors file, as a shard: it is of the kind index")
    torch.save(X, index.parent / "p.bin")
    index.write_text(json.dumps({"weight_map": {"a": "p.bin"}}))
    refused(index, "must be a safetensors file, as a shard: it is of the kind pickle")


def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path):
    index = write_index(tmp_path, "part.safetensors")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, file in enumerate(index.parent.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../blobs/{i}")
    assert same(read_tensors(snapshot / index.name)[0])


def test_shards_do_not_hold_the_same_tensor_twice(tmp_path):
    index = write_index(tmp_path, "again.safetensors")
    save_file({"b": X["b"], "a": X["a"] + 1}, index.parent / "again.safetensors")
    refused(index, "names shards that hold the same tensors: a")


def test_libraries_are_given_no_index_that_leads_elsewhere(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path / "image_encoder"
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    kind = transformers.CLIPVisionModel
    assert containers.pretrained(kind, folder, "a tower").config.hidden_size == 16
    whole = (folder / "model.safetensors").read_bytes()
    tensors = read_tensors(folder / "model.safetensors")[0]
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"image_encoder is not a tower that transformers can read: missing .*, unexpected none"
    ):
        containers.pretrained(kind, folder, "a tower")  # and not one with random numbers in it
    (folder / "model.safetensors").rename(tmp_path / "bait.safetensors")
    names = dict.fromkeys(tensors, "../bait.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=r"index.json must name files next to it, got '../bait.safetensors'"):
        containers.pretrained(kind, folder, "a tower")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights: .*image_encoder is damaged or not a tower that transformers can"):
        containers.pretrained(kind, folder, "a tower")


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("text_encoder", {"num_layers": 1}, "missing none, unexpected encoder.block.1.*, if its config is right"),
        ("text_encoder", {"num_layers": 3}, "missing encoder.block.2.*, unexpected none"),
        ("text_encoder", {"d_ff": 47}, "is damaged or not|missing encoder"),
        ("text_encoder", {"num_layers": 2**31}, "num_layers must be at most 1024, got 2147483648"),
        ("vae", {"base_dim": 2**40}, "base_dim must be at most 1048576, got 1099511627776"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean and latents_std must be 16 numbers each"),
        ("vae", {"latents_std": [float("nan")] * 16}, "latents_mean and latents_std must be 16 numbers each"),
        ("vae", {"latents_std": "x"}, "is damaged or not that of a VAE"),
    ],
)
def test_what_lies_beside_is_what_its_config_says(part, change, message, beside, tmp_path):
    """Where the library would fill with random numbers, leave out, or fail in the middle of a video."""
    folder = tmp_path / "model"
    shutil.copytree(beside, folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"weights: .*{part if part != 'vae' else ''}.*({message})") as caught:
        PromptEncoder(folder, 24)._encode("the fox runs") if part == "text_encoder" else load_vae(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    folder = tmp_path_factory.mktemp("beside")
    write_encoder(folder)
    write_vae(folder)
    return folder


# Compressed files


def compressed(path, header, data, **options):
    zstandard = pytest.importorskip("zstandard")
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file, zstandard.ZstdCompressor(**options).stream_writer(file) as packed:
        packed.write(struct.pack("<Q", len(header)) + header)
        for part in data:
            packed.write(part)
    return path


def entry(count):
    return {"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}


MANY = [bytes(1 << 20)] * 300


@pytest.mark.parametrize(
    "header, data, message",
    [
        (entry(16), MANY, "is damaged: it holds more than its header says"),
        (entry(1 << 29), MANY, "is damaged: it holds less than its header says"),
        (entry(1 << 60), MANY, "no space left: .* expands to 1152921504606846976 bytes, of which"),
        (b"{" + b" " * (1 << 28), MANY, "compressed in it is no safetensors file"),
        (b"[]", [], "is damaged"),
        (b"{}", MANY, "holds more than"),
        ({"a": {"data_offsets": [0, -5]}}, [], "is damaged"),
        ({"a": 3}, [], "is damaged"),
    ],
)
def test_nothing_is_expanded_past_what_its_header_says(header, data, message, tmp_path, monkeypatch):
    """300 MB of zeros in 30 kB: what is written of them is bounded."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    written = []
    real = tempfile.NamedTemporaryFile

    def counting(*args, **options):
        file = real(*args, **options)
        write = file.write
        file.write = lambda data: written.append(len(data)) or write(data)
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", counting)
    refused(compressed(tmp_path / "x.safetensors.zst", header, data), f"weights: .*{message}")
    assert not list(folder.iterdir()) and sum(written) <= (64 << 20 if "less" not in message else 301 << 20)


def test_compressed_files_of_several_frames_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = save(X)
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:5], data[5:100], data[100:])]
    (tmp_path / "x.zst").write_bytes(b"".join(frames))
    assert same(read_tensors(tmp_path / "x.zst")[0])


# Pickles


def pickled(path, content, old=False):
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "'a' is larger than what the file holds of it"),
        ({"a": torch.zeros(2, device="meta")}, "'a' is not a plain tensor"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is not a plain tensor"),
        ({3: torch.zeros(2)}, "3 is not a plain tensor"),
        ([torch.zeros(2)], "must hold a dictionary of tensors, got list"),
        ({}, "must hold tensors, got none"),
        ({"state_dict": {"model": {"module": {"model": X}}}}, "must hold a dictionary of tensors, got dict"),
    ],
)
def test_a_pickle_holds_plain_tensors(content, message, old, tmp_path):
    refused(pickled(tmp_path / "x.pt", content, old), f"weights: .*{message}")


# Networks


@pytest.fixture(scope="module")
def wan():
    return random_network(tiny_config(ffn=64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks.99999999999.ffn.0.weight": torch.zeros(1)}, "3 layers, but no blocks.2"),
        ({"blocks.x.ffn.0.weight": torch.zeros(1)}, r"1 are unexpected \(blocks.x.ffn.0.weight\)"),
        (
            {"head.head.bias": torch.zeros(64, dtype=torch.int32)},
            "head.head.bias must be floating-point numbers, got torch.int32",
        ),
        ({"patch_embedding.weight": torch.zeros(96, 16, 1, 0, 2)}, "5 dimensions, none of them 0, got"),
        ({"text_embedding.0.weight": torch.zeros(())}, r"must have 2 dimensions, none of them 0, got \[\]"),
        ({"head.head.weight": torch.zeros(0, 96)}, "must have 2 dimensions, none of them 0"),
    ],
)
def test_sizes_are_those_of_tensors_that_are_there(changes, message, wan, tmp_path):
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    save_file(published(wan) | changes, tmp_path / "m.sft")
    with pytest.raises(ValueError, match=f"weights: .*{message}"):
        load_network(find_checkpoint(tmp_path))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        *({"heads": n} for n in (float("nan"), -3, 0.5, "3", True, 2**40, [3])),
        *({"text_len": n} for n in (0, -1, 10**9, float("inf"))),
        *({"eps": n} for n in (0.0, -1e-6, float("nan"), 2.0, "1e-6")),
    ],
)
def test_settings_that_are_no_sizes_are_named(change, ours, wan, tmp_path):
    config = {"heads": 3, "text_len": 24, "eps": 1e-6} | change
    names = {"heads": "heads" if ours else "num_heads"}
    text = json.dumps({names.get(name, name): value for name, value in config.items()})
    save_file(published(wan), tmp_path / "m.bin", {"format": "inferix-wan/1", "config": text} if ours else None)
    (tmp_path / "config.json").write_text("{}" if ours else text)
    name = names.get(*change, *change)
    with pytest.raises(ValueError, match=rf"weights: .*: {name} must be .*, got "):
        load_network(find_checkpoint(tmp_path))


@pytest.mark.parametrize("config", ["[", "[3]", "{}", '"x"', "[" * 100_000, '{"heads": 3'])
def test_a_header_of_ours_that_is_damaged_is_one_line(config, wan, tmp_path):
    save_file(published(wan), tmp_path / "m.safetensors", {"format": "inferix-wan/1", "config": config})
    with pytest.raises(ValueError, match="weights: ") as caught:
        load_network(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        *({"dim": 10**12}, {"layers": 10**9}, {"heads": 0}, {"heads": 3}, {"head_dim": 7}, {"eps": float("nan")}),
        *({"block_frames": 4}, {"grid": 1000}, {"patch": 432.5}, {"ffn": "48"}, {"other": 1}),
    ],
)
def test_a_tiny_world_has_the_sizes_of_one(config, tmp_path):
    from inferix.models.tiny.model import TinyConfig, TinyWorldModel

    sizes = {"dim": 32, "layers": 1, "heads": 2, "head_dim": 16, "ffn": 48}
    state = TinyWorldModel(TinyConfig(**sizes)).state_dict()
    save_file(state, tmp_path / "t.safetensors", {"config": json.dumps(sizes)})
    assert load_model("tiny", str(tmp_path / "t.safetensors")).layers == 1
    save_file(state, tmp_path / "t.safetensors", {"config": json.dumps(sizes | config)})
    with pytest.raises(ValueError, match="weights: ") as caught:
        load_model("tiny", str(tmp_path / "t.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"caption_token": np.zeros((1, 8)), "logo_token": np.zeros((1, 8)), "other_tokens": np.zeros((9, 8))},
        {"caption_token": np.zeros(8), "logo_token": np.zeros((1, 8)), "other_tokens": np.zeros((100, 8))},
        {"caption_token": np.zeros((1, 8)), "logo_token": np.zeros((1, 9)), "other_tokens": np.zeros((100, 8))},
        {"other_tokens": np.zeros((100, 8))},
        {"caption_token": np.zeros((1, 8)), "logo_token": np.zeros((1, 8)), "other_tokens": np.zeros((1 << 21, 8))},
    ],
    ids=["too few rows", "one dimension", "two widths", "arrays missing", "128 MiB of zeros"],
)
def test_special_rows_are_there_or_named(arrays, tmp_path):
    np.savez_compressed(tmp_path / "special_tokens.npz", **arrays)
    with pytest.raises(ValueError, match=r"special tokens: .* is damaged or another file") as caught:
        load_captions(tmp_path, None)
    assert "\n" not in str(caught.value)


def test_damage_by_the_dozen():
    """A slice of `python -m tests.soak.soak_checkpoints`."""
    pytest.importorskip("zstandard", reason="zstandard is not installed (extra: magi)")
    counts, failures = soak_checkpoints.soak(times=150, seed=17)
    assert not failures
    assert counts["refused"] > 75 and counts["loaded"] > 10
