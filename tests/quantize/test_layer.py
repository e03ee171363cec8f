"""Linear layers with 8-bit weights in anybody's model."""

import copy

import pytest
import torch
from torch import nn

from inferix_kernels import Quantized, linear, quantize_rows
from inferix_kernels._check import CODES
from inferix_kernels.quantize import (
    Linear8,
    QConfig,
    Scheme,
    per_channel_symmetric,
    per_tensor_symmetric,
    per_token_symmetric,
    quantize_linears,
)

# Errors of W and of x: half a step of int8 in 127 of the row's largest, e4m3's 1/16 of each number, both as the norm
# of a random row sees them (largest / rms is about 3.5 for rows of 96).
ERROR = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(n=40, k=96, bias=True, dtype=torch.float32):
    layer = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return layer.to(dtype).requires_grad_(False)


def model_of():
    return nn.Sequential(layer_of(), nn.GELU(), nn.Sequential(layer_of(24, 40, bias=False)), nn.LayerNorm(24)).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("codes", CODES)
def test_a_layer_is_the_two_ops(codes, bias, dtype):
    layer, x = layer_of(bias=bias, dtype=dtype), random(5, 96, seed=9).to(dtype)
    made = Linear8.from_linear(layer, codes)
    weight = quantize_rows(layer.weight, codes)
    assert torch.equal(made.qweight, weight.codes) and torch.equal(made.weight_scale, weight.scales[None])
    assert torch.equal(made(x), linear(quantize_rows(x, codes), weight, bias=layer.bias, dtype=dtype))
    got, want = made(x).float(), layer(x).float()
    assert 0 < (got - want).norm() / want.norm() < ERROR[codes]


def test_rows_may_lie_in_any_number_of_dimensions():
    made, x = Linear8.from_linear(layer_of()), random(2, 3, 4, 96, seed=9)
    assert torch.equal(made(x), made(x.view(24, 96)).view(2, 3, 4, 40))
    assert torch.equal(made(x[0, 0, 0]), made(x.view(24, 96))[0])
    assert torch.equal(made(x.transpose(0, 2)), made(x).transpose(0, 2))


def test_an_input_of_another_width_or_type_is_named():
    made = Linear8.from_linear(layer_of())
    for x in (random(5, 95, seed=9), torch.tensor(1.0), quantize_rows(random(5, 95, seed=9), torch.int8)):
        with pytest.raises(ValueError, match=r"^x must be \[\.\.\., 96\], got \["):
            made(x)
    with pytest.raises(TypeError, match=r"^x must be a tensor or a Quantized, got list$"):
        made([1.0] * 96)


@pytest.mark.parametrize("codes", CODES)
def test_smoothing_saves_the_small_channels_beside_a_large_one(codes):
    layer, x = layer_of(bias=False), random(64, 96, seed=9)
    smooth = torch.ones(96)
    smooth[7] = 1000.0
    layer.weight[:, 7] = 0  # so that the large channel itself adds nothing, and no error of its own
    x = x * smooth
    want = layer(x)
    plain, smoothed = (Linear8.from_linear(layer, codes, smooth=given)(x) for given in (None, smooth))
    assert (smoothed - want).norm() < ERROR[codes] * want.norm()
    if codes == torch.int8:  # e4m3 has an exponent, and keeps numbers of such different sizes
        assert (plain - want).norm() > 0.5 * want.norm()


