"""linear_input, linear_output and Residual: one path for float layers and 8-bit ones, and what it is equal to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from inferix_kernels import Quantized, ops, quantize_rows
from inferix_kernels.quantize import Linear8, Residual, linear_input, linear_output

CODES = (torch.int8, torch.float8_e4m3fn)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(inputs=64, outputs=32, dtype=torch.float32):
    layer = nn.Linear(inputs, outputs)
    layer.weight.data, layer.bias.data = random(outputs, inputs, seed=1) / 8, random(outputs, seed=2)
    return layer.to(dtype)


BEFORE = {
    "as it is": {},
    "norm": {"norm": "layer", "eps": 1e-5},
    "affine norm": {"norm": "layer", "weight": random(64, seed=3), "bias": random(64, seed=4)},
    "adaLN": {"norm": "layer", "scale": random(2, 3, 1, 64, seed=5), "shift": random(2, 3, 1, 64, seed=6)},
    "rms": {"norm": "rms", "weight": random(64, seed=3)},
    "shift": {"shift": random(2, 3, 1, 64, seed=6)},
}
AFTER = {
    "as it is": {},
    "activation": {"activation": "gelu_tanh"},
    "gate": {"activation": "gelu", "gate": random(2, 3, 1, 32, seed=7)},
    "all": {"gate": random(2, 3, 1, 32, seed=7), "residual": random(2, 3, 5, 32, seed=8)},
}


def plain_input(x, norm=None, weight=None, bias=None, scale=None, shift=None, eps=1e-6):
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
    x = x if scale is None else x * (1 + scale)
    return x if shift is None else x + shift


def plain_output(y, activation=None, gate=None, residual=None):
    y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none") if activation else y
    y = y if gate is None else y * gate
    return y if residual is None else residual + y


def in_dtype(options, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_a_float_layer_is_what_torch_makes_of_it(before, after):
    """In float64 and with gradients torch makes it. In float32 the same steps are rounded elsewhere: to a few units in
    the last place of numbers of size 1 before a layer of 64 terms. bfloat16 is rounded once in place of three times."""
    for dtype, grad in ((torch.float64, False), (torch.float32, True), (torch.float32, False), (torch.bfloat16, False)):
        layer, x = layer_of(dtype=dtype), random(2, 3, 5, 64, dtype=dtype).requires_grad_(grad)
        first, then = in_dtype(before, dtype), in_dtype(after, dtype)
        with torch.set_grad_enabled(grad):
            made = linear_output(layer, linear_input(layer, x, **first), **then)
            want = plain_output(layer(plain_input(x, **first)), **then)
        assert made.dtype == want.dtype == dtype
        if grad or dtype == torch.float64:
            assert torch.equal(made, want)
        elif dtype == torch.float32:
            torch.testing.assert_close(made, want, rtol=0, atol=1e-5)
        else:
            exact = plain_output(layer.double()(plain_input(x.double(), **in_dtype(first, torch.float64))),
                                 **in_dtype(then, torch.float64))  # fmt: skip
            # Where both round as often, as a product and what follows it, which is nearer is chance.
            assert (made - exact).norm() <= 1.02 * (want - exact).norm()


@pytest.mark.parametrize("codes", CODES, ids=["int8", "fp8"])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_the_input_of_an_8_bit_layer_is_the_formula_quantized(before, codes):
    layer, x = Linear8.from_linear(layer_of(), codes), random(2, 3, 5, 64)
    made = linear_input(layer, x, **before)
    assert made.codes.shape == (2, 3, 5, 64) and made.scales.shape == (2, 3, 5)
    assert_quantized(made, plain_input(x, **before))


def assert_quantized(made, y):
    """Where float32 rounding puts a number on the other side of a middle between two codes, it is one code off."""
    codes = made.codes.dtype
    wanted = quantize_rows(y.reshape(-1, 64), codes)
    torch.testing.assert_close(made.scales.flatten(), wanted.scales, rtol=1e-5, atol=0)
    off = (made.codes.view(-1, 64).float() - wanted.codes.float()).abs()
    assert off.max() <= (1 if codes is torch.int8 else 32)  # between the largest codes
    assert (off > 0).float().mean() < 0.002


@pytest.mark.parametrize("codes", CODES, ids=["int8", "fp8"])
@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_the_output_of_an_8_bit_layer_is_the_formula(after, codes):
    """Of the same product: what comes after it is float32 arithmetic of numbers of size 1."""
    layer = Linear8.from_linear(layer_of(), codes)
    rows = linear_input(layer, random(2, 3, 5, 64))
    product = linear_output(layer, rows, dtype=torch.float32)
    made = linear_output(layer, rows, dtype=torch.float32, **after)
    torch.testing.assert_close(made, plain_output(product, **after), rtol=1e-5, atol=1e-5)
    assert torch.equal(product, layer(random(2, 3, 5, 64)))  # quantized on the way in


def test_layers_share_an_input():
    layers, x = [Linear8.from_linear(layer_of(64, n)) for n in (32, 48)], random(7, 64)
    rows = linear_input(layers[0], x)
    for layer in layers:
        assert torch.equal(linear_output(layer, rows, dtype=x.dtype), layer(x))


def test_smoothing_is_a_part_of_the_modulation():
    """Codes are of y / smooth, whatever was before."""
    layer, x, smooth = layer_of(), random(2, 3, 5, 64), random(64, seed=9).abs() + 0.5
    smoothed = Linear8.from_linear(layer, smooth=smooth)
    for before in BEFORE.values():
        rows = linear_input(smoothed, x, **before)
        assert_quantized(rows, plain_input(x, **before) / smooth)
        y, exact = linear_output(smoothed, rows, dtype=x.dtype), layer(plain_input(x, **before))
        assert (y - exact).norm() < 0.02 * exact.norm()


def test_the_result_has_the_dtype_that_is_meant():
    layer, x = Linear8.from_linear(layer_of()), random(3, 64, dtype=torch.bfloat16)
    rows, residual = linear_input(layer, x), random(3, 32, dtype=torch.float16)
    assert linear_output(layer, x).dtype == torch.bfloat16
    assert linear_output(layer, rows, residual=residual).dtype == torch.float16
    assert linear_output(layer, rows, residual=residual, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be given for an input in 8 bits, where there is no residual"):
        linear_output(layer, rows)


class Adapted(nn.Module):
    """A layer as low-rank adapters wrap it."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.a, self.b = layer, nn.Linear(64, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_wrapped_layer_is_called_as_a_module(eight_bit):
    base = Linear8.from_linear(layer_of()) if eight_bit else layer_of()
    layer, x = Adapted(base), random(2, 3, 5, 64)
    made = linear_output(layer, linear_input(layer, x, **BEFORE["adaLN"]), **AFTER["all"])
    want = plain_output(layer(plain_input(x, **BEFORE["adaLN"])), **AFTER["all"])
    if eight_bit:  # a number on the other side of a middle is a code off
        assert (made - want).norm() < 1e-3 * want.norm()
    else:
        torch.testing.assert_close(made, want, rtol=0, atol=1e-5)


