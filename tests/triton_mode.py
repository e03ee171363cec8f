"""Import this before Triton: without a GPU its kernels run in its interpreter, and a process can not have both."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is imported
pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.5'")

from inferix_kernels.triton_kernels.launch import INTERPRETED

IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's page lists are checked on the host")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton was imported before this file could set TRITON_INTERPRET=1")
    return request.param


def on(device, pages):
    if isinstance(pages, torch.Tensor):
        return pages.to(device)
    return type(pages)(*(None if x is None else x.to(device) for x in pages))