def test_published_codes_are_used_as_they_are():
    codes = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = random(8).abs()
    made = Linear8(Quantized(codes, scales), bias=random(8, seed=1), backend="reference")
    assert made.qweight.data_ptr() == codes.data_ptr() and made.weight_scale.data_ptr() == scales.data_ptr()
    x = torch.eye(16)  # its rows are codes of 127 and scales of 1/127: the products are exact
    torch.testing.assert_close(made(x).T, codes * scales[:, None] + random(8, seed=1)[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_a_model_leaves_the_codes_alone(dtype):
    model = quantize_linears(model_of(), torch.float8_e4m3fn)
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    model.to(dtype)
    assert model[3].weight.dtype == dtype
    after = model[0].state_dict()
    assert before.keys() == after.keys() == {"qweight", "weight_scale", "bias"}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    assert all(tensor.is_meta for tensor in model.to("meta")[0].state_dict().values())


@pytest.mark.parametrize("codes", CODES)
def test_a_models_layers_are_replaced_in_place_and_its_state_loads_into_another(codes):
    model = model_of()
    whole, x = copy.deepcopy(model), random(6, 96, seed=9)
    assert quantize_linears(model, codes) is model
    assert [type(layer) for layer in (model[0], model[2][0])] == [Linear8, Linear8]
    assert not any(module.training for module in model.modules())
    got, want = model(x), whole(x)
    assert 0 < (got - want).norm() / want.norm() < 2 * ERROR[codes]  # two layers, one after the other
    other = nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Sequential(nn.Linear(40, 24, bias=False)), nn.LayerNorm(24))
    quantize_linears(other.requires_grad_(False), codes).load_state_dict(model.state_dict())
    assert torch.equal(other(x), got)


def test_layers_are_chosen_by_name():
    model = quantize_linears(model_of(), names=["2.0"])
    assert type(model[0]) is nn.Linear and type(model[2][0]) is Linear8
    model = model_of()
    with pytest.raises(ValueError, match="names must be linear layers of the model, got '3'"):
        quantize_linears(model, names=["0", "3"])
    assert type(model[0]) is nn.Linear  # nothing was replaced
    with pytest.raises(ValueError, match="names must be a list of names, got '0'"):
        quantize_linears(model, names="0")
    with pytest.raises(ValueError, match="model must have its linear layers within it, got one"):
        quantize_linears(layer_of())


def test_a_layer_in_two_places_becomes_one_in_both():
    shared = layer_of(40, 40)
    model = quantize_linears(nn.Sequential(shared, nn.GELU(), shared))
    assert type(model[0]) is Linear8 and model[0] is model[2]
    named = quantize_linears(nn.Sequential(shared, nn.GELU(), shared), names=["2"])
    assert named[0] is shared and type(named[2]) is Linear8


def test_a_layer_that_can_not_be_rounded_is_named_and_nothing_is_replaced():
    model = nn.Sequential(layer_of(8, 8), layer_of(8, 8).double())
    with pytest.raises(
        TypeError, match=r"model: layer '1': weight must be float32 or bfloat16 or float16, got float64"
    ):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear
    for dtype in (torch.float16, "int8"):
        with pytest.raises(TypeError, match=r"dtype must be torch\.int8 or torch\.float8_e4m3fn, got "):
            Linear8.from_linear(layer_of(), dtype)


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"codes": torch.zeros(8, 16)}, TypeError, "weight.codes must be int8 or float8_e4m3fn, got float32"),
        ({"scales": torch.ones(7)}, ValueError, r"weight.scales must be \[N=8\], got \[7\]"),
        ({"bias": torch.ones(9)}, ValueError, r"bias must be \[N=8\], got \[9\]"),
        ({"smooth": torch.ones(8)}, ValueError, r"smooth must be \[K=16\], got \[8\]"),
        ({"smooth": torch.zeros(16)}, ValueError, "smooth must hold finite numbers other than 0"),
        ({"smooth": torch.full((16,), torch.nan)}, ValueError, "smooth must hold finite numbers other than 0"),
        ({"smooth": torch.full((16,), 1e-40)}, ValueError, "whose inverses are finite as well"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, said):
    given = {"codes": torch.zeros(8, 16, dtype=torch.int8), "scales": torch.ones(8), "bias": None, "smooth": None}
    given |= change
    with pytest.raises(error, match=said):
        Linear8(Quantized(given["codes"], given["scales"]), bias=given["bias"], smooth=given["smooth"])


def test_a_weight_that_is_no_quantized_matrix_is_refused():
    for weight in (None, (torch.zeros(8, 16, dtype=torch.int8), torch.ones(8))):
        with pytest.raises(TypeError, match="weight must be a Quantized, got "):
            Linear8(weight)


def test_smoothing_is_refused_before_the_weight_is_touched():
    with pytest.raises(ValueError, match=r"smooth must be \[K=96\], got \[1\]"):
        Linear8.from_linear(layer_of(), smooth=torch.ones(1))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_norm_modulation_and_what_follows_go_with_a_layer(codes, per_tensor):
    layer, x = layer_of(24, 96), random(2, 6, 96, seed=9)
    scale, shift, weight = random(2, 96, seed=2), random(2, 96, seed=3), random(96, seed=4)
    gate, residual = random(2, 24, seed=5), random(2, 6, 24, seed=6)
    inputs = per_tensor_symmetric if per_tensor else per_token_symmetric
    made = Linear8.from_qconfig(layer, QConfig(Scheme(codes, inputs), Scheme(codes, per_channel_symmetric)))
    rows = made.quantize(x.view(12, 96), norm="rms", weight=weight, scale=scale, shift=shift, eps=1e-5)
    y = nn.functional.rms_norm(x, (96,), weight, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    assert (rows.codes.float() * rows.scales[:, None] - y.view(12, 96)).norm() < ERROR[codes] * y.norm()
    got = made(
        Quantized(rows.codes.view(2, 6, 96), rows.scales.view(2, 6)), activation="gelu", gate=gate, residual=residual
    )
    want = residual + gate[:, None] * nn.functional.gelu(layer(y))
    assert got.shape == (2, 6, 24) and (got - want).norm() < ERROR[codes] * want.norm()
    with pytest.raises(ValueError, match="dtype must be given for an input in 8 bits"):
        made(rows)
    with pytest.raises(ValueError, match="scale must have a number of rows that divides M=12, got 5"):
        made.quantize(x.view(12, 96), scale=random(5, 96))
