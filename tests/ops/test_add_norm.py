"""add_norm: the reference against the formulas, every backend against the reference."""

import pytest
import torch
import torch.nn.functional as F

from inferix_kernels import add_norm, quantize_rows
from inferix_kernels.testing import assert_close

# M, K: one number, odd sizes, a row that fills no register; the tiny world's block; wider than what is held at once.
SHAPES = [(1, 1), (6, 33), (192, 128), (5, 4100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {
    "nothing": {},
    "a gate": {"gate": 3},
    "a gated residual": {"gate": 1, "residual": True},
    "a residual and an affine layer norm": {"residual": True, "norm": "layer", "weight": True, "bias": True},
    "an RMS norm": {"norm": "rms", "weight": True},
    "a layer norm, modulated": {"norm": "layer", "scale": 3, "shift": 3},
    "GELU": {"activation": "gelu_tanh"},
    "all": {"gate": 3, "residual": True, "norm": "layer", "weight": True, "bias": True, "scale": 1, "shift": 2,
            "activation": "gelu"},
}  # fmt: skip
ROWS = ("residual",)


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def steps_for(options, rows, columns, dtype=torch.float32, device="cpu"):
    """True is a vector, or rows; a number so many groups, if they divide the rows."""
    made = {}
    for seed, (name, value) in enumerate(options.items(), 1):
        if isinstance(value, str):
            made[name] = value
            continue
        groups = value if rows % value == 0 else 1
        shape = (rows, columns) if name in ROWS else (columns,) if value is True else (groups, columns)
        made[name] = random(*shape, seed=seed, dtype=dtype, device=device)
    return made


def formula(x, gate=None, residual=None, norm=None, weight=None, bias=None, scale=None, shift=None, eps=1e-6,
            activation=None):  # fmt: skip
    """In float64, by torch's functions: the sum, and what follows it."""
    each = [None if t is None else t.double() for t in (x, gate, residual, weight, bias, scale, shift)]
    h, gate, residual, weight, bias, scale, shift = each
    rows = lambda groups: groups.repeat_interleave(len(x) // len(groups), 0)  # noqa: E731
    h = h if gate is None else h * rows(gate)
    h = h if residual is None else residual + h
    y = h
    if norm == "layer":
        y = F.layer_norm(h, h.shape[1:], weight, bias, eps)
    if norm == "rms":
        y = F.rms_norm(h, h.shape[1:], weight, eps)
    y = y if scale is None else y * (1 + rows(scale))
    y = y if shift is None else y + rows(shift)
    return h, F.gelu(y, approximate={"gelu": "none"}.get(activation, "tanh")) if activation else y


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape, steps):
    x, options = random(*shape), steps_for(STEPS[steps], *shape)
    h, y = formula(x, **options)
    summed = torch.empty_like(x)
    got = add_norm(x, **options, summed=summed, backend="reference")
    assert_close("summed", summed, h.float(), 2)
    assert_close("y", got, y.float(), shape[1])


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_matches_the_reference(shape, steps, dtype, keep, backend, device):
    x, options = random(*shape, dtype=dtype, device=device), steps_for(STEPS[steps], *shape, device=device)
    if "residual" in options:
        options["residual"] = options["residual"].to(dtype)
    sums = [torch.full_like(x, torch.nan) if keep else None for _ in range(2)]
    got, want = (add_norm(x, **options, summed=h, backend=b) for h, b in zip(sums, (backend, "reference")))
    if keep:  # a product and a sum, each rounded
        assert torch.equal(*sums)
    assert_close("y", got, want, shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call_is_two(dtype, backend, device):
    """The sum, and the norm of it as it was rounded: bit for bit."""
    rows, residual = random(6, 96, dtype=dtype, device=device), random(6, 96, seed=1, dtype=dtype, device=device)
    gate, scale, shift = (random(2, 96, seed=seed, device=device) for seed in (2, 3, 4))
    after = {"norm": "layer", "scale": scale, "shift": shift, "backend": backend}
    h = add_norm(rows, gate=gate, residual=residual, backend=backend)
    summed = torch.empty_like(rows)
    y = add_norm(rows, gate=gate, residual=residual, summed=summed, **after)
    assert torch.equal(summed, h) and torch.equal(y, add_norm(h, **after))


@pytest.mark.parametrize("affine", [(), ("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
@pytest.mark.parametrize("modulated", [("scale",), ("scale", "shift")], ids=" ".join)
def test_an_infinite_scale_gives_what_the_formula_gives(affine, modulated, backend, device):
    """Infinity of the right sign, not the NaN of infinities that are taken apart and put together."""
    x = random(4, 40, device=device)
    steps = steps_for(dict.fromkeys(affine, True) | dict.fromkeys(modulated, 2), 4, 40, device=device)
    for at, number in (3, torch.inf), (5, -torch.inf), (7, torch.nan), (9, 3e38):
        steps["scale"][1, at] = number
    got, want = (add_norm(x, norm="layer", **steps, backend=b) for b in (backend, "reference"))
    assert torch.equal(got.isnan(), want.isnan()) and want[2:].isnan().sum() == 2
    infinite = want.isinf()
    assert infinite[2:].sum() >= 4 and torch.equal(got[infinite], want[infinite])


def test_it_is_what_quantize_rows_quantizes(backend, device):
    x, steps = random(6, 96, device=device), steps_for(STEPS["all"], 6, 96, device=device)
    steps = {name: value for name, value in steps.items() if name not in ("gate", "residual")}
    codes = quantize_rows(x, **steps, backend=backend)
    plain = quantize_rows(add_norm(x, **steps, backend=backend), backend=backend)
    assert torch.equal(codes.codes, plain.codes) and torch.equal(codes.scales, plain.scales)
