"""Checkpoints with 8-bit layers: what `inferix convert --linear` writes is what loading quantizes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inferix.commands.cli import main
from inferix.models import load_model
from inferix.models.linears import eight_bit_names, quantized_layer
from inferix.models.wan.checkpoint import load_network, save_network
from inferix.models.wan.network import WanNetwork
from inferix_kernels.quantize import quantize_linears
from tests.models.wan_golden import published, random_network, tiny_config


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"num_heads": 3, "text_len": 24}))
    save_file(published(random_network(tiny_config())), base / "model.safetensors")
    return base


def same(one, other):
    state, wanted = one.state_dict(), other.state_dict()
    bits = (state[name].view(torch.uint8).equal(x.view(torch.uint8)) for name, x in wanted.items())
    return state.keys() == wanted.keys() and all(bits)


@pytest.mark.parametrize("linear", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_converted_checkpoint_is_what_loading_quantizes(linear, dtype, folder, tmp_path, capsys):
    """Bit for bit, half of a bf16 file, and in both from weights that no dtype has rounded before."""
    out, plain = tmp_path / "q.safetensors", tmp_path / "bf16.safetensors"
    assert main(["convert", str(folder), str(out), "--linear", linear, "--dtype", dtype]) == 0
    assert capsys.readouterr().out == f"{out}: 2 layers of width 96, 3 heads, {linear} and {dtype}\n"
    assert main(["convert", str(folder), str(plain), "--dtype", "bf16"]) == 0
    wide = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    kept = load_model("self-forcing", str(out), dtype=wide)
    assert kept.linear == linear and kept.dtype == wide
    assert same(kept.network, load_model("self-forcing", str(folder), dtype=wide, linear=linear).network)
    assert same(kept.network, load_model("self-forcing", str(out), dtype=wide, linear=linear).network)
    codes = {name: load_file(file) for name, file in (("q", out), ("plain", plain))}
    layers = [f"{name}.weight" for name in eight_bit_names(WanNetwork(tiny_config()))]
    held = {name: sum(file[layer].nbytes for layer in layers) for name, file in codes.items()}
    assert held["plain"] == 2 * held["q"]
    for other in {"int8", "fp8", "bf16"} - {linear}:
        assert main(["convert", str(out), str(plain), "--linear", other, "--dtype", "bf16"]) == 2
        said = capsys.readouterr().err
        assert said == f"inferix convert: --linear must be {linear}, as {out} holds its layers, got {other}\n"


def test_updates_are_merged_before_they_are_rounded(folder, tmp_path):
    network = load_network(folder / "model.safetensors")
    name = "blocks.1.ffn.0"
    a, b = torch.randn(4, 96) / 8, torch.randn(160, 4) / 8
    lora, out = tmp_path / "l.safetensors", tmp_path / "q.safetensors"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, lora)
    made = load_network(folder / "model.safetensors", lora=str(lora), dtype=torch.bfloat16, linear="int8")
    layer = network.get_submodule(name)
    wanted = quantized_layer(name, layer.weight + b @ a, layer.bias.bfloat16(), "int8")
    off = (made.get_submodule(name).codes.int() - wanted.codes.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.001
    save_network(made, out)
    with pytest.raises(ValueError, match=r"^lora must not be given: .*q.safetensors holds its layers in int8; merge "):
        load_network(out, lora=str(lora))


def damaged(tensors, change):
    name = "blocks.1.ffn.0"
    if change == "no scale":
        del tensors[f"{name}.weight_scale"]
    if change == "a float among them":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    if change == "scales of another size":
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:1].clone()
    if change == "scales that are not finite":
        tensors[f"{name}.weight_scale"][5] = torch.nan
    return tensors


DAMAGE = {
    "no scale": r"blocks.1.ffn.0.weight must be in 8 bits like blocks.0.self_attn.qkv.weight, with a weight_scale, got",
    "a float among them": r"blocks.1.ffn.0.weight must be in 8 bits like .*, got torch.float32",
    "scales that are not finite": "blocks.1.ffn.0.weight_scale must hold finite numbers",
    "scales of another size": r"blocks.1.ffn.0.weight_scale must be \[160\], got \[1\]",
}


@pytest.mark.parametrize("change", DAMAGE)
def test_a_checkpoint_that_is_partly_in_8_bits_is_refused(change, tmp_path):
    out = tmp_path / "q.safetensors"
    network = random_network(tiny_config())
    quantize_linears(network, names=eight_bit_names(network))
    save_network(network, out)
    with safe_open(out, "pt") as file:
        header = file.metadata()
    save_file(damaged(load_file(out), change), out, header)
    with pytest.raises(ValueError, match=f"^weights: .*{DAMAGE[change]}"):
        load_network(out)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_that_is_not_finite_is_not_quantized(folder, part):
    state = load_file(folder / "model.safetensors")
    state[f"blocks.1.self_attn.k.{part}"][3] = float("inf")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^weights: blocks.1.self_attn.qkv.{part} must hold finite numbers"):
        load_network(folder / "model.safetensors", linear="int8")
