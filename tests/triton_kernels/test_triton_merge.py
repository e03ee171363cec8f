"""merge_attention in Triton against the reference: in its interpreter, or on a GPU where there is one."""

import pytest
import torch

from inferix_kernels import merge_attention
from inferix_kernels.testing import assert_close
from tests.triton_kernels import triton_mode

device = triton_mode.device


def sides(tokens, heads, width, dtype, device):
    """Two results over other keys; the first rows saw none on the one side, on the other, on both."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(tokens, heads, width, generator=generator).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(tokens, heads, generator=generator) * 5 for _ in range(2))
    for empty, rows in ((lse_a, [0, 2]), (lse_b, [1, 2])):
        empty[[row for row in rows if row < tokens]] = -torch.inf
    a[lse_a == -torch.inf], b[lse_b == -torch.inf] = torch.nan, torch.nan  # whatever it holds is not used
    return tuple(x.to(device) for x in (a, lse_a, b, lse_b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 3, 20), (40, 2, 128)], ids=str)
def test_merge_matches_the_reference(shape, dtype, device):
    check(shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(dtype):
    check((4680, 12, 128), dtype, "cuda")


def check(shape, dtype, device):
    given = sides(*shape, dtype, device)
    for out_dtype in {dtype, torch.float32}:
        got, want = (
            merge_attention(*given, out=torch.empty(shape, dtype=out_dtype, device=device), backend=backend)
            for backend in ("triton", "reference")
        )
        assert_close("out", got[0], want[0], 2)
        assert_close("lse", got[1], want[1], 2)
        assert (got[1][2:3] == -torch.inf).all() and not got[0][2:3].any()


def test_strided_and_in_place(device):
    a, lse_a, b, lse_b = sides(7, 2, 24, torch.float32, device)
    want = merge_attention(a, lse_a, b, lse_b, backend="triton")
    wide = torch.cat((a, a), -1)[..., :24]
    got = merge_attention(wide, lse_a, b, lse_b, out=wide, lse=lse_a, backend="triton")
    assert got[0] is wide and all(torch.equal(x, y) for x, y in zip(got, want))
