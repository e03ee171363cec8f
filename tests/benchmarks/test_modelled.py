"""What a block takes on a GPU, added up (benchmarks/modelled.py): the sums against others made by hand."""

import pytest

from benchmarks import modelled
from benchmarks.modelled import Assumed
from inferix_kernels import estimate


def by_name(assumed):
    return {part.name: part for part in modelled.parts(assumed)}


def test_the_parts_are_what_their_arithmetic_says():
    """480 x 832: 3 frames of 1560 tokens of 21; 30 layers of 1536 channels, 5 passes; 989.4 TFLOP/s of 16 bits."""
    found = by_name(Assumed(past=512, own=512, noisy=16, clean=17, product_share=0.5, memory_share=1, launch_us=2))
    assert found["launches"].least == pytest.approx(30 * (4 * 16 + 17) * 2e-3)
    # qkv, o, two of cross-attention, and the feed-forward: 2 * tokens * in * out each
    work = 150 * 2 * 4680 * 1536 * (3 * 1536 + 1536 + 2 * 1536 + 2 * 8960)
    assert found["linear layers"].most == pytest.approx(1e3 * work / 989.4e12 / 0.5, rel=1e-3)
    # As many instructions as cycles of the tensor cores: half of the rate, times what public kernels reach.
    low, high = estimate.reached()
    past, own = found["attention to the past"], found["attention to itself"]
    assert past.least == pytest.approx(1e3 * 150 * 4 * 4680 * 28080 * 1536 / (989.4e12 / 2 * high), rel=1e-3)
    assert past.most / past.least == pytest.approx(high / low) and past.least / own.least == pytest.approx(18 / 3)
    assert found["between products"].most > 1e3 * 150 * 4680 * (17 * 1536 + 2 * 8960) * 2 / 3.35e12


def test_what_is_in_8_bits_takes_less():
    plain, eight = (
        by_name(Assumed(past=342, own=323, noisy=16, clean=17, eight_bit=on, linear_8bit=on)) for on in (False, True)
    )
    assert eight["linear layers"].most == pytest.approx(plain["linear layers"].most / 2)
    assert eight["attention to the past"].most < plain["attention to the past"].most
    assert eight["attention to itself"] == plain["attention to itself"]


def test_the_rate_is_the_estimate_of_the_page():
    """docs/gpu-path.md: the Hopper kernel over bf16 pages, and over i8f8 in 8 bits."""
    assert [round(x) for x in modelled.attention_rate(198.25)] == [514, 659]
    assert [round(x) for x in modelled.attention_rate(342, eight_bit=True)] == [611, 783]


def test_the_command_adds_up(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["modelled", "--instructions", "599", "323", "--launches", "16", "17"])
    modelled.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    numbers = [[float(x) for x in row.split("|")[2:4]] for row in rows]
    assert "modelled" in head and len(rows) == 7
    for column in zip(*numbers, strict=True):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.4)


def test_instructions_and_launches_are_counted_where_they_are_not_given(monkeypatch):
    monkeypatch.setattr(modelled, "counted", lambda kv: (600.0, 300.0))
    monkeypatch.setattr(
        modelled, "launches_of", lambda *asked: (16, 17) if asked == (True, "fp8", "compiled") else None
    )
    assumed = modelled.assumed_of(["--kv", "fp8", "--linear-8bit", "--backend", "compiled"])
    assert assumed == Assumed(600.0, 300.0, 16, 17, linear_8bit=True, kv="fp8")