def test_gradients_go_through_float_layers():
    layer, x = layer_of(), random(2, 3, 5, 64).requires_grad_()
    linear_output(layer, linear_input(layer, x, **BEFORE["adaLN"]), **AFTER["all"]).sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0


def test_hooks_see_an_8_bit_layer():
    """By which a number that is not finite is traced to its layer."""
    layer, seen = Linear8.from_linear(layer_of()), []
    layer.register_forward_hook(lambda *_: seen.append("called"))
    linear_output(layer, linear_input(layer, random(3, 64)), dtype=torch.float32)
    assert seen == ["called"]


KINDS = {"float": lambda layer: layer, "8 bits": Linear8.from_linear, "wrapped": nn.Sequential}
STREAM = {"norm": "layer", "scale": random(2, 3, 1, 64, seed=5), "shift": random(2, 3, 1, 64, seed=6)}


@pytest.mark.parametrize("next_one", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_stream_is_its_layers_one_by_one(first, next_one):
    """Bit for bit: whether the sum is made on the way into the next layer or before."""
    down, up = KINDS[first](layer_of(48, 64)), KINDS[next_one](layer_of(64, 48))
    x, y, gate = random(2, 3, 5, 64), random(2, 3, 5, 48, seed=1), random(2, 3, 1, 64, seed=7)
    with torch.no_grad():
        stream, made = Residual(x).plus(down, y, gate=gate).before(up, **STREAM)
        want = linear_output(down, y, gate=gate, residual=x)
        assert stream.added is None and torch.equal(stream.sum(), want)
        made, want = ([x] if isinstance(x, torch.Tensor) else [*x] for x in (made, linear_input(up, want, **STREAM)))
        assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


def test_what_is_between_two_float_layers_is_one_call(monkeypatch):
    calls, call = [], ops.call
    monkeypatch.setattr(ops, "call", lambda op, *args, **kwargs: calls.append(op) or call(op, *args, **kwargs))
    x, layer = Residual(random(2, 3, 5, 64)), layer_of(64, 64)
    with torch.no_grad():
        for number in range(1, 4):
            x, y = x.before(layer, **STREAM)
            assert len(calls) == number
            x = x.plus(layer, y, gate=random(2, 3, 1, 64))
        x.sum()
    assert calls == 4 * ["add_norm"]


def test_a_stream_that_is_added_to_twice_has_both():
    x, layer = Residual(random(5, 64)), nn.Identity()
    assert torch.equal(x.plus(layer, random(5, 64, seed=1)).plus(layer, random(5, 64, seed=2)).sum(),
                       random(5, 64) + random(5, 64, seed=1) + random(5, 64, seed=2))  # fmt: skip


def test_a_stream_may_be_more_precise_than_what_is_added():
    x, layer = Residual(random(5, 64)), layer_of(64, 64, torch.bfloat16)
    stream, y = x.plus(layer, random(5, 64, dtype=torch.bfloat16)).before(None, norm="layer")
    assert stream.dtype == y.dtype == torch.float32 and stream.shape == y.shape == (5, 64)


def test_tangents_and_transforms_go_through_a_stream():
    """What has no gradient to ask for: forward-mode ones, without and with torch.func, and vmap."""
    x, tangent, layer = random(2, 5, 64), random(2, 5, 64, seed=1), layer_of(64, 64)
    gate = random(2, 1, 64, seed=2)

    def stream(x):
        made, y = Residual(x).before(layer, norm="rms", scale=gate)
        return made.plus(layer, y, gate=gate).sum()

    with torch.no_grad():
        step = 1e-2
        want = (stream(x + step * tangent) - stream(x - step * tangent)) / (2 * step)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(stream(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(torch.func.jvp(stream, (x,), (tangent,))[1], found)
        torch.testing.assert_close(torch.func.vmap(stream)(x[None])[0], stream(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row_is_a_stream_too(dtype):
    x, added, (gate, scale, shift) = random(64).to(dtype), random(64, seed=1).to(dtype), random(3, 1, 64).to(dtype)
    stream, y = Residual(x, added, gate).before(None, norm="rms", scale=scale, shift=shift)
    h = x + added * gate[0]
    torch.testing.assert_close(stream.x, h)
    torch.testing.assert_close(y, F.rms_norm(h, (64,), eps=1e-6) * (1 + scale[0]) + shift[0])


def test_gradients_go_through_a_stream():
    layer, x = layer_of(64, 64), random(2, 3, 5, 64).requires_grad_()
    stream, y = Residual(x).plus(layer, x, gate=random(2, 3, 1, 64)).before(layer, **STREAM)
    stream.plus(layer, y).sum().sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0


WRONG = {
    "norm must be 'layer', 'rms' or None, got 'batch'": {"norm": "batch"},
    "weight and bias must be those of a norm, and bias that of a layer norm, got norm=None": {"weight": random(64)},
    "weight and bias must be those of a norm, and bias that of a layer norm, got norm='rms'": {
        "norm": "rms",
        "bias": random(64),
    },
    r"scale must be \[2, 3, 1, 64\], got \[3, 1, 64\]": {"scale": random(3, 1, 64)},
    r"shift must be \[2, 3, 1, 64\], got \[2, 3, 64\]": {"shift": random(2, 3, 64)},
}


@pytest.mark.parametrize("layer", [layer_of(), Linear8.from_linear(layer_of())], ids=["float", "8 bits"])
def test_what_is_wrong_is_named(layer):
    x = random(2, 3, 5, 64)
    for said, given in WRONG.items():
        with pytest.raises(ValueError, match=f"^{said}$"):
            linear_input(layer, x, **given)
    for said, given in {
        "activation must be 'gelu', 'gelu_tanh' or None, got 'relu'": {"activation": "relu"},
        r"gate must be \[2, 3, 1, N\], got \[32\]": {"gate": random(32)},
        # An 8-bit layer would take these rows for others than torch does.
        r"gate must be \[2, 3, 1, N\], got \[1, 3, 1, 32\]": {"gate": random(1, 3, 1, 32)},
        r"residual must be \[2, 3, 5, N\], got \[3, 2, 5, 32\]": {"residual": random(3, 2, 5, 32)},
        r"residual must be \[2, 3, 5, N\], got \[5, 32\]": {"residual": random(5, 32)},
    }.items():
        with pytest.raises(ValueError, match=f"^{said}$"):
            linear_output(layer, x, **given)


@pytest.mark.parametrize("layer", [layer_of(64, 64), Linear8.from_linear(layer_of(64, 64))], ids=["float", "8 bits"])
def test_what_is_wrong_with_a_stream_is_named(layer):
    x = Residual(random(2, 3, 5, 64))
    with pytest.raises(ValueError, match=r"^gate must be \[2, 3, 1, 64\], got \[3, 1, 64\]$"):
        x.plus(layer, random(2, 3, 5, 64), gate=random(3, 1, 64))
    for said, given in WRONG.items():
        with pytest.raises(ValueError, match=f"^{said}$"):
            x.plus(layer, random(2, 3, 5, 64)).before(layer, **given)


def test_codes_are_for_8_bit_layers_alone():
    rows = linear_input(Linear8.from_linear(layer_of()), random(5, 64))
    with pytest.raises(TypeError, match=r"^x must be a tensor for a Linear, got codes, which only a Linear8 takes$"):
        linear_output(layer_of(), rows)


def test_an_8_bit_layer_refuses_what_does_not_fit():
    layer = Linear8.from_linear(layer_of())
    rows = linear_input(layer, random(5, 64))
    with pytest.raises(ValueError, match=r"^residual must be \[M=5, N=32\]"):
        linear_output(layer, rows, residual=random(5, 31))
    with pytest.raises(ValueError, match=r"^x must be \[\.\.\., 64\], got \[5, 32\]$"):
        linear_output(layer, Quantized(rows.codes[:, :32].contiguous(), rows.scales), dtype=torch.float32)
