"""Where the tests run Triton's kernels: on a GPU or, without one, in its interpreter; conftest.py says which."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.5'")

from inferix_kernels.layout import KVPages
from inferix_kernels.triton_kernels.launch import INTERPRETED

IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's page lists are checked on the host")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    assert request.param == "cuda" or INTERPRETED, "Triton was imported before conftest.py set TRITON_INTERPRET=1"
    return request.param


def on(device, pages):
    if isinstance(pages, torch.Tensor):
        return pages.to(device)
    if isinstance(pages, KVPages):
        return pages.map(lambda x: x.to(device))
    return type(pages)(*(None if x is None else x.to(device) for x in pages))
