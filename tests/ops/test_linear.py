"""quantize_rows and linear: the reference against the formulas, every backend against the reference."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from inferix_kernels import Quantized, Unsupported, linear, quantize_rows, torch_backend
from inferix_kernels._check import ACTIVATIONS, CODES
from inferix_kernels.testing import assert_close
from tests.conftest import pairs

# M, N, K: one row, odd sizes, sizes that fill no tile, the layers of a small model.
SHAPES = [(1, 1, 1), (1, 48, 64), (7, 5, 33), (64, 80, 96), (130, 96, 257), (192, 384, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
STEPS = {
    "nothing": {},
    "a layer norm, modulated": {"norm": "layer", "scale": 2, "shift": 2},
    "a layer norm with weights": {"norm": "layer", "weight": True, "bias": True},
    "an RMS norm": {"norm": "rms", "weight": True},
    "GELU": {"activation": "gelu_tanh"},
    "exact GELU": {"activation": "gelu"},
    "all": {"norm": "rms", "weight": True, "bias": True, "scale": 1, "shift": 1, "activation": "gelu"},
}
EPILOGUES = {
    "nothing": {},
    "a bias": {"bias": True},
    "a bias and GELU": {"bias": True, "activation": "gelu_tanh"},
    "exact GELU": {"activation": "gelu"},
    "a gated residual": {"bias": True, "gate": True, "residual": True},
    "a residual": {"residual": True},
}


@pytest.fixture(params=[*pairs(), *(pytest.param(("torch", place), id=f"torch-{place}") for place in DEVICES)])
def backend_and_device(request):
    return request.param


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def steps_for(options, rows, columns, device="cpu"):
    """The arguments of STEPS: True is a vector, a number that many groups if they divide the rows."""
    made = {}
    for seed, (name, value) in enumerate(options.items()):
        if value is True:
            made[name] = random(columns, seed=seed, device=device)
        elif isinstance(value, int):
            made[name] = random(value if rows % value == 0 else 1, columns, seed=seed, device=device)
        else:
            made[name] = value
    return made


def epilogue_for(options, rows, columns, device="cpu"):
    shapes = {"bias": (columns,), "gate": (2 if rows % 2 == 0 else 1, columns), "residual": (rows, columns)}
    return {
        name: random(*shapes[name], seed=seed, device=device) if value is True else value
        for seed, (name, value) in enumerate(options.items())
    }


def assert_products_close(got, want, codes, terms, device):
    """Sums of int8 products are exact; of e4m3 products a GPU keeps 13 bits of mantissa over each tile of K."""
    if codes == torch.int8 or device == "cpu":
        assert_close("out", got, want, terms)
    else:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-12 * float(want.abs().max()))


def dequantized(x):
    return x.codes.float() * x.scales[:, None]


@pytest.mark.parametrize("dtype", CODES)
def test_codes_stand_for_the_rows(dtype):
    x = random(40, 96)
    x[3] = 0
    got = quantize_rows(x, dtype, backend="reference")
    assert (got.codes.dtype, got.scales.dtype, got.codes.shape, got.scales.shape) == (
        dtype,
        torch.float32,
        (40, 96),
        (40,),
    )
    top = 127 if dtype == torch.int8 else 448
    largest = x.abs().amax(1)
    torch.testing.assert_close(got.scales, largest.clamp(min=1e-12) / top)
    # Half a step of int8; half a unit in the last of e4m3's three bits, or half of its smallest step.
    step = largest[:, None] / 127 if dtype == torch.int8 else torch.maximum(x.abs() / 8, largest[:, None] / 448 / 512)
    assert ((dequantized(got) - x).abs() <= step / 2 * 1.0001).all()
    assert not dequantized(got)[3].any()


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_the_steps_before_the_codes_are_torchs(norm, activation):
    x, weight, bias = random(6, 64), random(64, seed=1), random(64, seed=2)
    scale, shift = random(3, 64, seed=3), random(3, 64, seed=4)
    steps = {"norm": norm, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "activation": activation}
    got = quantize_rows(x, **steps, eps=1e-5, backend="reference")
    if norm == "layer":
        want = F.layer_norm(x, (64,), weight, bias, 1e-5)
    else:
        want = (x if norm is None else F.rms_norm(x, (64,), eps=1e-5)) * weight + bias
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    want = want * (1 + scale[group]) + shift[group]
    if activation:
        want = F.gelu(want, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
    plain = quantize_rows(want, backend="reference")
    torch.testing.assert_close(got.scales, plain.scales, rtol=1e-5, atol=0)
    assert (got.codes.int() - plain.codes.int()).abs().max() <= 1


def test_linear_is_a_matrix_product_of_what_the_codes_stand_for():
    x, weight = quantize_rows(random(8, 48), backend="reference"), quantize_rows(random(5, 48, seed=1))
    bias, gate, residual = random(5, seed=2), random(2, 5, seed=3), random(8, 5, seed=4)
    options = {"bias": bias, "activation": "gelu", "gate": gate, "residual": residual, "dtype": torch.float32}
    got = linear(x, weight, **options, backend="reference")
    product = F.gelu(dequantized(x).double() @ dequantized(weight).double().T + bias)
    want = residual + product * gate.repeat_interleave(4, 0)
    assert_close("out", got, want.float(), 48)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_rows_match_the_reference(shape, steps, dtype, codes, backend, device):
    rows, _, columns = shape
    x, options = random(rows, columns, dtype=dtype, device=device), steps_for(STEPS[steps], rows, columns, device)
    got, want = (quantize_rows(x, codes, **options, backend=which) for which in (backend, "reference"))
    if not options:  # nothing but a division and a rounding: every bit
        assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(got.scales, want.scales)
        return
    # Sums of a norm in another order: a code next to a boundary may go the other way.
    torch.testing.assert_close(got.scales, want.scales, rtol=1e-5, atol=1e-12)
    if codes == torch.int8:
        assert (got.codes.int() - want.codes.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(got.codes.float(), want.codes.float(), rtol=1 / 8, atol=2**-9)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_numbers_far_below_a_code_are_those_of_the_reference(codes, backend, device):
    """GELU leaves numbers of any smallness, denormal ones too."""
    x = random(64, 96, device=device) * 10.0 ** -(45 * random(64, 96, seed=1, device=device).abs() / 2)
    x[0] *= 1e-30  # a row of nothing else, and less than the smallest scale
    got, want = (quantize_rows(x, codes, backend=which) for which in (backend, "reference"))
    assert (x.abs() < 1.2e-38).any() and (want.codes.float() != 0).any()
    assert torch.equal(got.codes.float(), want.codes.float()) and torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_matches_the_reference(shape, epilogue, dtype, codes, backend, device):
    M, N, K = shape
    x, weight = (quantize_rows(random(rows, K, seed=rows, device=device), codes) for rows in (M, N))
    options = epilogue_for(EPILOGUES[epilogue], M, N, device) | {"dtype": dtype}
    got, want = (linear(x, weight, **options, backend=which) for which in (backend, "reference"))
    assert_products_close(got, want, codes, K, device)


@pytest.mark.parametrize("codes, terms", [(torch.int8, 4032), (torch.float8_e4m3fn, 2016)])
def test_fewer_shares_may_hold_the_weight_than_its_size_asks_for(codes, terms):
    """On a CPU: 65 groups of sixteen rows in shares of at most 8.1 are 8, but even shares are of 10, and 7 hold all."""
    x, weight = (quantize_rows(random(rows, terms, seed=rows), codes) for rows in (528, 1040))
    got, want = (linear(x, weight, dtype=torch.float32, backend=which) for which in ("compiled", "reference"))
    assert_products_close(got, want, codes, terms, "cpu")


@pytest.mark.parametrize("rows, columns, terms", [(40, 70, 2052), (70, 40, 4700), (600, 33, 2300)])
def test_long_rows_are_multiplied_in_parts(rows, columns, terms, isa):
    """In tile registers, panel by panel: integer sums are exact, so the bits are those of the formula."""
    x, weight = (quantize_rows(random(count, terms, seed=count)) for count in (rows, columns))
    got = linear(x, weight, dtype=torch.float32, backend="compiled")
    sums = (x.codes.double() @ weight.codes.double().T).float()
    assert torch.equal(got, sums * (weight.scales * x.scales[:, None]))


@pytest.mark.parametrize("dtype, columns", [(torch.bfloat16, 1056), (torch.bfloat16, 1041), (torch.float32, 528)])
def test_a_result_larger_than_a_cache_is_the_same(dtype, columns, isa):
    """Whole lines of it are written past the caches, of a width at which its rows begin where lines do."""
    x, weight = (quantize_rows(random(count, 8, seed=count)) for count in (1100, columns))
    got = linear(x, weight, dtype=dtype, backend="compiled")
    few = [linear(Quantized(*(y[i : i + 100] for y in x)), weight, dtype=dtype, backend="compiled") for i in
           range(0, 1100, 100)]  # fmt: skip
    assert torch.equal(got, torch.cat(few))


def test_a_float_input_is_quantized_first(backend, device):
    x, weight = random(6, 32, device=device), quantize_rows(random(4, 32, seed=1, device=device))
    got = linear(x, weight, backend=backend)
    assert torch.equal(got, linear(quantize_rows(x, backend=backend), weight, backend=backend))


def test_the_residual_may_be_the_output(backend, device):
    x, weight = random(6, 32, device=device), quantize_rows(random(4, 32, seed=1, device=device))
    residual = random(6, 4, seed=2, device=device)
    want = linear(x, weight, residual=residual, dtype=torch.float32, backend=backend)
    got = linear(x, weight, residual=residual, out=residual, backend=backend)
    assert got is residual and torch.equal(got, want)


@pytest.mark.parametrize("which", ["compiled", "torch", "reference"])
def test_no_rows_are_no_error(which):
    weight = quantize_rows(random(4, 32))
    x = quantize_rows(torch.empty(0, 32), backend=which)
    assert linear(x, weight, backend=which).shape == (0, 4)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_gets_the_sizes_that_it_takes_on_a_gpu(shape, codes, monkeypatch):
    """More than 16 rows of int8, multiples of 8 or 16; what is added adds nothing."""
    M, N, K = shape
    x, weight = (quantize_rows(random(rows, K, seed=rows), codes, backend="reference") for rows in (M, N))
    want, seen = linear(x, weight, backend="reference"), []
    least, multiple = torch_backend.LEAST_ROWS[codes], torch_backend.MULTIPLE[codes]
    monkeypatch.setattr(torch_backend, "padding", lambda codes: (least, multiple))
    product = torch_backend.product
    monkeypatch.setattr(torch_backend, "product", lambda a, b: seen.append((a.shape, b.shape)) or product(a, b))
    assert_products_close(linear(x, weight, backend="torch"), want, codes, K, "cpu")
    (((rows, terms), (columns, same)),) = seen
    assert rows == max(M, least) and terms == same and not (terms % multiple or columns % multiple)
    assert 0 <= terms - K < multiple and 0 <= columns - N < multiple


@pytest.mark.parametrize("codes", CODES)
def test_a_single_term_is_no_special_case(codes):
    """Of K = 1 torch._int_mm returns other numbers on CPUs."""
    x, weight = (quantize_rows(random(rows, 1, seed=rows), codes) for rows in (9, 20))
    want = linear(x, weight, dtype=torch.float32, backend="reference")
    for which in ("torch", "compiled"):
        assert torch.equal(linear(x, weight, dtype=torch.float32, backend=which), want)


def test_what_torch_can_not_multiply_is_unsupported_and_says_why(monkeypatch):
    x, weight = (quantize_rows(torch.ones(rows, 131072), backend="reference") for rows in (2, 1))
    with pytest.raises(Unsupported, match="sums in 32 bits, so at most 131071 columns, got 131072"):
        linear(x, weight, backend="torch")

    rows = quantize_rows(torch.ones(2, 8), backend="reference")
    for error, said in (
        (NotImplementedError("mkldnn is not here\nand more"), Unsupported),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling"), Unsupported),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError),  # no word of what is supported
    ):
        monkeypatch.setattr(torch, "_int_mm", mock.Mock(side_effect=error))
        with pytest.raises(RuntimeError, match=str(error).splitlines()[0]) as raised:
            linear(rows, rows, backend="torch")
        assert type(raised.value) is said and "\n" not in str(raised.value)


def test_torchs_scaled_product_is_the_one_that_is_meant():
    """As a GPU is asked for it; on a CPU it is too slow to be used."""
    x, weight = (quantize_rows(random(rows, 32, seed=rows), torch.float8_e4m3fn).codes for rows in (3, 16))
    torch.testing.assert_close(torch_backend.scaled_mm(x, weight), torch_backend.product(x, weight))


@pytest.mark.parametrize("codes", CODES)
def test_a_row_that_is_not_finite_stays_so_in_torch(codes):
    x = random(3, 32)
    x[1, 5] = torch.inf
    rows = quantize_rows(x, codes, backend="torch")
    y = linear(rows, quantize_rows(random(4, 32, seed=1), codes), backend="torch")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
