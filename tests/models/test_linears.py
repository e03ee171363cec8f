"""Networks with 8-bit layers: which layers, the same results as the formula, worlds that know of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inferix
from inferix import World, saved
from inferix.commands.cli import main
from inferix.finite import NotFinite
from inferix.models import load_model
from inferix.models.linears import eight_bit_names, weight_bytes
from inferix.models.tiny.measures import true_video
from inferix.models.tiny.model import Layer, TinyConfig, TinyWorldModel
from inferix.models.tiny.simulator import THEMES, TIMES
from inferix_kernels.quantize import Linear8, Residual, quantize_linears
from tests.models.test_wan_world import wan
from tests.models.wan_golden import random_network, tiny_config


def dense(heads):
    """Attention over the blocks at hand, every block seeing all; q and k as they come."""

    def attend(layer, qkv, norm_q, norm_k, eps=1e-6):
        q, k, v = qkv.flatten(0, -2).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1).view(*qkv.shape[:-1], -1)

    return attend


def tiny_case():
    torch.manual_seed(0)
    network = TinyWorldModel(TinyConfig(layers=2)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 192, network.config.patch, generator=generator)
    actions = torch.randint(0, 5, (1, 2, 3), generator=generator)

    def run():
        cross = network.prompt_cache(torch.tensor([[[0, 0], [1, 1]]]))
        return network(x.to(network.head.weight.dtype), torch.tensor([[0.0, 0.5]]), actions, cross, dense(4))

    return network, run


def wan_case(**changes):
    network = random_network(tiny_config(**changes)).requires_grad_(False)
    config, generator = network.config, torch.Generator().manual_seed(1)
    blocks = [torch.randn(frames, config.channels_in, 8, 12, generator=generator) for frames in (3, 2)]
    texts = [torch.randn(tokens, config.text_dim, generator=generator) for tokens in (4, config.text_len)]
    image = torch.randn(5, config.image_dim, generator=generator) if config.image_dim else None

    def run():
        crosses = [network.cross_cache(text, image) for text in texts]
        return network(blocks, torch.tensor([999.0] * 3 + [0.0] * 2), crosses, dense(config.heads), 0)

    return network, run


CASES = {"tiny": tiny_case, "wan": wan_case, "wan-i2v": lambda: wan_case(channels_in=36, image_dim=160)}
NAMES = {
    "tiny": ("layers", {"qkv", "out", "up", "down"}),
    "wan": ("blocks", {"self_attn.qkv", "self_attn.o", *(f"cross_attn.{x}" for x in "qkvo"), "ffn.0", "ffn.2"}),
}
NAMES["wan-i2v"] = ("blocks", NAMES["wan"][1] | {"cross_attn.k_img", "cross_attn.v_img"})


@pytest.mark.parametrize("case", CASES)
def test_the_first_and_the_last_layers_stay_as_they_are(case):
    network, _ = CASES[case]()
    stack, names = NAMES[case]
    assert set(eight_bit_names(network)) == {f"{stack}.{i}.{name}" for i in range(2) for name in names}
    for name in network.FULL_PRECISION:  # none is left from an earlier layout
        assert any(name in found.split(".") for found, _ in network.named_modules()) or name == "img_emb"


class Alone(nn.Module):
    """An 8-bit layer that no one knows to be one: what is before and after it is float arithmetic."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("case", CASES)
def test_a_network_in_8_bits_is_its_layers_one_by_one(case, codes):
    """Codes that float32 rounding moves by one are all that differs; the rounding to 8 bits itself costs far more."""
    network, run = CASES[case]()
    exact = run()
    quantize_linears(network, codes, names=eight_bit_names(network))
    fused = run()
    for name in [name for name, module in network.named_modules() if isinstance(module, Linear8)]:
        network.set_submodule(name, Alone(network.get_submodule(name)))
    apart, size = run(), exact.norm()
    assert (fused - apart).norm() < 0.003 * size
    assert 0.001 * size < (fused - exact).norm() < (0.04 if codes is torch.int8 else 0.12) * size


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_recipe_may_name_one_of_two_layers_with_one_input(name):
    """Codes for both would be of no use to a float layer, nor to one of another dtype."""
    network = random_network(tiny_config())
    text = torch.randn(5, network.config.text_dim)
    want = network.cross_cache(text).text
    for dtype in (torch.int8, torch.float8_e4m3fn):
        quantize_linears(network, dtype, names=[f"blocks.{int(dtype == torch.int8)}.cross_attn.{name}"])
    if name == "k":
        quantize_linears(network, torch.float8_e4m3fn, names=["blocks.1.cross_attn.v"])
    for got, exact in zip(network.cross_cache(text).text, want):
        for a, b in zip(got, exact):
            assert (a - b).norm() < 0.05 * b.norm()


