"""How many kernels a layer of Wan launches on a GPU, counted without one (benchmarks/launches.py)."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import launches
from inferix.models.linears import eight_bit_names
from inferix_kernels import PageList, kv_append
from inferix_kernels.quantize import quantize_linears
from inferix_kernels.testing import filled_pool
from tests.models.wan_golden import random_network, tiny_config

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
NOISY = """
    add_norm: rows_kernel | torch addmm | qkv_prologue: norm_stats_kernel | qkv_prologue: prologue_kernel
    paged_attention: attention_kernel | torch addmm | add_norm: rows_kernel | torch addmm | add_norm: rows_kernel
    torch _scaled_dot_product_flash_attention_for_cpu | torch addmm | add_norm: rows_kernel | torch addmm | torch gelu
    torch addmm
"""
MOST = 16


def network(linear=None):
    made = random_network(tiny_config(layers=3), dtype=torch.bfloat16)
    if linear:
        quantize_linears(made, linear, names=eight_bit_names(made))
    return made


def count(linear, backend):
    return launches.of_a_layer(network(linear), "int8", backend, size=(48, 80))


def test_a_layer_in_16_bits_has_few_launches():
    """One kernel between two products; a list of pages that is split among programs has one more to combine them."""
    found, once = count(None, "triton"), re.split(r" \| |\n +", NOISY.strip())
    parts = [name for name in found["noisy pass"] if name != "paged_attention: combine_kernel"]
    assert parts == once and len(once) < MOST
    assert len(found["noisy pass"]) <= MOST
    commit = once.index("paged_attention: attention_kernel")
    clean = [name for name in found["clean pass"] if name != "paged_attention: combine_kernel"]
    assert clean == [*once[:commit], "kv_commit: commit_kernel", *once[commit:]]


def test_a_layer_in_8_bits_has_one_kernel_before_each_product():
    """Norm and quantization are one kernel, and so are the product, GELU, gate and residual."""
    found = count(torch.int8, "triton")["noisy pass"]
    for kernel in ("quantize_rows: rows_kernel", "linear: linear_kernel"):
        assert found.count(kernel) == 6
    assert found.count("add_norm: rows_kernel") == 1  # of the query of cross-attention
    assert {name for name in found if name.startswith("torch")} == {"torch _scaled_dot_product_flash_attention_for_cpu"}


def test_cuda_kernels_are_counted_where_there_are_some():
    found = count(None, "compiled")["noisy pass"]
    ours = [name for name in found if not name.startswith("torch") and not name.startswith("add_norm")]
    pools = ["paged_attention: " + name for name in launches.CUDA["paged_attention"][0]] * 2  # int8, and scratch
    assert ours == ["qkv_prologue: qkv_moments_kernel", "qkv_prologue: qkv_prologue_kernel", *pools]


@pytest.mark.parametrize("op", launches.CUDA)
def test_the_table_of_cuda_kernels_is_what_the_sources_launch(op):
    text = "".join(path.read_text() for path in sorted(CSRC.glob("*.cu")))
    body = re.search(rf"^void {op}_cuda\(.*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    table = [name for entry in launches.CUDA[op] for name in ([entry] if isinstance(entry, str) else entry)]
    assert re.findall(r"\b(\w+_kernel)\b(?=[<,)])", body.replace("with_kernel", "")) == table
    if len(table) > len(launches.CUDA[op]):
        assert "for (int n = 0; n < passes.count; ++n) {" in body


def test_what_counts():
    with launches.noted("triton") as seen:
        x = torch.ones(4, 6)
        x.view(2, 12).t().reshape(24)  # the last copies
        x.mul_(2)
        torch.empty(3)
        pool, _ = filled_pool("fp32", [3], 1, 8, 16)
        seen.names.clear()
        x[:, 1:].transpose(0, 1).contiguous()
        torch.nn.functional.linear(x, x, x[:, 0])
        kv_append(torch.ones(3, 1, 16), torch.ones(3, 1, 16), pool, PageList.of([0], [3]))
    assert seen.names[:2] == ["torch clone", "torch addmm"] and seen.names[-1] == "kv_append: append_kernel"
