"""What add_norm takes, and what it refuses."""

import pytest
import torch

from inferix_kernels import add_norm
from inferix_kernels.testing import assert_close
from tests.ops.test_add_norm import DTYPES, random


@pytest.mark.parametrize("dtypes", [(0, 1, 2, 0), (1, 0, 0, 1), (2, 1, 1, 2)], ids=str)
def test_each_tensor_may_be_of_a_dtype_of_its_own(dtypes, backend, device):
    x, residual, summed, out = (random(6, 40, seed=s, dtype=DTYPES[i], device=device) for s, i in enumerate(dtypes))
    gate, weight = random(3, 40, seed=5, device=device).half(), random(40, seed=6, device=device).bfloat16()
    results = []
    for which in (backend, "reference"):
        kept, made = torch.empty_like(summed), torch.empty_like(out)
        add_norm(x, gate=gate, residual=residual, norm="rms", weight=weight, summed=kept, out=made, backend=which)
        results.append((kept, made))
    assert torch.equal(results[0][0], results[1][0])
    assert_close("out", results[0][1], results[1][1], 40)


def test_the_stream_may_be_written_in_place(backend, device):
    x, added = random(6, 96, device=device), random(6, 96, seed=1, device=device)
    gate = random(2, 96, seed=2, device=device)
    want, y = torch.empty_like(x), add_norm(added, gate=gate, residual=x, norm="rms", backend=backend)
    add_norm(added, gate=gate, residual=x, summed=want, backend=backend)
    assert add_norm(added, gate=gate, residual=x, norm="rms", summed=x, out=added, backend=backend) is added
    assert torch.equal(x, want) and torch.equal(added, y)


def test_rows_may_lie_apart(backend, device):
    wide = random(6, 120, device=device)
    apart, dense = (add_norm(x, norm="rms", backend=backend) for x in (wide[:, 24:88], wide[:, 24:88].contiguous()))
    assert torch.equal(apart, dense)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_stays_in_its_row(bad, backend, device):
    x = random(5, 33, device=device)
    x[2, 7] = bad
    y = add_norm(x, norm="layer", backend=backend)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
    h = add_norm(x, residual=torch.zeros_like(x), backend=backend)
    assert torch.equal(h.isfinite(), x.isfinite())


def test_no_rows_are_no_error(backend, device):
    x = random(0, 32, device=device)
    assert add_norm(x, norm="layer", backend=backend).shape == (0, 32)
    assert add_norm(x, gate=x, residual=x, norm="layer", scale=x, backend=backend).shape == (0, 32)


WRONG = {
    r"x must be \[M, K\], got \[24\]": {"x": random(24)},
    r"gate must have a number of rows that divides M=6, got 4": {"gate": random(4, 24)},
    r"scale must have a number of rows that divides M=6, got 0": {"scale": random(0, 24)},
    r"residual must be \[M=6, K=24\], got \[6, 23\]": {"residual": random(6, 23)},
    r"summed must be \[M=6, K=24\], got \[5, 24\]": {"summed": random(5, 24)},
    r"norm must be 'layer', 'rms' or None, got 'batch'": {"norm": "batch"},
    r"eps must be a finite number, got nan": {"eps": float("nan")},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(said):
    out = torch.full((6, 24), 7.0)
    with pytest.raises(ValueError, match=f"^{said}$"):
        add_norm(**{"x": random(6, 24), "out": out} | WRONG[said])
    assert (out == 7).all()


def test_the_sum_and_the_result_are_two_tensors():
    x = random(6, 24)
    with pytest.raises(ValueError, match=r"^summed must be another tensor than out, got the same$"):
        add_norm(x, summed=x, out=x)
    with pytest.raises(TypeError, match=r"^residual must be float32 or bfloat16 or float16, got float64$"):
        add_norm(x, residual=x.double())
