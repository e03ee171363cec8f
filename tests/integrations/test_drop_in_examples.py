"""What examples of FlashInfer, flex_flash_attn_func and sdpa print, and those in their docstrings."""

import doctest
import re

import pytest
import torch

from inferix_kernels.integrations import _ranges, flashinfer, flex_flash_attn, sdpa
from tests.integrations.examples import said


def test_flashinfers_calls_over_a_bf16_cache_and_over_int8_pages(capsys):
    rows = re.findall(r"(\w+ \w+): +([\d,]+) bytes, ([\d.]+)% from dense", said("flashinfer_drop_in", capsys))
    sizes, errors = ({row[0]: float(row[i].replace(",", "")) for row in rows} for i in (1, 2))
    # Of bfloat16 rounding, half of 2 ** -8 at most; what 8-bit pages cost is the tolerance of tests/ops.
    assert errors["bf16 cache"] < 0.4 and errors["int8 pages"] < 1.5
    assert sizes["int8 pages"] < 0.55 * sizes["bf16 cache"]


def test_magis_call_is_dense_attention(capsys):
    assert float(re.search(r"is ([\d.]+)% from", said("flex_flash_attn_drop_in", capsys))[1]) < 0.4


@pytest.mark.parametrize("module", [flashinfer, flex_flash_attn, _ranges, sdpa], ids=lambda module: module.__name__)
def test_docstrings_say_what_happens(module):
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted and not results.failed
