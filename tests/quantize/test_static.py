"""prepare, a calibration, convert."""

import json

import pytest
import torch
from torch import nn

from inferix_kernels._check import CODES
from inferix_kernels.quantize import (
    Linear8,
    QConfig,
    Scheme,
    convert,
    get_default_dist_profile_qconfig,
    get_default_fp8_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    get_fp8_per_channel_weight_qconfig,
    per_channel_symmetric,
    per_tensor_symmetric,
    prepare,
    recipe_of,
)
from tests.quantize.models import LARGEST, assert_unchanged, cosine, layer_of, network, random, rounded, state_of

PER_TOKEN = get_dynamic_int8_per_token_act_per_channel_weight_qconfig()
STATIC = get_fp8_per_channel_weight_qconfig()


@pytest.mark.parametrize("make", [get_default_fp8_qconfig, get_fp8_per_channel_weight_qconfig])
@pytest.mark.parametrize("codes", CODES)
def test_a_static_layer_rounds_by_the_largest_number_of_its_calibration(codes, make):
    layer, config = layer_of(), make(codes, codes)
    model = prepare(nn.Sequential(layer), {"": config})
    seen = [random(3, 96, seed=1), random(2, 4, 96, seed=2) * 3, random(5, 96, seed=3)]
    for x in seen:
        assert torch.equal(
            model(x), nn.functional.linear(x, layer.weight, layer.bias)
        )  # a calibration computes as before
    model = convert(model)
    (made,), largest = model, max(float(x.abs().max()) for x in seen)
    assert made.config == config and not made._forward_pre_hooks
    torch.testing.assert_close(made.input_scale, torch.tensor([largest / LARGEST[codes]]))
    weight = rounded(layer.weight, codes, 1 if make is get_fp8_per_channel_weight_qconfig else None)
    x = random(6, 96, seed=4)
    x[0, 0], x[1, 1] = 100 * largest, 1e-9  # what is larger than all that was seen is cut off
    codes_of = (x.double() / made.input_scale.double()).clamp(-LARGEST[codes], LARGEST[codes])
    codes_of = codes_of.float().to(codes).double() if codes.is_floating_point else codes_of.round()
    want = codes_of * made.input_scale.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(made(x).double(), want, rtol=1e-5, atol=1e-4)
    x[2, 2], x[3, 3] = torch.nan, torch.inf
    assert made(x)[2:4].isnan().all() and made(x)[[0, 1, 4, 5]].isfinite().all()


def test_a_whole_network_static_and_dynamic_layers_beside_each_other():
    model, x = network(), random(40, 16)
    want = model(x)
    ready = prepare(model, {"": STATIC, "blocks.1": PER_TOKEN, "proj_out": None}, inplace=False)
    assert ready is not model and type(ready.blocks[0].ffn[0]) is nn.Linear
    ready(x)
    made = convert(ready, inplace=False, remove_qconfig=False)
    assert made is not ready and not recipe_of(ready)
    recipe = recipe_of(made)
    assert recipe["embedding"] == STATIC and recipe["blocks.1.ffn.0"] == PER_TOKEN and "proj_out" not in recipe
    assert cosine(made(x), want) > 0.995  # nine layers of e4m3, whose steps are 1/8 to 1/16 of a number
    assert made.blocks[1].norm.qconfig == PER_TOKEN
    assert not any("activation_post_process" in name for name, _ in made.named_modules())
    assert torch.equal(convert(ready)(x), made(x))
    assert not any("qconfig" in vars(module) for module in ready.modules())
    assert torch.equal(model(x), want) and not any(module._forward_pre_hooks for module in model.modules())


def test_a_static_layer_is_one_graph():
    torch._dynamo.reset()
    model = prepare(nn.Sequential(layer_of()), {"": STATIC})
    model(random(9, 96))
    convert(model)
    x = random(5, 96, seed=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def nothing(model):
    pass


def saw_nan(model):
    x = random(3, 16)
    x[1, 1] = torch.nan
    model(x)


def part_of_it(model):
    model.blocks[0](random(3, 48)), model.blocks[1].attn(random(3, 48)), model.embedding(random(3, 16))


def no_tokens(model):
    model.embedding(random(0, 16))


@pytest.mark.parametrize(
    "calibrate, said",
    [
        (nothing, "layer 'embedding' can not be converted: its calibration was never run: call the prepared model"),
        (no_tokens, "layer 'embedding' can not be converted: its calibration was never run"),
        (part_of_it, "layer 'blocks.1.ffn.0' can not be converted: its calibration was never run"),
        (saw_nan, "layer 'embedding' can not be converted: its calibration saw NaN or infinity"),
    ],
)
def test_a_calibration_that_is_missing_is_named_and_nothing_changes(calibrate, said):
    model = prepare(network(), {"": STATIC})
    calibrate(model)
    state, types = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=said) as error:
        convert(model)
    assert "\n" not in str(error.value)
    assert_unchanged(model, state, types)


