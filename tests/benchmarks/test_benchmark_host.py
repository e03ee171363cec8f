"""`python -m benchmarks run host`: what it counts is there, and its kernels do nothing."""

import pytest
import torch

from benchmarks import host, host_layer
from benchmarks.harness.measure import Settings
from inferix_kernels import KVPages, PageList, make_plan, ops, paged_attention
from inferix_kernels.triton_kernels.launch import launch_nothing


def test_every_row_says_what_the_host_does():
    rows = {(row.op, row.contender): row for row in host.run(Settings(rounds=1), [])}
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["of a block", "ours"].metrics["made or moved"] == 0
    for contender in ("ours-null", "ours-triton"):
        times = rows["python of a layer", contender].metrics
        assert set(times) == {"noisy us", "its attention us", "its norms us", "with torch.nn us", "fused us"}
        assert min(times.values()) > 0


OPS = ["add_norm", "qkv_prologue", "paged_attention", "add_norm", "add_norm", "add_norm"]


@pytest.mark.parametrize("modules", [False, True], ids=["plain objects", "modules"])
def test_a_layer_calls_all_of_its_ops(modules, monkeypatch):
    called, call = [], ops.call
    monkeypatch.setattr(ops, "call", lambda op, *args, **kwargs: called.append(op) or call(op, *args, **kwargs))
    with host_layer.backend("null") as name, torch.inference_mode():
        for what, planned, frames in host_layer.passes(name):
            with host_layer.torch_gives(frames):
                layer = host_layer.Layer(planned, frames, modules)
                called.clear()
                layer.forward(3)
            commit = ["kv_commit"] * (what == "fused")
            assert called == [*OPS[:2], *commit, *OPS[2:]] and len(layer.norms) == OPS.count("add_norm")


def test_what_counts_as_made_or_moved():
    found = []
    with host.OnTheDevice(found.append):
        x = torch.zeros(3)
        _ = (x + 1).double().sum()
        assert float(x[0]) == 0
    assert found == ["zeros makes a tensor", "_local_scalar_dense reads from the device"]


def test_a_launch_of_nothing_writes_nothing():
    pages, q = KVPages.empty("bf16", 2, 2, 16, 32), torch.zeros(4, 2, 32, dtype=torch.bfloat16)
    pages.k.zero_(), pages.v.fill_(1)
    out = torch.full_like(q, 7)
    where = PageList.of([0, 1], [16, 3])
    with launch_nothing(90) as launched:
        paged_attention(q, [pages], make_plan([(4, where.ids.tolist(), [16, 3])]), out=out, backend="triton")
    assert "attention_kernel" in launched and (out == 7).all()