def test_the_tiny_worlds_cross_attention_is_attention_to_the_words():
    """The projections of q and of the output are multiplied into the words' keys and values: in float64 nothing is
    left of that."""
    torch.manual_seed(0)
    layer, words = Layer(TinyConfig()).double().requires_grad_(False), torch.randn(2, 3, 3, 128).double()
    for bias in (layer.cross_q.bias, layer.cross_out.bias, layer.norm_cross.bias):
        bias.copy_(torch.randn(128))
    x = torch.randn(2, 3, 3, 64, 128).double()
    k, v = layer.cross_kv(words).unflatten(-1, (2, 4, 32)).transpose(-4, -2).unbind(-3)
    q = layer.cross_q(layer.norm_cross(x)).flatten(2, 3).unflatten(-1, (4, 32)).transpose(-3, -2)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).reshape(x.shape)
    made = layer.cross_attention(Residual(x), layer.cross_cache(words)).sum()
    torch.testing.assert_close(made, x + layer.cross_out(attended), rtol=0, atol=1e-12)
    for name in ("cross_q", "cross_kv", "cross_out"):  # a user may quantize these too
        layer.set_submodule(name, Linear8.from_linear(getattr(layer, name).float()))
    rough = layer.float().cross_attention(Residual(x.float()), layer.cross_cache(words.float())).sum()
    assert (rough - made).norm() < 0.02 * (made - x).norm()


def tiny_world(linear, **options):
    """A world that has seen six true frames, and what the simulator makes of the next three."""
    video, world = true_video(seed=7, frames=9), World("tiny", seed=3, linear=linear, **options)
    prompt = THEMES[int(video.themes[0] @ [len(TIMES), 1])]
    world.observe(video.frames[:6], actions=video.actions[:6].tolist(), prompt=prompt)
    return world, video.actions[6:].tolist(), video.frames[6:].astype(float)


@pytest.mark.parametrize("linear", [None, "int8", "fp8", "bf16"])
def test_the_tiny_world_runs_in_8_bits_and_in_bf16(linear):
    """Each makes what the simulator makes: a frame that stood still would be 1.7 off."""
    world, actions, truth = tiny_world(linear)
    assert world.model.linear == (linear if linear != "bf16" else None)
    assert world.model.dtype == (torch.bfloat16 if linear == "bf16" else torch.float32)
    assert np.abs(world.step(actions=actions) - truth).mean() < 0.6


def test_a_saved_world_goes_on_with_its_own_layers(tmp_path):
    worlds = {linear: tiny_world(linear, kv="bf16", worlds=2)[0] for linear in (None, "int8")}
    for linear, world in worlds.items():
        saved.save(world, tmp_path / str(linear))
    again = saved.load(worlds["int8"], tmp_path / "int8")
    assert np.array_equal(again.step(action="left"), worlds["int8"].step(action="left"))
    for mine, theirs in ((None, "int8"), ("int8", None)):
        with pytest.raises(ValueError, match=rf"linear {theirs!r} \(here {mine!r}\)"):
            saved.load(worlds[mine], tmp_path / str(theirs))


def test_a_layer_that_is_not_finite_is_named():
    model = wan(window=6)
    quantize_linears(model.network, names=eight_bit_names(model.network))
    model.network.blocks[1].ffn[2].bias[0] = float("nan")
    with pytest.raises(NotFinite, match=r"first in what blocks.1.ffn.2 gives \(weights .*: blocks.1.ffn.2.bias\)$"):
        World(model, kv="fp32").step(prompt="fog")


def test_the_command_takes_it(tmp_path, capsys):
    out = tmp_path / "v.mp4"
    assert main(["generate", "--linear", "int8", "--seconds", "0.4", "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["linear"] == "int8"
    with pytest.raises(SystemExit):
        main(["play", "--linear", "int4"])
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_what_makes_no_sense_is_said():
    with pytest.raises(ValueError, match=r"^linear must be one of int8, fp8, bf16, got 'int4'$"):
        World("tiny", linear="int4")
    with pytest.raises(ValueError, match=r"^linear must be one of int8, fp8, bf16, got 'int4'$"):
        inferix.generate(linear="int4")
    with pytest.raises(ValueError, match=r"^linear must not be given with a Model: "):
        World(load_model("tiny"), linear="int8")
    with pytest.raises(ValueError, match=r"^linear must not be given: magi-4.5b-distill-quant has no such option$"):
        World("magi-4.5b-distill-quant", linear="int8")
    with pytest.raises(ValueError, match=r"^linear must be int8 or fp8 where dtype is torch.float32, got 'bf16'$"):
        load_model("self-forcing", "nowhere", linear="bf16", dtype=torch.float32)


def test_the_bytes_of_weights_are_known_before_they_are_loaded():
    network, _ = wan_case()
    for linear, codes in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        made, _ = wan_case()
        quantize_linears(made, codes, names=eight_bit_names(made))
        assert weight_bytes(network, linear) == sum(x.nbytes for x in made.state_dict().values()) == weight_bytes(made)
    assert weight_bytes(network) == 2 * weight_bytes(network, "bf16")