def test_a_model_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match="model must be a prepared one, got one in which no module has a qconfig"):
        convert(network())
    model = nn.Sequential(layer_of())
    model.qconfig = model[0].qconfig = STATIC
    with pytest.raises(ValueError, match="layer '0' can not be converted: it was not prepared: call prepare"):
        convert(model)


def test_a_model_may_be_prepared_again_and_keeps_what_it_has_seen():
    model = prepare(nn.Sequential(layer_of()), {"": STATIC})
    model(torch.full((2, 96), 8.0))
    prepare(model, {"": STATIC})
    model(torch.full((2, 96), 4.0))
    assert float(convert(model)[0].input_scale) == pytest.approx(8 / 448)


def test_what_was_seen_travels_in_a_state_dict():
    model, other = (prepare(nn.Sequential(layer_of()), {"": STATIC}) for _ in range(2))
    model(random(4, 96))
    other.load_state_dict(model.state_dict())
    assert torch.equal(convert(other)[0].input_scale, convert(model)[0].input_scale)


def test_other_modules_can_be_observed_too():
    model = prepare(network(), {"": PER_TOKEN, "blocks.1": None}, observer_non_leaf_module_list=[nn.LayerNorm])
    model(random(4, 16))
    assert float(model.blocks[0].norm.activation_post_process.amax) > 0
    assert not hasattr(model.blocks[1].norm, "activation_post_process")
    model = convert(model)
    assert not hasattr(model.blocks[0].norm, "activation_post_process") and not model.blocks[0].norm._forward_pre_hooks


def test_a_layer_called_with_its_input_by_name_is_observed():
    model = prepare(nn.Sequential(layer_of()), {"": STATIC})
    model[0](input=torch.full((1, 96), 4.0))
    assert float(convert(model)[0].input_scale) == pytest.approx(4 / 448)


def test_a_profile_is_written_of_inputs_and_weights(tmp_path):
    config = get_default_dist_profile_qconfig(str(tmp_path / "seen"), max_sample_num=1000, bins=7)
    model = prepare(nn.Sequential(layer_of(), layer_of(8, 40)), {"": config})
    x = random(100, 96)
    model(x[:50]), model(x[50:])
    assert convert(model)[0].config == QConfig(
        Scheme(torch.float8_e4m3fn, per_tensor_symmetric, False), Scheme(torch.float8_e4m3fn, per_tensor_symmetric)
    )
    found = json.loads((tmp_path / "seen" / "distribution.json").read_text())
    assert list(found) == ["0", "1"]
    seen = found["0"]["activation"]
    assert seen["numbers"] == sum(seen["counts"]) == 1000 and len(seen["counts"]) == 7 and seen["shape"] == [50, 96]
    assert abs(seen["mean"]) < 0.15 and 0.9 < seen["std"] < 1.1  # a thousand of ten thousand numbers, all alike
    assert found["1"]["weight"]["numbers"] == 8 * 40


def test_a_profile_that_can_not_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    model = prepare(nn.Sequential(layer_of()), {"": get_default_dist_profile_qconfig(str(tmp_path / "file"))})
    model(random(2, 96))
    with pytest.raises(ValueError, match="output_dir: cannot write"):
        convert(model)
    assert type(model[0]) is nn.Linear


def test_a_class_of_a_mapping_finds_the_scale_that_was_seen():
    class Own(nn.Module):
        @classmethod
        def from_float(cls, layer):
            made = cls()
            made.scale = layer.activation_post_process.scale()
            return made

    model = prepare(nn.Sequential(layer_of()), {"": STATIC})
    model(torch.full((2, 96), 8.0))
    assert float(convert(model, {nn.Linear: Own})[0].scale) == pytest.approx(8 / 448)


def test_a_scale_of_a_calibration_goes_with_a_static_config_and_no_other():
    with pytest.raises(ValueError, match="input_scale must be given for a static qconfig, and for no other"):
        Linear8.from_qconfig(layer_of(), STATIC)
    with pytest.raises(ValueError, match="smooth must be None where inputs have one scale"):
        Linear8.from_qconfig(layer_of(), STATIC.dynamic(), smooth=torch.ones(96))
    assert QConfig(STATIC.activation, STATIC.weight).static and per_channel_symmetric == STATIC.weight.qscheme
