"""The recipe of the published engine's examples, unchanged, on diffusers' Wan and on ours."""

import pytest
import torch

from inferix_kernels import quantize
from inferix_kernels.quantize import (
    Linear8,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    quantize_dynamic,
)
from tests.quantize.models import cosine, random

RECIPE = {
    "": get_dynamic_int8_per_token_act_per_channel_weight_qconfig(),
    "text_embedding": None,
    "proj_out": None,
    "head": None,
}


def test_on_diffusers_wan(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    from tests.integrations.tiny_wan import call, tiny

    model, calls = tiny(), []
    want = call(model)
    with pytest.warns(UserWarning, match="^qconfig_dict: no module of the model is 'text_embedding', 'head'$"):
        quantize_dynamic(model, RECIPE)
    left = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert left == ["proj_out"] and sum(isinstance(module, Linear8) for module in model.modules()) == 25
    function = quantize.layer.quantize_rows
    monkeypatch.setattr(quantize.layer, "quantize_rows", lambda *args, **kw: calls.append(1) or function(*args, **kw))
    got = call(model)  # its time embedding has one row
    assert cosine(got, want) > 0.9999 and len(calls) == 25 - 2 * (2 + 1)  # q, k, v of x; k and v of the prompt
    quantize.save(model, tmp_path / "wan.safetensors")
    assert torch.equal(call(quantize.load(tiny(), tmp_path / "wan.safetensors")), got)


def test_on_our_wan():
    from tests.models.wan_golden import random_network, tiny_config

    network = random_network(tiny_config()).eval()
    layers = {name for name, module in network.named_modules() if type(module) is torch.nn.Linear}
    text = random(7, network.config.text_dim)
    want = network.cross_cache(text)
    with pytest.warns(UserWarning, match="^qconfig_dict: no module of the model is 'proj_out'$"):
        quantize_dynamic(network, RECIPE)
    found = {name for name, module in network.named_modules() if isinstance(module, Linear8)}
    assert layers - found == {"text_embedding.0", "text_embedding.2", "head.head"}
    for got, exact in zip(network.cross_cache(text).text, want.text):
        assert all(cosine(a, b) > 0.999 for a, b in zip(got, exact))
