"""quantize_rows, add_norm and linear in Triton against the reference: in its interpreter, or on a GPU."""

import importlib

import pytest
import torch

import tests.ops.test_add_norm as sums
import tests.ops.test_add_norm_arguments as arguments
import tests.ops.test_linear as cases
from inferix_kernels import Quantized, Unsupported, add_norm, linear, quantize_rows
from inferix_kernels._check import CODES
from inferix_kernels.triton_kernels import launch
from tests.triton_kernels import triton_mode

device = triton_mode.device

SHAPES = [(1, 1, 1), (7, 5, 33), (130, 96, 257)]
# Wan 1.3B's block of three frames: projections and both matrices of the feed-forward layer.
REAL_SHAPES = [(4680, 1536, 1536), (4680, 8960, 1536), (4680, 1536, 8960)]


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("steps", cases.STEPS)
@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, cases.DTYPES)), ids=str)
def test_quantized_rows_match_the_reference(shape, dtype, steps, codes, device):
    cases.test_quantized_rows_match_the_reference(shape, steps, dtype, codes, "triton", device)


@pytest.mark.parametrize("steps", sums.STEPS)
@pytest.mark.parametrize("shape, dtype", list(zip(sums.SHAPES, sums.DTYPES)), ids=str)
def test_sums_and_norms_match_the_reference(shape, dtype, steps, device):
    sums.test_it_matches_the_reference(shape, steps, dtype, True, "triton", device)


@pytest.mark.parametrize("dtype", sums.DTYPES, ids=str)
def test_one_call_is_two(dtype, device):
    sums.test_one_call_is_two(dtype, "triton", device)
    arguments.test_the_stream_may_be_written_in_place("triton", device)
    arguments.test_rows_may_lie_apart("triton", device)


def test_each_tensor_may_be_of_a_dtype_of_its_own(device):
    arguments.test_each_tensor_may_be_of_a_dtype_of_its_own((1, 0, 2, 1), "triton", device)


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("epilogue", cases.EPILOGUES)
@pytest.mark.parametrize("shape, dtype", list(zip(SHAPES, cases.DTYPES)), ids=str)
def test_linear_matches_the_reference(shape, dtype, epilogue, codes, device):
    check_linear(shape, epilogue, dtype, codes, device)


def check_linear(shape, epilogue, dtype, codes, device):
    M, N, K = shape
    x, weight = (quantize_rows(cases.random(rows, K, seed=rows), codes, backend="reference") for rows in (M, N))
    options = cases.epilogue_for(cases.EPILOGUES[epilogue], M, N)
    want = linear(x, weight, **options, dtype=dtype, backend="reference")
    x, weight = (Quantized(*(tensor.to(device) for tensor in matrix)) for matrix in (x, weight))
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    got = linear(x, weight, **options, dtype=dtype, backend="triton").cpu()
    cases.assert_products_close(got, want, codes, K, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_sizes(shape, codes):
    check_linear(shape, "a gated residual", torch.bfloat16, codes, "cuda")
    cases.test_quantized_rows_match_the_reference(
        shape, "a layer norm, modulated", torch.bfloat16, codes, "triton", "cuda"
    )


def test_strided_inputs_and_the_residual_as_output(device):
    wide = cases.random(6, 96, device=device)
    got, want = (quantize_rows(x, backend="triton") for x in (wide[:, ::3], wide[:, ::3].contiguous()))
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    weight, residual = quantize_rows(cases.random(40, 32, seed=1).to(device), backend="triton"), wide[:, 50:90]
    want = linear(got, weight, residual=residual, dtype=torch.float32, backend="triton")
    out = linear(got, weight, residual=residual, out=residual, backend="triton")
    assert out is residual and torch.equal(out, want) and torch.equal(wide[:, 50:90], want)


def test_no_rows_are_no_error(device):
    weight = quantize_rows(cases.random(4, 32, device=device), backend="triton")
    x = quantize_rows(torch.empty(0, 32, device=device), backend="triton")
    assert linear(x, weight, backend="triton").shape == (0, 4)


def test_what_can_not_run_is_said(device, monkeypatch):
    for op in (quantize_rows, add_norm):
        with pytest.raises(Unsupported, match=f"{op.__name__}: x must be at most 32768 wide, got 32769"):
            op(torch.empty(1, 32769, device=device), backend="triton")
    x = quantize_rows(torch.ones(2, 32, device=device), torch.float8_e4m3fn, backend="triton")
    module = importlib.import_module("inferix_kernels.triton_kernels.linear")  # the package's "linear" is the op
    monkeypatch.setattr(module, "architecture", lambda device: 80)
    with pytest.raises(Unsupported, match="e4m3 codes need sm_89 or later, this is sm_80"):
        linear(x, x, backend="triton")
    assert launch.architecture(torch.device("cpu")) is None
