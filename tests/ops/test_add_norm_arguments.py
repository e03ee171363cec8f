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
    r"x must be \[..., K\], got \[\]": {"x": torch.tensor(1.0)},
    r"x must have rows that lie evenly apart, got strides \(312, 24, 1\)": {"x": random(2, 13, 24)[:, :3]},
    r"scale must be \[M0=2, 1, K=24\], got \[3, 1, 24\]": {"x": random(2, 3, 24), "scale": random(3, 1, 24)},
    r"gate must have a number of rows that divides M=6, got 4": {"gate": random(4, 24)},
    r"scale must have a number of rows that divides M=6, got 0": {"scale": random(0, 24)},
    r"residual must be \[M=6, K=24\], got \[6, 23\]": {"residual": random(6, 23)},
    r"residual must be \[M0=2, M1=3, K=24\], got \[3, 2, 24\]": {"x": random(2, 3, 24), "residual": random(3, 2, 24)},
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


def test_rows_may_have_places_in_several_dimensions(backend, device):
    """A block's frames, each with a modulation of its own."""
    x, residual = random(3, 5, 40, device=device), random(3, 5, 40, seed=1, device=device)
    gate, scale, shift = (random(3, 1, 40, seed=seed, device=device) for seed in (2, 3, 4))
    flat = {name: t[:, 0] for name, t in {"gate": gate, "scale": scale, "shift": shift}.items()}
    summed, want = torch.empty_like(x), torch.empty(15, 40, device=device)
    y = add_norm(
        x, gate=gate, residual=residual, norm="layer", scale=scale, shift=shift, summed=summed, backend=backend
    )
    rows = add_norm(x.view(15, 40), residual=residual.view(15, 40), norm="layer", summed=want, **flat, backend=backend)
    assert torch.equal(y.view(15, 40), rows) and torch.equal(summed.view(15, 40), want)
    assert torch.equal(add_norm(x[1, 2], norm="rms", backend=backend), add_norm(x[1], norm="rms", backend=backend)[2])


ROOM = torch.zeros(14, 24)
OVERLAPS = {
    "out must share no memory with summed, got tensors that overlap": {"summed": ROOM[:6], "out": ROOM[5:11]},
    "out must share no memory with x, got tensors that overlap": {"x": ROOM[:6], "out": ROOM[1:7]},
    "summed must share no memory with residual, got tensors that overlap": {
        "residual": ROOM[4:10],
        "summed": ROOM[:12:2],
    },
    "out must share no memory with residual, got tensors that overlap": {  # as wide, but of another dtype
        "residual": ROOM[:6],
        "out": ROOM[:6].view(torch.bfloat16)[:, :24],
    },
}


@pytest.mark.parametrize("said", OVERLAPS)
def test_what_is_written_shares_no_memory(said, backend):
    ROOM.fill_(7)
    with pytest.raises(ValueError, match=f"^{said}$"):
        add_norm(**{"x": random(6, 24)} | OVERLAPS[said], backend=backend)
    assert (ROOM == 7).all()


def test_rows_may_lie_between_those_of_another(backend, device):
    """Side by side in rows of 24, and one after the other."""
    x, room = random(6, 12, device=device), torch.zeros(9, 24, device=device)
    for out in (room[:6, 12:], room[6:].view(6, 12)):
        room[:6, :12] = x
        if backend == "compiled" and not out.is_contiguous():
            continue  # it takes rows that follow each other
        add_norm(room[:6, :12], norm="rms", out=out, backend=backend)
        assert torch.equal(out, add_norm(x, norm="rms", backend=backend))


def test_the_sum_and_the_result_are_two_tensors():
    x = random(6, 24)
    with pytest.raises(ValueError, match=r"^summed must be another tensor than out, got the same$"):
        add_norm(x, summed=x, out=x)
    with pytest.raises(TypeError, match=r"^residual must be float32 or bfloat16 or float16, got float64$"):
        add_norm(x, residual=x.double())
