"""qkv_prologue in Triton against the reference: in its interpreter, or on a GPU where there is one."""

import pytest
import torch

import tests.ops.test_qkv as cases
from inferix_kernels import PageList, qkv_prologue
from inferix_kernels.layout import KV_FORMATS
from inferix_kernels.testing import poisoned_pool
from inferix_kernels.triton_kernels import codecs
from tests.triton_kernels import triton_mode

device = triton_mode.device

# What goes with each of test_qkv.SHAPES, so that every option meets every other somewhere.
WAYS = [
    ("across all heads", {"bias": True}),
    ("across all heads", {"bias": True, "k_mean": True}),
    ("per head", {"layer_norm": True, "interleaved": False, "channels": 48, "k_mean": True}),
    ("per head", {"interleaved": False, "bias": True}),
    ("none", {"channels": 10, "k_mean": True}),
]
REAL_SHAPES = [([64] * 24 + [24], 12, 12, 128, 64), ([64] * 24 + [24], 24, 8, 128, 64)]


def check(shape, norm, format, device, **options):
    args, options = cases.arguments(shape, norm, format=format, device=device, **options)
    got, want = (cases.run(args, options, backend) for backend in ("triton", "reference"))
    cases.assert_same(got, want, format, shape[3])


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("shape, way", list(zip(cases.SHAPES, WAYS)), ids=str)
def test_prologue_stores_what_the_reference_stores(shape, way, format, device):
    check(shape, way[0], format, device, **way[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_dtypes_and_pairings(interleaved, dtype, device):
    check(cases.SHAPES[1], "across all heads", "i8f8", device, dtype=dtype, interleaved=interleaved, channels=40)


@pytest.mark.parametrize("missing", [1, 2])
def test_one_of_two_norms(missing, device):
    args, options = cases.arguments(cases.SHAPES[3], "across all heads", device=device, format="i8f8")
    args = (*args[:missing], None, *args[missing + 1 :])
    cases.assert_same(cases.run(args, options, "triton"), cases.run(args, options, "reference"), "i8f8", 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=["Wan", "GQA"])
def test_real_sizes(shape, format):
    check(shape, "across all heads", format, "cuda", dtype=torch.bfloat16, bias=True, k_mean=True)
    check(shape, "per head", format, "cuda", dtype=torch.bfloat16, layer_norm=True, interleaved=False, channels=96)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_parts_that_hold_one_of_a_pair(format, device, monkeypatch):
    """Keys cut along channels: halves that turn together lie in different parts."""
    monkeypatch.setattr(
        "inferix_kernels.triton_kernels.qkv.config", lambda *_: {"numbers": 64, "numbers_per_thread": 2}
    )
    monkeypatch.setattr(codecs, "_LEAST_CHANNELS", 4)
    check(([8, 5], 2, 1, 20, 8), "per head", format, device, interleaved=False)


def test_prologue_without_rope_or_norm_only_splits(device):
    cases.test_prologue_without_rope_or_norm_only_splits("triton", device)


def test_qkv_may_be_rows_of_a_wider_tensor(device):
    cases.test_qkv_may_be_rows_of_a_wider_tensor("triton", device)


def test_weights_may_be_bfloat16(device):
    cases.test_weights_may_be_bfloat16("triton", device)


def test_no_tokens(device):
    pool, nothing = poisoned_pool("int8", 1, 2, 8, 16, device), PageList.of([], [], device)
    norm = torch.ones(32, device=device)
    assert (
        qkv_prologue(torch.empty(0, 96, device=device), norm, norm, None, pool, nothing, backend="triton").numel() == 0
    )


@triton_mode.IN_INTERPRETER
@pytest.mark.parametrize("mistake", [([9], [3]), ([0], [4]), ([0, 0], [1, 2])], ids=["id", "sum", "page twice"])
def test_a_wrong_page_list_is_named_before_anything_is_written(mistake):
    pool = poisoned_pool("fp32", 2, 2, 8, 16)
    with pytest.raises(ValueError, match="where"):
        qkv_prologue(torch.zeros(3, 96), None, None, None, pool, PageList.of(*mistake), backend="triton")
    assert pool.k.isnan().all() and pool.v.isnan().all()
