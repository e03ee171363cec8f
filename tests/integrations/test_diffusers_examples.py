import re

import pytest

from tests.integrations.examples import said


def test_a_stock_pipeline_goes_on_over_a_bounded_past(capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: wan)")
    text = said("diffusers_blocks", capsys)
    assert "18 latent frames in 6 blocks; the last frames held are 0, 1, 2, 9, 10, 11, 12, 13, 14, 15, 16, 17" in text
    rows = re.findall(r"^ +(\w+) +([\d,]+)  (\S+)$", text, re.MULTILINE)
    sizes = {format: int(size.replace(",", "")) for format, size, _ in rows}
    differences = {format: float(difference) for format, _, difference in rows}
    assert sizes["fp32"] > 2 * sizes["int8"] > 2.5 * sizes["int4"]  # with scratch, which stays in float32
    # Random weights attend evenly: what a format loses is a small part of what a block adds up to.
    assert differences["fp32"] == 0 < differences["int8"] < differences["int4"] < 1e-2


def test_an_exported_kernel_is_torchs_attention(capsys):
    differences = re.findall(r"(full|causal): (\S+) from torch's", said("hf_kernel_export", capsys))
    assert [kind for kind, _ in differences] == ["full", "causal"]
    assert all(float(x) < 2e-2 for _, x in differences)  # a rounding of bfloat16, of outputs below 4
