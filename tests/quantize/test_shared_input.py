"""Layers that are given the same tensor quantize it once, and never take codes of what it was before."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

from inferix_kernels.quantize import (
    get_default_dynamic_int8_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    layer,
    quantize_dynamic,
)
from tests.quantize.models import Attention, layer_of, network, random

PER_TOKEN = get_dynamic_int8_per_token_act_per_channel_weight_qconfig()


@pytest.fixture
def counted(monkeypatch):
    """Inputs that were quantized, by their first number."""
    calls = []
    for name in ("quantize_rows", "quantize_tensor"):
        function = getattr(layer, name)
        monkeypatch.setattr(
            layer, name, lambda x, *args, f=function, **kw: calls.append(float(x.flatten()[0])) or f(x, *args, **kw)
        )
    return calls


def attention(config=PER_TOKEN):
    return quantize_dynamic(nn.ModuleList([Attention()]), {"": config})[0]


def unshared(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "shared"):
            module.shared = None
    return model


@pytest.mark.parametrize("config", [PER_TOKEN, get_default_dynamic_int8_qconfig()])
def test_q_k_and_v_quantize_their_input_once(counted, config):
    model, x = attention(config), random(2, 5, 48)
    want = unshared(model)(x)
    counted.clear()
    assert torch.equal(model(x), want)
    assert len(counted) == 2  # the input, and that of to_out
    model(x)
    assert len(counted) == 4  # each call anew


def test_in_a_network_each_input_is_quantized_once(counted):
    model, x = quantize_dynamic(network(), {"": PER_TOKEN}), random(7, 16)
    want = unshared(model)(x)
    counted.clear()
    assert torch.equal(model(x), want) and len(counted) == 2 + 2 * 4


def write(x):
    x.add_(1)


def write_to_its_base(x):
    x._base[0] = 3


def give_other_memory(x):
    x.data = x.data + 1


@pytest.mark.parametrize("change", [write, write_to_its_base, give_other_memory])
def test_a_write_between_the_calls_is_seen(counted, change):
    model, x = attention(), random(2, 5, 48).view(2, 5, 48)[:]
    want = unshared(model)(x.clone().view(2, 5, 48)[:], change)
    counted.clear()
    assert torch.equal(model(x, change), want)
    assert len(counted) == 3


def test_a_tensor_that_was_given_another_view_of_its_memory_is_another(counted):
    model, x = attention(), random(48, 48)
    model.to_q(x)
    x.data = x.data.T
    assert torch.equal(model.to_k(x), unshared(model).to_k(x))


def test_no_gradient_stops_at_codes_that_are_shared():
    model, x = attention(), random(5, 48).requires_grad_()
    with torch.no_grad():
        model.to_q(x)
    with pytest.raises(RuntimeError, match=r"^x requires a gradient, and there is no backward"):
        model.to_k(x)


def test_a_layer_that_is_called_again_looks_again(counted):
    """Memory may be written where torch does not count it: by a kernel, or from NumPy."""
    model, x = attention(), random(5, 48)
    before = model.to_q(x)
    counted.clear()
    x.numpy()[:] += 1
    assert not torch.equal(model.to_q(x), before) and len(counted) == 1
    assert torch.equal(model.to_k(x), unshared(model).to_k(x))


def test_another_tensor_of_the_same_numbers_is_another(counted):
    model, x = attention(), random(5, 48)
    counted.clear()
    model.to_q(x), model.to_k(x.clone()), model.to_v(x)
    assert len(counted) == 3


def test_codes_go_with_their_input():
    model, x = attention(), random(5, 48)
    model.to_q(x)
    shared = model.to_q.shared
    assert shared is model.to_k.shared and shared.entry is not None
    del x
    gc.collect()
    assert shared.entry is None


def test_layers_of_other_widths_or_configs_share_nothing():
    model = nn.ModuleDict({"a": layer_of(8, 16), "b": layer_of(8, 16), "c": layer_of(8, 24), "d": layer_of(8, 16)})
    quantize_dynamic(model, {"": PER_TOKEN, "d": get_default_dynamic_int8_qconfig()})
    assert model["a"].shared is model["b"].shared is not None
    assert model["c"].shared is model["d"].shared is None


def test_inference_tensors_are_quantized_each_time(counted):
    """torch does not count who writes to them."""
    model = attention()
    counted.clear()
    with torch.inference_mode():
        x = random(5, 48)
        assert torch.equal(model(x), unshared(model)(x))
    assert len(counted) == 4 + 4


def test_threads_take_only_their_own(counted):
    model, x = attention(), random(5, 48)
    model.to_q(x)
    counted.clear()
    thread = threading.Thread(target=lambda: model.to_k(x))
    thread.start()
    thread.join()
    assert len(counted) == 1


def test_threads_at_once_get_what_each_would_alone():
    model = attention()
    inputs = [random(2, 3 + i, 48, seed=i) for i in range(4)]
    wants, wrong = [unshared(model)(x) for x in inputs], []

    def run(x, want):
        wrong.extend(i for i in range(30) if not torch.equal(model(x), want))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, wants)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_among_its_own_layers(again):
    model, x = attention(), random(5, 48)
    model.to_q(x)
    other = again(model)
    assert other.to_q.shared is other.to_v.shared is not model.to_q.shared
    assert other.to_q.shared.entry is None
    assert torch.equal(other(x), model(x))
