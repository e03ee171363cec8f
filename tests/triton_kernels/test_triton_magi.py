"""MAGI-1's attention in Triton, in its interpreter: one layer over a clean chunk, four noisy ones and a copy.

Its pages are int8 and fp32, its heads grouped by three, and each chunk sees as far back as its noise lets it.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.5'")

from inferix.decode.pipeline import PipelineDecoder
from inferix.models.magi import Magi, MagiSchedule, adapter_for
from inferix_kernels.store import attention
from inferix_kernels.triton_kernels import launch
from tests.models.magi_folder import random_network, tiny_config
from tests.models.magi_golden import table_for


def test_one_layer_of_a_forward_over_six_segments(monkeypatch):
    if not launch.INTERPRETED:
        pytest.skip("the kernels run on a GPU here, and the model on the CPU")
    attend, compared = attention.paged_attention, []

    def both(q, pools, plan, *, out, lse, precision, backend):
        wanted, _ = attend(q, pools, plan, out=out, lse=lse, precision=precision, backend=backend)
        if len(plan.q_indptr) - 1 == 6 and not compared:
            got, got_lse = torch.empty_like(q), torch.empty_like(lse)
            attend(q, pools, plan, out=got, lse=got_lse, precision=precision, backend="triton")
            compared.append(((got - wanted).abs().max().item(), (got_lse - lse).abs().max().item()))
        return wanted, lse

    monkeypatch.setattr(attention, "paged_attention", both)
    schedule = MagiSchedule(8, distilled=True)
    model = Magi(
        random_network(tiny_config(layers=1, heads=3, kv_heads=1)),
        adapter_for("magi-4.5b", schedule, (16, 32)),
        schedule,
    )
    pipeline = PipelineDecoder(model, table_for(model, "int8"), torch.Generator().manual_seed(0))
    prompt = model.conditioning_from(torch.randn(5, 24))
    while not compared:
        pipeline.step(prompt)
    ((out, lse),) = compared
    assert out < 2e-5 and lse < 2e-5  # sums in another order, float32; codes are multiplied as they are by both
