"""quantize_dynamic: the names and the qconfig_dict of DAX, what each config means, and what can not be quantized."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from inferix_kernels import quantize
from inferix_kernels._check import CODES
from inferix_kernels.quantize import (
    Linear8,
    QConfig,
    Scheme,
    per_channel_symmetric,
    per_tensor_symmetric,
    per_token_symmetric,
    quantize_dynamic,
    recipe_of,
)
from tests.quantize.models import Attention, assert_unchanged, cosine, layer_of, network, random, rounded, state_of

E4M3 = torch.float8_e4m3fn
PER_TOKEN = quantize.get_dynamic_int8_per_token_act_per_channel_weight_qconfig()
FP8 = quantize.get_dynamic_fp8_per_token_act_per_channel_weight_qconfig()
TENSOR, TOKEN, CHANNEL = per_tensor_symmetric, per_token_symmetric, per_channel_symmetric
# name -> (inputs, dynamic?, weight, codes by default)
QCONFIGS = {
    "get_default_fp8_qconfig": (TENSOR, False, TENSOR, E4M3),
    "get_fp8_per_channel_weight_qconfig": (TENSOR, False, CHANNEL, E4M3),
    "get_default_dynamic_fp8_qconfig": (TENSOR, True, TENSOR, E4M3),
    "get_dynamic_fp8_per_token_act_per_channel_weight_qconfig": (TOKEN, True, CHANNEL, E4M3),
    "get_default_dynamic_int8_qconfig": (TENSOR, True, TENSOR, torch.int8),
    "get_dynamic_int8_per_channel_weight_qconfig": (TENSOR, True, CHANNEL, torch.int8),
    "get_dynamic_int8_per_token_act_per_channel_weight_qconfig": (TOKEN, True, CHANNEL, torch.int8),
    "get_default_dist_profile_qconfig": (TENSOR, False, TENSOR, E4M3),
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", QCONFIGS)
def test_a_qconfig_is_what_its_name_says(name):
    make, (inputs, dynamic, weight, default) = getattr(quantize, name), QCONFIGS[name]
    assert getattr(quantize.qconfig, name) is make and name in quantize.__all__
    for given, dtype in (({}, default), ({"activation_dtype": torch.int8, "weight_dtype": torch.int8}, torch.int8)):
        config = make(**given)
        assert config.activation == Scheme(dtype, inputs, dynamic)
        assert (config.weight.dtype, config.weight.qscheme) == (dtype, weight)
    if name != "get_default_dist_profile_qconfig":  # the dtypes are its last two parameters
        assert make(E4M3, E4M3).weight.dtype == E4M3
    want = r"must be torch\.int8 or torch\.float8_e4m3fn, got "
    with pytest.raises(ValueError, match=rf"^activation_dtype {want}torch\.float8_e5m2: it has two bits"):
        make(activation_dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match=rf"^weight_dtype {want}'int8'$"):
        make(weight_dtype="int8")
    with pytest.raises(ValueError, match="weight_dtype must be the activations', int8, got float8_e4m3fn"):
        make(activation_dtype=torch.int8, weight_dtype=E4M3)


@pytest.mark.parametrize(
    "inputs, weight, said",
    [
        (Scheme(torch.int8, CHANNEL), Scheme(torch.int8, CHANNEL), "activation must be per_tensor_symmetric or per_to"),
        (Scheme(torch.int8, TOKEN), Scheme(torch.int8, TOKEN), "weight must be per_tensor_symmetric or per_channel_s"),
        (Scheme(torch.int8, TOKEN, False), Scheme(torch.int8, CHANNEL), "activation must be dynamic where it is per_t"),
    ],
)
def test_schemes_that_do_not_go_together_are_refused(inputs, weight, said):
    with pytest.raises(ValueError, match=said):
        QConfig(inputs, weight)
    with pytest.raises(ValueError, match=r"qscheme must be per_tensor_symmetric or .*, got 'per_row'"):
        Scheme(torch.int8, "per_row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("weight", [TENSOR, CHANNEL])
@pytest.mark.parametrize("inputs", [TENSOR, TOKEN])
def test_a_layer_multiplies_what_its_codes_stand_for(inputs, weight, codes, rows, dtype):
    layer, x = layer_of(dtype=dtype), random(rows, 96, seed=9).to(dtype)
    config = QConfig(Scheme(codes, inputs), Scheme(codes, weight))
    made = quantize_dynamic(nn.Sequential(layer), {"": config})[0]
    assert made.config == config and made.bias.dtype == dtype
    assert made.weight_scale.shape == ((1, 40) if weight == CHANNEL else (1,)) and made.qweight.dtype == codes
    w = rounded(layer.weight, codes, 1 if weight == CHANNEL else None)
    want = rounded(x, codes, -1 if inputs == TOKEN else None) @ w.T + layer.bias.double()
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(made(x).double(), want, rtol=eps, atol=eps * float(want.abs().max()))
    torch.testing.assert_close(made.weight.double(), w, rtol=1e-6, atol=1e-7)


def test_a_module_has_the_config_of_its_name_else_of_its_type_else_of_its_parent():
    model = network()
    quantize_dynamic(
        model,
        {"": PER_TOKEN, Attention: FP8, "blocks.1": None, "blocks.1.attn.to_q": PER_TOKEN, "blocks.0.attn.to_k": None,
         "proj_out": None, nn.GELU: None},
    )  # fmt: skip
    assert recipe_of(model) == {
        "embedding": PER_TOKEN,
        "blocks.0.attn.to_q": FP8,
        "blocks.0.attn.to_v": FP8,
        "blocks.0.attn.to_out.0": FP8,
        "blocks.0.ffn.0": PER_TOKEN,
        "blocks.0.ffn.2": PER_TOKEN,
        "blocks.1.attn.to_q": PER_TOKEN,
        # by its type, though its parent is None: a type goes before what is inherited
        "blocks.1.attn.to_k": FP8,
        "blocks.1.attn.to_v": FP8,
        "blocks.1.attn.to_out.0": FP8,
    }


def test_a_qconfig_that_a_module_has_goes_before_the_dict():
    model = network()
    model.blocks[0].qconfig = None
    model.proj_out.qconfig = FP8
    quantize_dynamic(model, {"": PER_TOKEN, "blocks.1": None})
    assert recipe_of(model) == {"embedding": PER_TOKEN, "proj_out": FP8}
    assert not any("qconfig" in vars(module) for module in model.modules())


def test_keys_that_match_nothing_are_warned_of_in_one_line():
    with pytest.warns(UserWarning) as seen:
        quantize_dynamic(network(), {"": PER_TOKEN, "head": None, "proj_out": None, nn.Conv3d: None, "block.0": None})
    (warning,) = seen
    assert str(warning.message) == "qconfig_dict: no module of the model is 'head', Conv3d, 'block.0'"
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="^qconfig_dict: no layer of the model is quantized by it$"):
        quantize_dynamic(network(), {})


def test_a_static_config_is_taken_as_dynamic():
    model = quantize_dynamic(network(), {"": quantize.get_fp8_per_channel_weight_qconfig()})
    assert set(recipe_of(model).values()) == {QConfig(Scheme(E4M3, TENSOR), Scheme(E4M3, CHANNEL))}


def test_a_copy_is_quantized_and_qconfigs_stay_where_they_are_wanted():
    model = network()
    state, types, x = state_of(model), [type(module) for module in model.modules()], random(5, 16)
    made = quantize_dynamic(model, {"": PER_TOKEN, "proj_out": None}, inplace=False, remove_qconfig=False)
    assert made is not model and len(recipe_of(made)) == 13
    assert_unchanged(model, state, types)
    assert made.blocks[1].norm.qconfig == PER_TOKEN and made.proj_out.qconfig is None
    assert not any("qconfig" in vars(module) for module in model.modules())
    assert cosine(made(x), model(x)) > 0.999
    assert quantize_dynamic(model, {"": PER_TOKEN, "proj_out": None}) is model
    assert torch.equal(made(x), model(x))


def test_a_mapping_says_what_becomes_of_which_type():
    class Doubled(nn.Module):
        @classmethod
        def from_float(cls, layer):
            made = cls()
            made.config, made.n = layer.qconfig, 2 * layer.out_features
            return made

    model = nn.Sequential(layer_of(), nn.LayerNorm(40))
    quantize_dynamic(model, {"": FP8}, mapping={nn.Linear: Doubled})
    assert (type(model[0]), model[0].n, model[0].config) == (Doubled, 80, FP8)
    assert type(Linear8.from_float(_with(layer_of(), PER_TOKEN))) is Linear8


def _with(layer, config):
    layer.qconfig = config
    return layer


def test_a_derived_class_is_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), layer_of(8, 8), nn.MultiheadAttention(8, 2))
    quantize_dynamic(model, {"": PER_TOKEN})
    assert [type(model[i]) for i in range(2)] == [Own, Linear8] and list(recipe_of(model)) == ["1"]


def test_hooks_and_the_mode_go_over_to_the_new_layer():
    model, seen = nn.Sequential(layer_of().train(), layer_of(8, 40).eval()), []
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_pre_hook(lambda layer, args, kwargs: seen.append(kwargs), with_kwargs=True)
    quantize_dynamic(model, {"": PER_TOKEN})
    model[0](random(2, 96))
    assert seen == [{}, "after"] and model[0].training and not model[1].training


def test_a_parametrized_layer_is_quantized_as_it_stands():
    model = nn.Sequential(weight_norm(layer_of()))
    want = model[0].weight.detach().clone()
    quantize_dynamic(model, {"": PER_TOKEN})
    torch.testing.assert_close(model[0].weight, rounded(want, torch.int8, 1).float(), rtol=1e-6, atol=1e-7)


def _set(path, value):
    def change(model):
        with torch.no_grad():
            model.get_parameter(path).view(-1)[3] = value

    return change


def _tie(model):
    model.blocks[1].ffn[0].weight = model.blocks[0].ffn[0].weight


def _tie_to_an_embedding(model):
    model.words = nn.Embedding(16, 48)
    model.proj_out.weight = model.words.weight


def _meta(model):
    model.proj_out.to("meta")


def _hooked(model):
    model.proj_out.forward = lambda x: x


def _normed(model):
    model.proj_out.register_parameter("weight_g", nn.Parameter(torch.ones(1)))


def _wide(model):
    model.proj_out = nn.Linear(131072, 1)


def _placed_twice(model):
    model.last = model.proj_out


BAD = {
    "NaN": (_set("blocks.0.attn.to_v.weight", torch.nan), {}, r"layer 'blocks.0.attn.to_v' must have finite numbers"),
    "infinity": (_set("proj_out.bias", -torch.inf), {}, "layer 'proj_out' must have finite numbers, got NaN or inf"),
    "another's weight": (_tie, {}, "layer 'blocks.0.ffn.0' must have a weight of its own, got one that is also 'blo"),
    "an embedding's": (_tie_to_an_embedding, {}, "layer 'proj_out' must have a weight of .* also 'words.weight'"),
    "the meta device": (_meta, {}, "layer 'proj_out' must have its weight, got one on the meta device: load it first"),
    "float64": (
        lambda model: model.proj_out.double(),
        {},
        "layer 'proj_out': weight must be float32 or .*, got float64",
    ),
    "a forward of its own": (_hooked, {}, "layer 'proj_out' must have nn.Linear's forward, got one that was put in"),
    "a parameter more": (_normed, {}, "layer 'proj_out' must have a weight and a bias, got weight_g besides"),
    "too many terms": (_wide, {}, "layer 'proj_out' must have at most 131071 inputs for int8, got 131072"),
    "no inputs": (
        lambda m: setattr(m, "proj_out", nn.Linear(0, 1)),
        {},
        r"layer 'proj_out' must have numbers in its w",
    ),
    "two configs": (_placed_twice, {"last": None}, "layer 'proj_out' is also 'last', and their qconfigs differ"),
    "not a Linear": (
        lambda m: None,
        {"blocks.0.norm": PER_TOKEN},
        "layer 'blocks.0.norm' must be, or have within it, an",
    ),
    "no QConfig": (lambda m: None, {"blocks": "int8"}, r"qconfig_dict\['blocks'\] must be a QConfig or None, got str"),
    "a dict of dicts": (lambda m: None, {"blocks": {"": None}}, r"qconfig_dict\['blocks'\] must be .*, got dict"),
    "a key of no kind": (lambda m: None, {3: None}, "qconfig_dict must have names and types of modules as keys, got 3"),
    "its own": (lambda m: setattr(m.blocks, "qconfig", 7), {}, "blocks.qconfig must be a QConfig or None, got int"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("change, more, said", BAD.values(), ids=BAD)
@pytest.mark.parametrize("call", [quantize_dynamic, quantize.prepare])
def test_what_can_not_be_quantized_is_named_in_one_line_and_nothing_changes(call, change, more, said):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    state, types = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises((ValueError, TypeError), match=said) as error:
        call(model, {"": PER_TOKEN} | more)
    assert "\n" not in str(error.value)
    assert_unchanged(model, state, types)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("call", [quantize_dynamic, quantize.prepare])
def test_a_model_and_a_dict_are_asked_for(call):
    with pytest.raises(TypeError, match=r"^qconfig_dict must be a Mapping, got QConfig$"):
        call(network(), PER_TOKEN)
    with pytest.raises(TypeError, match=r"^model must be a Module, got str$"):
        call("model", {"": PER_TOKEN})


def test_a_model_that_is_itself_a_layer_has_no_place_for_another():
    with pytest.raises(ValueError, match=r"model must have its linear layers within it, got one: use Linear8\.from_"):
        quantize_dynamic(layer_of(), {"": PER_TOKEN})


def test_a_layer_in_two_places_becomes_one_in_both():
    model = network()
    _placed_twice(model)
    quantize_dynamic(model, {"": PER_TOKEN})
    assert type(model.last) is Linear8 and model.last is model.proj_out


@pytest.mark.parametrize("terms", [96, 1536, 8960])
def test_int8_with_a_scale_per_token_keeps_a_layers_direction(terms):
    layer, x = layer_of(64, terms, bias=False), random(48, terms, seed=9)
    made = quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {"": PER_TOKEN})[0]
    assert cosine(made(x), layer(x)) > 0.9999
    x *= torch.logspace(-9, 20, 48)[:, None]  # tokens of any size: each has a scale of its own
    assert min(cosine(a, b) for a, b in zip(made(x), layer(x))) > 0.9998
    x = random(48, terms, seed=9)
    x[:, 7] *= 100  # a channel takes the others' steps: smoothing by its root leaves half of it to the weight
    smooth = torch.ones(terms)
    smooth[7] = 10
    if terms < 8960:  # where this one channel is most of what is summed
        assert cosine(Linear8.from_linear(layer, smooth=smooth)(x), layer(x)) > 0.9999


EXTREMES = {
    torch.float32: [1e-45, 1e-38, 1e-12, 1.0, 3e38],
    torch.bfloat16: [1e-38, 1e-12, 1.0, 3.3e38],
    torch.float16: [6e-8, 6e-5, 1.0, 65504.0],
}


@pytest.mark.parametrize("name", QCONFIGS)
@pytest.mark.parametrize("dtype", EXTREMES)
def test_no_weight_makes_a_nan(dtype, name):
    """Rows of every size that a checkpoint holds, of zeros and of denormals, and inputs likewise."""
    config = getattr(quantize, name)()
    for size in EXTREMES[dtype]:
        layer = layer_of(6, 32, bias=False)
        weight = layer.weight.div(layer.weight.abs().max()).double().mul(size).to(dtype)
        weight[2] = 0
        assert weight.isfinite().all() and weight.any()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made = quantize_dynamic(nn.Sequential(layer), {"": config})[0]
        for scale in (0.0, 1e-45, 1e-6, 1.0, 1e3):
            y = made((random(4, 32) * scale).to(dtype))
            assert not y.isnan().any() and not y[:, 2].any()


@pytest.mark.parametrize("inputs", [TENSOR, TOKEN])
@pytest.mark.parametrize("codes", CODES)
def test_a_nan_or_an_infinity_of_the_input_is_not_hidden(codes, inputs):
    made = quantize_dynamic(nn.Sequential(layer_of()), {"": QConfig(Scheme(codes, inputs), Scheme(codes, CHANNEL))})[0]
    for bad in (torch.nan, torch.inf):
        x = random(3, 96)
        x[1, 5] = bad
        y = made(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isnan().all() if inputs == TENSOR else y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("inputs", [TENSOR, TOKEN])
def test_inputs_and_weights_may_lie_in_any_order(inputs):
    layer, config = layer_of(40, 96), QConfig(Scheme(torch.int8, inputs), Scheme(torch.int8, TENSOR))
    want = quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {"": config})
    layer.weight = nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)
    made, x = quantize_dynamic(nn.Sequential(layer), {"": config}), random(96, 5)
    assert torch.equal(made(x.T), want(x.T.contiguous()))


@pytest.mark.parametrize("inputs", [TENSOR, TOKEN])
def test_no_rows_are_no_error(inputs):
    config = QConfig(Scheme(torch.int8, inputs), Scheme(torch.int8, TENSOR))
    assert quantize_dynamic(nn.Sequential(layer_of()), {"": config})(random(0, 96)).shape == (0, 40)


def test_a_quantized_model_is_one_graph():
    torch._dynamo.reset()
    model = nn.Sequential(layer_of(), nn.GELU(), Attention(40), layer_of(8, 40))
    per_tensor = QConfig(Scheme(torch.int8, TENSOR), Scheme(torch.int8, TENSOR))
    quantize_dynamic(model, {"": PER_TOKEN, "3": per_tensor})
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = random(rows, 96, seed=rows)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_layers_run_on_the_backend_that_they_are_given(backend):
    model, x = network(), random(5, 16)
    want = quantize_dynamic(model, {"": FP8}, inplace=False)(x)
    got = quantize_dynamic(model, {"": FP8}, backend=backend)
    assert {layer.backend for layer in got.modules() if isinstance(layer, Linear8)} == {backend}
    assert cosine(got(x), want) > 0.999
