"""The loader: every container and prefix in which Wan checkpoints come, and errors that name what is wrong."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from inferix.commands.cli import main
from inferix.models import load_model
from inferix.models.wan import ADAPTERS, Wan
from inferix.models.wan.checkpoint import find_checkpoint, load_network, save_network
from inferix.models.wan.names import canonical
from tests.models.wan_golden import DenseTable, dataclasses, published, random_network, tiny_config

CONFIG = {"num_heads": 3, "text_len": 24}


@pytest.fixture(scope="module")
def network():
    return random_network(tiny_config(ffn=64))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def same(loaded, network):
    state, wanted = loaded.state_dict(), network.state_dict()
    assert loaded.config == network.config
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


def prefixed(state, rename):
    return {rename(name): x for name, x in state.items()}


def in_layers(wrapper):
    return lambda name: f"model.{wrapper}.{name}".replace("blocks.1.", f"blocks.1.{wrapper}.")


NOISE = {"patch_embedding.bias": torch.zeros(3)}  # a state dict that must not be taken
PICKLES = {
    "bare": lambda state: state,
    "generator": lambda state: {"generator": prefixed(state, "model.{}".format)},
    "ema first": lambda state: {"generator": NOISE, "generator_ema": prefixed(state, "model.{}".format), "step": 3},
    "fsdp": lambda state: {"generator_ema": prefixed(state, in_layers("_fsdp_wrapped_module"))},
    "checkpointing": lambda state: {"generator": prefixed(state, in_layers("_checkpoint_wrapped_module"))},
    "compiled": lambda state: {"generator": prefixed(state, in_layers("_orig_mod"))},
    "nested": lambda state: {"generator": {"model": state}},
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(case, network, folder):
    torch.save(PICKLES[case](published(network)), folder / "model.pt")
    same(load_network(find_checkpoint(folder)), network)


def test_a_pickle_of_the_old_format(network, folder):
    torch.save(published(network), folder / "model.pth", _use_new_zipfile_serialization=False)
    same(load_network(find_checkpoint(folder)), network)


def test_which_weights_is_the_adapters_choice(network, folder):
    other = random_network(network.config, seed=1)
    torch.save({"generator": published(network), "generator_ema": published(other)}, folder / "model.pt")
    same(load_model("causvid", str(folder), size=(48, 80)).network, network)
    same(load_model("self-forcing", str(folder), size=(48, 80)).network, other)


def test_safetensors_whole_and_in_shards(network, folder):
    state = published(network)
    save_file(state, folder / "model.safetensors")
    same(load_network(find_checkpoint(folder)), network)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_network(find_checkpoint(folder)), network)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard b\.safetensors, which is not next to it"):
        load_network(find_checkpoint(folder))


def test_convert_writes_what_needs_no_config(network, folder, tmp_path_factory, capsys):
    torch.save({"generator": published(network)}, folder / "model.pt")
    out = tmp_path_factory.mktemp("converted") / "ours.safetensors"
    assert main(["convert", str(folder), str(out)]) == 0
    assert "2 layers" in capsys.readouterr().out
    same(load_network(out), network)
    assert main(["convert", str(folder), str(out), "--dtype", "bf16"]) == 0
    assert load_network(out, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert main(["convert", str(folder / "nowhere"), str(out)]) == 2
    capsys.readouterr()
    assert main(["convert", str(folder), str(out.with_suffix(".pt"))]) == 2
    assert "out must end in .safetensors, got " in capsys.readouterr().err and not out.with_suffix(".pt").exists()


def test_a_kill_leaves_the_earlier_file_or_the_new_one(network, tmp_path):
    """At whatever moment: a child writes one after the other, and the file is looked at after it was killed."""
    path, others = tmp_path / "m.safetensors", [random_network(network.config, seed=i) for i in range(2)]
    save_network(network, path)
    wanted = [x.state_dict() for x in (network, *others)]
    for i in range(10):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, b"x")
                while True:
                    for other in others:
                        save_network(other, path)
            finally:
                os._exit(1)
        os.read(read, 1)
        time.sleep(0.003 * i)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read), os.close(write)
        state = load_network(path).state_dict()
        assert any(all(torch.equal(state[name], x) for name, x in whole.items()) for whole in wanted)


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_lora_is_merged(style, network, folder):
    state, generator = published(network), torch.Generator().manual_seed(2)
    updates, wanted = {}, {name: x.clone() for name, x in state.items()}
    for name in ("blocks.0.self_attn.k", "blocks.1.ffn.0"):
        a = torch.randn(4, state[f"{name}.weight"].shape[1], generator=generator)
        b = torch.randn(state[f"{name}.weight"].shape[0], 4, generator=generator)
        if style == "peft":
            updates |= {f"base_model.model.model.{name}.lora_A.default.weight": a}
            updates |= {f"base_model.model.model.{name}.lora_B.default.weight": b}
        else:
            updates |= {f"diffusion_model.{name}.lora_down.weight": a, f"diffusion_model.{name}.lora_up.weight": b}
            updates |= {f"diffusion_model.{name}.alpha": torch.tensor(2.0)}
        wanted[f"{name}.weight"] += (1.0 if style == "peft" else 0.5) * b @ a
    torch.save({"generator": state}, folder / "base.pt")
    torch.save({"generator_lora": updates}, folder / "lora.pt")
    merged = published(load_model("longlive", str(folder), size=(48, 80)).network)
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in wanted)
    assert not torch.equal(merged["blocks.0.self_attn.k.weight"], state["blocks.0.self_attn.k.weight"])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda u: u.update({"blocks.7.ffn.0.lora_A.weight": torch.zeros(2, 96)}), "blocks.7.ffn.0"),
        (
            lambda u: u.pop("blocks.0.ffn.0.lora_B.weight"),
            "must hold lora_A and lora_B for blocks.0.ffn.0.weight, got A",
        ),
        (lambda u: u.update({"blocks.0.ffn.0.lora_B.weight": torch.zeros(9, 2)}), r"is \[64, 96\], got B \[9, 2\]"),
        (lambda u: u.update({"what": torch.zeros(1)}), "got what"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(spoil, message, network, folder):
    updates = {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 96), "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 2)}
    spoil(updates)
    save_file(published(network), folder / "base.safetensors")
    save_file(updates, folder / "lora.safetensors")
    with pytest.raises(ValueError, match=f"lora: .*{message}"):
        load_model("longlive", str(folder))


def spoiled(state, **changes):
    state = dict(state)
    for name, x in changes.items():
        name = name.replace("__", ".")
        if x is None:
            del state[name]
        else:
            state[name] = x
    return state


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head__head__bias": None}, r"1 tensors are missing \(head.head.bias\), 0 are unexpected \(none\)"),
        ({"blocks__1__extra": torch.zeros(1)}, r"0 tensors are missing \(none\), 1 are unexpected \(blocks.1.extra\)"),
        (
            {"blocks__1__ffn__0__weight": torch.zeros(64, 95)},
            r"must be \[64, 96\], got \[64, 95\]: dimension 1 differs",
        ),
        ({"blocks__1__self_attn__k__bias": torch.zeros(95)}, r"self_attn.k.bias must be \[96\], got \[95\]"),
        ({"patch_embedding__weight": None}, "is no Wan transformer: it has no patch_embedding.weight"),
        ({"patch_embedding__weight": torch.zeros(96, 16, 2, 2, 2)}, r"must be \[dim, channels, 1, rows, columns\]"),
    ],
)
def test_another_architecture_says_what_differs(changes, message, network, folder):
    save_file(spoiled(published(network), **changes), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_network(find_checkpoint(folder))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_heads": 3, "dim": 5120}, "dim must be 5120, as its config says, got 96"),
        ({"num_attention_heads": 40, "attention_head_dim": 128}, "dim must be 5120, as its config says, got 96"),
        ({"num_heads": 3, "num_layers": 30}, "layers must be 30, as its config says, got 2"),
        ({"num_heads": 7}, "heads must divide dim=96, got 7"),
        ({}, "heads must divide dim=96, got 0.75; a config.json next to it with num_heads"),
    ],
)
def test_a_config_that_disagrees_is_named(config, message, network, folder):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published(network), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_network(find_checkpoint(folder))


class Bomb:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_a_pickle_with_code_is_not_run(folder, capsys):
    torch.save({"generator": Bomb()}, folder / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_network(find_checkpoint(folder))
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.pt", b"PK nonsense", "damaged|no checkpoint"),
        ("model.pt", b"", "damaged"),
        ("model.safetensors", b"1234", "damaged"),
        ("model.safetensors.index.json", b"{}", "not an index of shards"),
    ],
)
def test_damaged_files(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_network(find_checkpoint(folder))


def test_folders_without_or_with_too_many(network, tmp_path):
    with pytest.raises(ValueError, match="holds no network"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="this model ships none"):
        find_checkpoint(None)
    for name in ("a.pt", "b.pt", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        torch.save({"other": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds several networks \(a.pt, b.pt\): name one"):
        find_checkpoint(tmp_path)
    torch.save({"critic": {"x": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold tensors, or one of generator_ema, generator, got critic"):
        load_network(tmp_path / "a.pt")
    torch.save({"x": torch.zeros(1), "_orig_mod.x": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds x twice, once as _orig_mod\.x"):
        load_network(tmp_path / "a.pt")


@pytest.mark.parametrize("image_dim", [0, 20], ids=["text", "image"])
def test_diffusers_transformer_is_ours(image_dim):
    """One block without a past, weights carried over by the key map: the same network, in float64.

    At t = 1: at large t diffusers' float32 sinusoids are off by 3e-5, where the recorded runs hold us to float64.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    torch.manual_seed(3)
    text_len = 512 if image_dim else 10  # diffusers takes the last 512 tokens as the text where there is an image
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=80,
        num_layers=2,
        image_dim=image_dim or None,
        added_kv_proj_dim=48 if image_dim else None,
    )
    reference = random_network(
        tiny_config(
            dim=48, heads=2, ffn=80, freq_dim=32, text_dim=16, channels_in=16, channels_out=16, image_dim=image_dim
        )
    )
    drawn = published(reference)
    names = canonical({name: torch.tensor(i) for i, name in enumerate(theirs.state_dict())}, "diffusers")
    keys = list(theirs.state_dict())
    theirs.load_state_dict(
        {keys[int(i)]: drawn[name].view_as(theirs.state_dict()[keys[int(i)]]) for name, i in names.items()}
    )
    ours = reference.double()
    ours.config = dataclasses.replace(ours.config, text_len=text_len)
    theirs = theirs.double().eval()
    model = Wan(ours, dataclasses.replace(ADAPTERS["self-forcing"], size=(48, 80)))
    x, text = torch.randn(3, 16, 6, 10).double(), torch.randn(text_len, 16).double()
    image = torch.randn(7, image_dim).double() if image_dim else None
    table = DenseTable(model)
    block = table.open_block(3)
    with torch.inference_mode():
        attend = table.plan([block], model.rope(block.frames)).attend
        got = ours([x], torch.ones(3), [ours.cross_cache(text, image)], attend)
        options = {"encoder_hidden_states_image": image[None]} if image_dim else {}
        wanted = theirs(x.transpose(0, 1)[None], torch.tensor([1]), text[None], return_dict=False, **options)[0]
    assert wanted.abs().max() > 1
    assert (got - wanted[0].transpose(0, 1)).abs().max() < 1e-6
