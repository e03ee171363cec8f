"""Quantized models on disk, and state dicts of another recipe."""

import json

import pytest
import torch
from torch import nn

from inferix_kernels import quantize
from inferix_kernels.quantize import Linear8, convert, layer, load, prepare, quantize_dynamic, recipe_of, save
from tests.quantize.models import assert_unchanged, layer_of, network, random, state_of

PER_TOKEN = quantize.get_dynamic_int8_per_token_act_per_channel_weight_qconfig()
FP8 = quantize.get_dynamic_fp8_per_token_act_per_channel_weight_qconfig()
STATIC = quantize.get_fp8_per_channel_weight_qconfig()
ONE_SCALE = quantize.get_default_dynamic_int8_qconfig()
CONFIGS = {"": PER_TOKEN, "blocks.0.attn": FP8, "blocks.1.ffn": STATIC, "blocks.1.attn": ONE_SCALE, "proj_out": None}


def quantized():
    model = prepare(network(), CONFIGS)
    model(random(9, 16))
    return convert(model)


def emptied(model):
    """Its parameters on the meta device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return model


@pytest.fixture
def path(tmp_path):
    save(quantized(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("of", [network, lambda: emptied(network()), quantized])
def test_a_model_is_loaded_without_being_quantized_again(path, of, monkeypatch):
    saved, x = quantized(), random(5, 16, seed=3)
    want, model = saved(x), of()

    def quantizes(x, *args, **kwargs):
        raise AssertionError("something was quantized")

    monkeypatch.setattr(layer, "quantize_rows", quantizes)
    monkeypatch.setattr(layer, "quantize_tensor", quantizes)
    assert load(model, path) is model
    monkeypatch.undo()
    assert recipe_of(model) == recipe_of(saved) and torch.equal(model(x), want)
    assert model.blocks[0].attn.to_q.shared is model.blocks[0].attn.to_v.shared is not None
    assert not any(x.is_meta for x in model.state_dict().values()) and not model.training


def test_smoothing_and_a_named_backend_come_along(tmp_path):
    smooth = random(96).abs() + 0.5
    model = nn.Sequential(Linear8.from_linear(layer_of(), smooth=smooth))
    save(model, tmp_path / "m")
    again = load(nn.Sequential(layer_of(seed=5)), tmp_path / "m", backend="torch")
    assert again[0].backend == "torch" and torch.equal(again[0].smoothing, model[0].smoothing)
    x = random(4, 96)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_model_keeps_its_own_dtypes_and_one_on_meta_takes_the_files(path):
    model = load(network().half(), path)
    assert model.proj_out.weight.dtype == torch.float16 and model.embedding.bias.dtype == torch.float16
    model = load(emptied(network().half()), path)
    assert model.proj_out.weight.dtype == torch.float32 and model.embedding.bias.dtype == torch.float32


def test_weights_in_one_memory_are_written_apart(tmp_path):
    model = nn.ModuleDict({"a": nn.Embedding(4, 8), "b": nn.Linear(8, 4, bias=False), "c": layer_of(8, 8)})
    model["b"].weight = model["a"].weight
    quantize_dynamic(model, {"c": PER_TOKEN})
    save(model, tmp_path / "m")
    other = nn.ModuleDict({"a": nn.Embedding(4, 8), "b": nn.Linear(8, 4, bias=False), "c": layer_of(8, 8)})
    load(other, tmp_path / "m")
    assert torch.equal(other["a"].weight, model["a"].weight) and torch.equal(other["b"].weight, model["a"].weight)


def test_a_layer_in_two_places_comes_back_as_one(tmp_path):
    def twice():
        model = nn.Sequential(layer_of(40, 40), nn.GELU())
        model.append(model[0])
        return model

    model, other, seen = quantize_dynamic(twice(), {"": PER_TOKEN}), twice(), []
    other[0].register_forward_hook(lambda *_: seen.append(1))
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    x = random(3, 40)
    assert other[0] is other[2] and recipe_of(other) == recipe_of(model) and torch.equal(other(x), model(x))
    assert seen == [1, 1]  # hooks go over to the new layer
    with pytest.raises(ValueError, match="model must have its linear layers within it, got one"):
        save(model[0], tmp_path / "one")


def test_the_file_is_what_the_documents_say(path):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        header, names = json.loads(file.metadata()["inferix_quantize"]), set(file.keys())
    assert header["version"] == 1
    assert header["layers"]["blocks.1.ffn.2"] == {
        "dtype": "float8_e4m3fn",
        "activation": "per_tensor_symmetric",
        "is_dynamic": False,
        "weight": "per_channel_symmetric",
    }
    parts = {name.rpartition(".")[2] for name in names if name.startswith("blocks.1.ffn.2")}
    assert parts == {"qweight", "weight_scale", "bias", "input_scale"} and "proj_out.weight" in names


def _narrow(model):
    model.blocks[0].ffn[0] = layer_of(63, 48)


def _renamed(model):
    model.blocks[0].attn.q = model.blocks[0].attn.to_q
    del model.blocks[0].attn.to_q


def _norm_for_layer(model):
    model.embedding = nn.LayerNorm(16)


def _biasless(model):
    model.embedding.bias = None


def _other_recipe(model):
    quantize_dynamic(model, {"blocks.0.attn.to_q": PER_TOKEN})


def _more_recipe(model):
    quantize_dynamic(model, {"proj_out": PER_TOKEN})


def _more(model):
    model.head = layer_of(3, 3)


def _less(model):
    model.proj_out.bias = None


def _wider(model):
    model.proj_out = layer_of(16, 49)


def _buffer(model):
    model.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)


OTHERS = {
    "a width": (_narrow, r"layer 'blocks.0.ffn.0' must be \[64, 48\], as in the file, got \[63, 48\]"),
    "a name": (_renamed, "got none called 'blocks.0.attn.to_q'"),
    "a kind": (_norm_for_layer, "layer 'embedding' must be an nn.Linear, got a LayerNorm"),
    "a bias": (_biasless, "layer 'embedding' must have a bias, as in the file"),
    "a recipe": (
        _other_recipe,
        r"layer 'blocks.0.attn.to_q' must have the file's recipe, QConfig\(float8.*got QConfig\(int8",
    ),
    "a layer of no recipe": (_more_recipe, "layer 'proj_out' is quantized, and is not in the recipe of"),
    "a layer more": (_more, "must have all of the model's tensors, got no head.weight"),
    "a tensor less": (_less, "must have the model's tensors alone, got proj_out.bias besides"),
    "another width": (_wider, r"proj_out.weight must be \[16, 48\], as in the file, got \[16, 49\]"),
    "a buffer of no file": (
        _buffer,
        "buffer table must have numbers, since no file has it, got one on the meta device",
    ),
}


@pytest.mark.parametrize("change, said", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_model_is_named_in_one_line_and_nothing_changes(path, change, said):
    model = network()
    change(model)
    state, types = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=said) as error:
        load(model, path)
    assert "\n" not in str(error.value)
    assert_unchanged(model, state, types)


def _rewrite(path, change):
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    header = json.loads(metadata["inferix_quantize"])
    change(tensors, header)
    safetensors.save_file(tensors, path, {"inferix_quantize": json.dumps(header)} if header else {})


DAMAGE = {
    "no recipe": (lambda t, h: h.clear(), "it has no recipe"),
    "a version": (lambda t, h: h.update(version=9), "its version is 9, this library reads 1"),
    "no layers": (lambda t, h: h.pop("layers"), "its recipe is damaged"),
    "a dtype": (lambda t, h: h["layers"]["embedding"].update(dtype="int3"), "its recipe is damaged"),
    "a scheme": (lambda t, h: h["layers"]["embedding"].update(weight="per_row"), "its recipe is damaged"),
    "another codes": (
        lambda t, h: h["layers"]["embedding"].update(dtype="float8_e4m3fn"), "'embedding' is QConfig.int8.* says"),
    "static": (
        lambda t, h: h["layers"]["embedding"].update(is_dynamic=False), "damaged: .*activation must be dynamic"),
    "no codes": (lambda t, h: t.pop("embedding.qweight"), "layer 'embedding' has no qweight"),
    "no scales": (lambda t, h: t.pop("embedding.weight_scale"), "layer 'embedding' has no weight_scale"),
    "short scales": (lambda t, h: t.update({"embedding.weight_scale": torch.ones(1, 7)}), "'embedding': weight.scales"),
    "float codes": (lambda t, h: t.update({"embedding.qweight": torch.ones(48, 16)}), "'embedding': weight.codes"),
    "a whole bias": (
        lambda t, h: t.update({"embedding.bias": torch.ones(48).int()}), "embedding.bias must be int32, as in the"),
    "codes of no recipe": (
        lambda t, h: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.float8_e4m3fn)}),
        "proj_out.weight must be float8_e4m3fn, as in the file, got float32"),
    "smoothing by groups": (
        lambda t, h: t.update({"embedding.smoothing": torch.ones(2, 16)}), r"must be \[1, 16\], got \[2, 16\]"),
    "smoothing of nothing": (
        lambda t, h: t.update({"embedding.smoothing": torch.ones(())}), r"smoothing must be \[1, 16\], got \[\]"),
    "whole smoothing": (
        lambda t, h: t.update({"embedding.smoothing": torch.ones(1, 16).int()}), "embedding.smoothing must be int32"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_line_and_nothing_changes(path, change, said):
    _rewrite(path, change)
    model = network()
    state, types = state_of(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=said) as error:
        load(model, path)
    assert "\n" not in str(error.value)
    assert_unchanged(model, state, types)


def test_a_recipe_without_an_end_is_damaged(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.ones(1)}, tmp_path / "m", {"inferix_quantize": "[" * 200_000})
    with pytest.raises(ValueError, match="its recipe is damaged: RecursionError"):
        load(network(), tmp_path / "m")


def test_a_path_that_is_no_such_file_is_one_line(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    for path in (tmp_path, tmp_path / "text", tmp_path / "absent"):
        with pytest.raises(ValueError, match="path must be a quantized model, got") as error:
            load(network(), path)
        assert "\n" not in str(error.value)


def test_what_has_no_numbers_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"embedding\.weight must have numbers to be saved"):
        save(emptied(network()), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "mine, theirs, said",
    [
        (PER_TOKEN, FP8, "0 is quantized to int8, and the state has codes of another recipe, float8_e4m3fn"),
        (PER_TOKEN, ONE_SCALE, r"0 is QConfig\(.*another recipe: weight_scale must be \[1, 40\], got \[1\]"),
        (PER_TOKEN, None, r"0 is quantized \(QConfig.*\), and the state has its weight in full precision"),
    ],
)
def test_a_state_dict_of_another_recipe_is_named_and_its_layer_not_loaded(mine, theirs, said):
    model, other = (nn.Sequential(layer_of(seed=seed)) for seed in (0, 5))
    quantize_dynamic(model, {"": mine})
    other = other if theirs is None else quantize_dynamic(other, {"": theirs})
    before = state_of(model)
    with pytest.raises(RuntimeError, match=said):
        model.load_state_dict(other.state_dict(), strict=False)
    for name, x in model.state_dict().items():
        assert torch.equal(x.view(torch.uint8), before[name].view(torch.uint8))


def test_a_smoothed_state_dict_needs_a_smoothed_layer():
    """Its codes are of other numbers."""
    model = nn.Sequential(Linear8.from_linear(layer_of()))
    smoothed = nn.Sequential(Linear8.from_linear(layer_of(), smooth=torch.full((96,), 2.0)))
    with pytest.raises(RuntimeError, match=r"0 is .*another recipe: smoothing must be None, got \[1, 96\]"):
        model.load_state_dict(smoothed.state_dict(), strict=False)


def test_a_static_state_dict_needs_a_static_layer():
    static = prepare(nn.Sequential(layer_of()), {"": STATIC})
    static(random(4, 96))
    model = quantize_dynamic(nn.Sequential(layer_of()), {"": STATIC})
    with pytest.raises(RuntimeError, match=r"another recipe: input_scale must be None, got \[1\]"):
        model.load_state_dict(convert(static).state_dict(), strict=False)


def test_a_state_dict_as_dax_writes_it_is_taken():
    """Its names and shapes; its bias is bfloat16 beside fp8 codes with a scale per token."""
    for config in (PER_TOKEN, FP8, ONE_SCALE):
        model = quantize_dynamic(nn.Sequential(layer_of()), {"": config})
        per_channel = config.weight.qscheme == "per_channel_symmetric"
        codes = random(40, 96, seed=4).mul(20).to(config.weight.dtype)
        scale = random(1, 40, seed=5).abs() if per_channel else random(1, seed=5).abs()
        bias = random(40, seed=6).bfloat16()
        model.load_state_dict({"0.qweight": codes, "0.weight_scale": scale, "0.bias": bias})
        assert torch.equal(model[0].weight, codes.float() * scale.view(-1, 1))
        assert torch.equal(model[0].bias, bias.float())
